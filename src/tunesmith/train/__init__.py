"""One method, one file; run as a filter."""

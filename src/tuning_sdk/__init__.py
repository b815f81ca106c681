"""The Python client of Tunesmith."""

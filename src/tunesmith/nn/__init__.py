"""Models as modules."""

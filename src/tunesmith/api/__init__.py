"""The door: HTTP routes over the hub."""

"""What is remembered: rows and files."""

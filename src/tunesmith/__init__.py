"""Tunesmith: a fine-tuning service that a team runs on its own machines."""

VERSION = "0.1.0"

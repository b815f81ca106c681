"""What may be asked and what is kept: pydantic only."""

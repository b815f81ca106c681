"""From files to tokens, without torch."""

"""How much of the cache a sequence takes: plain Python, no torch."""

LEAST = 64
"""Tokens."""


def room(tokens: int, longest: int) -> int:
    """Tokens that a sequence's place holds: so many, rounded up to a power of two, or the longest
    that there can be."""
    size = LEAST
    while size < tokens:
        size *= 2
    return max(tokens, min(size, longest))

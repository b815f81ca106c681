"""Who holds which beginning of a prompt: plain Python, no torch.

Keyed by blocks of ids, each block's key holding all before it, as in vLLM's prefix caching (Kwon et
al. 2023, arXiv:2309.06180, section 4.4).
"""

from tunesmith.infer.sequence import Sequence

BLOCK = 64
"""Tokens; a shorter beginning is not worth a look."""


class Prefixes:
    """Sequences, running or kept, by the whole blocks of ids that their cache begins with."""

    def __init__(self) -> None:
        self._holders: dict[int, Sequence] = {}
        self._keys: dict[Sequence, list[int]] = {}

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._keys

    def note(self, sequence: Sequence) -> None:
        """What is computed of it can be taken from now on."""
        keys = _keys(sequence, sequence.computed)
        self._keys[sequence] = keys
        for key in keys:
            self._holders[key] = sequence

    def forget(self, sequence: Sequence) -> None:
        for key in self._keys.pop(sequence, ()):
            if self._holders.get(key) is sequence:
                del self._holders[key]

    def find(self, sequence: Sequence) -> tuple[Sequence, int] | None:
        """Who holds most of its beginning, and how many tokens; one is left to be computed."""
        best = None
        for key in _keys(sequence, sequence.length - 1):
            if key not in self._holders:
                break
            best = self._holders[key]
        if best is None:
            return None
        tokens = _common(sequence, best)
        return (best, tokens) if tokens >= BLOCK else None


def _keys(sequence: Sequence, tokens: int) -> list[int]:
    """Of each whole block among the first `tokens`."""
    key, keys = hash(sequence.adapter), []
    for end in range(BLOCK, tokens + 1, BLOCK):
        key = hash((key, *sequence.tokens(end - BLOCK, end)))
        keys.append(key)
    return keys


def _common(one: Sequence, holder: Sequence) -> int:
    """Tokens that are surely the same: two keys may be equal by chance."""
    if one.adapter != holder.adapter:
        return 0
    most = min(one.length - 1, holder.computed)
    ids, held = one.tokens(0, most), holder.tokens(0, most)
    if ids == held:
        return most
    return next(place for place in range(most) if ids[place] != held[place])

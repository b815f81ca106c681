"""Ids to text while they come: never half a character, never a part of a stop string."""

from collections.abc import Sequence

from tokenizers import Tokenizer

_BROKEN = "\ufffd"
_MAX_CHARACTER_TOKENS = 4
"""A character has at most four bytes in UTF-8, so at most four tokens."""
_MAX_SILENT_TOKENS = 64
"""Tokens without text (special ones) that are kept in view, since decoding again costs time."""


class Detokenizer:
    """Decodes one sequence step by step; the pieces joined equal decoding the whole.

    A decoder may treat the first token of its input apart (a leading space, for one). So new
    tokens are decoded behind the ones before them, and only what is new is given out.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._shown = 0
        """Tokens at the window's head whose text has been given out."""

    def push(self, id_: int) -> str:
        """Take one more id. Returns the text that is certain now, maybe none."""
        self._window.append(id_)
        text = self._new_text(len(self._window))
        if not text.endswith(_BROKEN):
            return self._show(len(self._window), text)
        certain = len(self._window) - (_MAX_CHARACTER_TOKENS - 1)
        if certain <= self._shown + _MAX_CHARACTER_TOKENS:
            return ""
        return self._show(certain, self._new_text(certain))

    def flush(self) -> str:
        """The rest, at the end of the sequence: half a character shows as U+FFFD."""
        return self._show(len(self._window), self._new_text(len(self._window)))

    def _new_text(self, end: int) -> str:
        before = self._decode(self._window[: self._shown])
        return self._decode(self._window[:end])[len(before) :]

    def _show(self, end: int, text: str) -> str:
        if text or end - self._shown > _MAX_SILENT_TOKENS:
            self._window = self._window[self._shown :]
            self._shown = end - self._shown
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""


class StopWatch:
    """Cuts text at the first stop string, and holds back what might become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [_Stop(each) for each in stops]
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take more text. Returns what may be shown, and whether a stop string was met."""
        if not self._stops:
            return text, False
        buffer = self._held + text
        for at, character in enumerate(text, start=len(self._held) + 1):
            lengths = [each.length for each in self._stops if each.push(character)]
            if lengths:
                self._held = ""
                return buffer[: at - max(lengths)], True
        cut = len(buffer) - max(each.matched for each in self._stops)
        self._held = buffer[cut:]
        return buffer[:cut], False

    def flush(self) -> str:
        """What was held back, once nothing more will come."""
        held, self._held = self._held, ""
        return held


class _Stop:
    """One stop string, matched character by character.

    Knuth, Morris and Pratt 1977, "Fast pattern matching in strings": `matched` is the longest
    beginning of the stop string that the text so far ends with.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self.length = len(text)
        self.matched = 0
        self._shorter = [0] * len(text)
        for at in range(1, len(text)):
            self._shorter[at] = self._advance(self._shorter[at - 1], text[at])

    def push(self, character: str) -> bool:
        """Returns whether the text now ends with the whole stop string."""
        self.matched = self._advance(self.matched, character)
        return self.matched == self.length

    def _advance(self, matched: int, character: str) -> int:
        while matched and (matched == self.length or self._text[matched] != character):
            matched = self._shorter[matched - 1]
        return matched + (self._text[matched] == character)

"""A tokenizer as the renderer needs it: pieces of one text, tokenised apart from each other."""

from collections.abc import Iterable, Mapping
from functools import cached_property

from tokenizers import Tokenizer

from tunesmith.data.tokens import BreakingTold, TokenizerFiles

_MAX_ANCHORS = 4096


class Vocabulary:
    """Ids of texts, and which special tokens a text begins and ends with."""

    def __init__(self, files: TokenizerFiles) -> None:
        self.tokenizer: Tokenizer = files.tokenizer
        self.bos_id = self.id_of(files.specials.get("bos_token"))
        self.eos_id = self.id_of(files.specials.get("eos_token"))
        if self.eos_id is None and files.stop_ids:
            self.eos_id = min(files.stop_ids)
        self.stop_ids = files.stop_ids | ({self.eos_id} if self.eos_id is not None else set())
        self.stop_tokens = self._tokens(self.stop_ids)
        """Those that the model's own files name."""
        self._swallows = self._specials()
        self._sizes = sorted({len(token) for token in self._swallows}, reverse=True)
        self._anchors: dict[str, list[int]] = {}
        self.prefix = self._found_prefix()
        """What the tokenizer puts before a text."""

    def id_of(self, token: str | None) -> int | None:
        return None if token is None else self.tokenizer.token_to_id(token)

    @cached_property
    def eos(self) -> str:
        """The end token as text, empty where the model has none."""
        return (self.tokenizer.id_to_token(self.eos_id) or "") if self.eos_id is not None else ""

    def ids(self, text: str) -> list[int]:
        with BreakingTold():
            found: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """The characters that each token covers."""
        found: list[tuple[int, int]]
        with BreakingTold():
            found = self.tokenizer.encode(text, add_special_tokens=False).offsets
        return found

    def many(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """The ids of many texts at once, for `follow`; none where each needs an anchor."""
        if self.adds_space:
            return {}
        unique = list(dict.fromkeys(texts))
        with BreakingTold():
            found = self.tokenizer.encode_batch_fast(unique, add_special_tokens=False)
        return {text: each.ids for text, each in zip(unique, found, strict=True)}

    def follow(self, before: str, text: str, known: Mapping[str, list[int]]) -> list[int]:
        """The ids of `text` standing after `before`, which is tokenised apart.

        Some tokenizers put a space before the first word they see. That is not wanted here, so
        such a text is tokenised behind an anchor, which is then taken off.
        """
        token = self._token_before(before)
        if token and self._swallows[token]:
            text = text.lstrip()
        if text in known:
            return known[text]
        if not text or not before or not self.adds_space:
            return self.ids(text)
        for anchor in [token] if token else [before[-1:], "\n", ".", "a"]:
            start = self._anchor(anchor)
            both = self.ids(anchor + text)
            if start and both[: len(start)] == start:
                return both[len(start) :]
        return self.ids(text)

    def token_at(self, text: str, at: int) -> str:
        """The special token that stands at a place in a text, or nothing."""
        for size in self._sizes:
            if (token := text[at : at + size]) in self._swallows:
                return token
        return ""

    def token_at_end(self, text: str) -> str:
        for size in self._sizes:
            if (token := text[-size:]) in self._swallows:
                return token
        return ""

    def is_hollow(self, text: str) -> bool:
        """Nothing but special tokens and blanks."""
        text = text.lstrip()
        while token := self.token_at(text, 0):
            text = text[len(token) :].lstrip()
        return not text

    @cached_property
    def adds_space(self) -> bool:
        line = self.ids("\n")
        return any(self.ids("\n" + text) != line + self.ids(text) for text in ("a", "한", "7"))

    def _token_before(self, text: str) -> str:
        """What a text ends with, blanks aside where that token swallows them."""
        token = self.token_at_end(text)
        if token or not text[-1:].isspace():
            return token
        token = self.token_at_end(text.rstrip())
        return token if token and self._swallows[token] else ""

    def _anchor(self, text: str) -> list[int]:
        if text not in self._anchors and len(self._anchors) < _MAX_ANCHORS:
            self._anchors[text] = self.ids(text)
        return self._anchors.get(text) or self.ids(text)

    def _specials(self) -> dict[str, bool]:
        """The special tokens, and whether each swallows the blanks after it."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        found = {token.content: token.rstrip for token in added if token.special and token.content}
        return dict.fromkeys(self.stop_tokens, False) | found

    def _tokens(self, ids: Iterable[int]) -> tuple[str, ...]:
        found = [self.tokenizer.id_to_token(each) for each in sorted(ids)]
        return tuple(token for token in found if token)

    def _found_prefix(self) -> list[int]:
        bare = self.ids("a")
        with BreakingTold():
            full: list[int] = self.tokenizer.encode("a", add_special_tokens=True).ids
        for at in range(len(full) - len(bare) + 1):
            if full[at : at + len(bare)] == bare:
                return full[:at]
        return []

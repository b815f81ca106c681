"""What a token reads by itself: text, or bytes where it is a part of a character."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, slots=True)
class Spelled:
    text: str
    is_bytes: bool = False
    """No whole characters: `text` is `\\xed\\x95`, each byte as Python writes it."""


class Speller:
    """Reads the tokens of one tokenizer, one by one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        decoder = tokenizer.decoder
        self._kinds = set() if decoder is None else _kinds(json.loads(decoder.__getstate__()))

    def spell(self, ids: Iterable[int]) -> list[Spelled]:
        known: dict[int, Spelled] = {}
        return [known.get(each) or known.setdefault(each, self._spelled(each)) for each in ids]

    def _spelled(self, token_id: int) -> Spelled:
        raw = self._bytes(token_id)
        try:
            return Spelled(raw.decode())
        except UnicodeDecodeError:
            return Spelled("".join(f"\\x{byte:02x}" for byte in raw), is_bytes=True)

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return f"<{token_id}>".encode()
        if "ByteLevel" in self._kinds:
            return b"".join(_ALPHABET.get(sign) or sign.encode() for sign in piece)
        found = _BYTE.fullmatch(piece) if "ByteFallback" in self._kinds else None
        if found:
            return bytes([int(found[1], 16)])
        if self._kinds & {"Metaspace", "Replace"}:
            piece = piece.replace("▁", " ")
        return str(piece).encode("utf-8", "replace")


def _kinds(part: Any) -> set[str]:
    """The types of a decoder and of those inside it."""
    if not isinstance(part, dict):
        return set()
    inner = [_kinds(each) for each in part.get("decoders") or ()]
    return {str(part.get("type"))}.union(*inner)


def _alphabet() -> dict[str, bytes]:
    """Byte-level tokenizers write each byte as a sign: itself where it can be seen in Latin-1,
    else the next free one from U+0100 on.
    """
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in seen]
    signs = {chr(byte): bytes([byte]) for byte in seen}
    return signs | {chr(0x100 + at): bytes([byte]) for at, byte in enumerate(hidden)}


_ALPHABET = _alphabet()

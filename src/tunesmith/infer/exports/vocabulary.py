"""A tokenizer as GGUF holds it, so that llama.cpp finds the same ids.

Of its kinds two are written: byte-level BPE (`gpt2`, with the name of how a text is cut first), and
BPE of SentencePiece by scores (`llama`), which knows no rewriting of texts.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import gguf

from tunesmith.data.render import Renderer
from tunesmith.errors import BadRequestError

_NORMAL, _UNKNOWN, _CONTROL, _DEFINED, _UNUSED, _BYTE = range(1, 7)
_BLANK = "▁"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS = {
    f"{_CONTRACTIONS}|[^\\r\\n\\p{{L}}\\p{{N}}]?\\p{{L}}+|\\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    f"{_CONTRACTIONS}|[^\\r\\n\\p{{L}}\\p{{N}}]?\\p{{L}}+|\\p{{N}}{_REST}": "qwen2",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt-2",
}
"""llama.cpp's names of how a text is cut, by the expression that cuts it in tokenizer.json."""


@dataclass
class Vocabulary:
    model: str
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    pre: str = "default"
    has_blank_before: bool = False


def write(writer: gguf.GGUFWriter, renderer: Renderer, size: int) -> None:
    """`size`: rows of the embedding. Raises BadRequestError for a tokenizer that GGUF cannot
    hold."""
    told = json.loads(renderer.tokenizer.to_str())
    found = _read(told)
    _fill(found, told, size)
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.scores:
        writer.add_token_scores(found.scores)
    if found.merges:
        writer.add_token_merges(found.merges)
    if found.model != "gpt2":
        writer.add_add_space_prefix(found.has_blank_before)
    _write_specials(writer, renderer)


def _write_specials(writer: gguf.GGUFWriter, renderer: Renderer) -> None:
    prefix = renderer.encode_text("")
    has_bos = renderer.bos_token_id is not None and prefix[:1] == [renderer.bos_token_id]
    if renderer.bos_token_id is not None:
        writer.add_bos_token_id(renderer.bos_token_id)
    if renderer.eos_token_id is not None:
        writer.add_eos_token_id(renderer.eos_token_id)
    if renderer.pad_token_id is not None:
        writer.add_pad_token_id(renderer.pad_token_id)
    closing = sorted(renderer.stop_ids - {renderer.eos_token_id})
    if closing:
        writer.add_eot_token_id(closing[0])
    writer.add_add_bos_token(has_bos)
    writer.add_add_eos_token(False)
    if renderer.template:
        writer.add_chat_template(renderer.template)


def _read(told: dict[str, Any]) -> Vocabulary:
    model = told["model"]
    if model["type"] != "BPE":
        raise _unheld(
            f"a tokenizer of type {model['type']}: of byte-level BPE and of SentencePiece's"
        )
    return _pieces(told) if model.get("byte_fallback") else _byte_level(told)


def _byte_level(told: dict[str, Any]) -> Vocabulary:
    model = told["model"]
    found = Vocabulary("gpt2", pre=_cut(told.get("pre_tokenizer")))
    _name(found, model["vocab"])
    found.merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    return found


def _cut(pre: dict[str, Any] | None) -> str:
    parts = [] if pre is None else pre.get("pretokenizers", [pre])
    kinds = [one["type"] for one in parts]
    if kinds and kinds[-1] == "ByteLevel" and not parts[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
            pattern = parts[0]["pattern"].get("Regex")
            if pattern in _CUTS:
                return _CUTS[pattern]
        if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
            return "smollm"
    raise _unheld(f"a tokenizer that cuts texts by {', '.join(kinds) or 'nothing'} in its own way")


def _pieces(told: dict[str, Any]) -> Vocabulary:
    """The later a pair is merged, the lower the score of what it becomes."""
    model = told["model"]
    if any(one["type"] not in ("Prepend", "Replace") for one in _normalizers(told)):
        raise _unheld("a tokenizer of SentencePiece that rewrites texts first")
    found = Vocabulary("llama", has_blank_before=_has_blank_before(told))
    _name(found, model["vocab"])
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        ranks.setdefault(left + right, rank)
    found.scores = [-float(ranks.get(one, len(ranks))) for one in found.tokens]
    _mark_bytes(found, model.get("unk_token"))
    return found


def _name(found: Vocabulary, vocabulary: dict[str, int]) -> None:
    size = max(vocabulary.values(), default=-1) + 1
    found.tokens, found.types = [""] * size, [_UNUSED] * size
    for token, id_ in vocabulary.items():
        found.tokens[id_], found.types[id_] = token, _NORMAL


def _mark_bytes(found: Vocabulary, unknown: str | None) -> None:
    for at, token in enumerate(found.tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            found.types[at] = _BYTE
        elif unknown is not None and token == unknown:
            found.types[at] = _UNKNOWN


def _fill(found: Vocabulary, told: dict[str, Any], size: int) -> None:
    """Added tokens, and names for rows that have none: each has to be another."""
    for one in told["added_tokens"]:
        at = one["id"]
        _grow(found, at + 1)
        is_unknown = found.types[at] == _UNKNOWN
        kind = _CONTROL if one["special"] else _DEFINED
        found.tokens[at], found.types[at] = one["content"], _UNKNOWN if is_unknown else kind
    if len(found.tokens) > size:
        raise _unheld(f"{len(found.tokens)} tokens over an embedding of {size} rows")
    _grow(found, size)
    for at, token in enumerate(found.tokens):
        if not token:
            found.tokens[at], found.types[at] = f"[PAD{at}]", _UNUSED


def _grow(found: Vocabulary, size: int) -> None:
    more = size - len(found.tokens)
    if more > 0:
        found.tokens += [""] * more
        found.types += [_UNUSED] * more
    if found.scores:
        found.scores += [-1e9] * (len(found.tokens) - len(found.scores))


def _normalizers(told: dict[str, Any]) -> list[dict[str, Any]]:
    whole = told.get("normalizer")
    return [] if whole is None else list(whole.get("normalizers", [whole]))


def _has_blank_before(told: dict[str, Any]) -> bool:
    pre = told.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers", [pre])
    prepends = any(one["type"] == "Prepend" for one in _normalizers(told))
    schemes = [
        one.get("prepend_scheme", "always") for one in parts if one.get("type") == "Metaspace"
    ]
    return prepends or any(one != "never" for one in schemes)


def _unheld(what: str) -> BadRequestError:
    return BadRequestError(f"GGUF cannot hold {what}; export it as safetensors")

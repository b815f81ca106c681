"""A model folder's tokenizer files, read as transformers reads them but without it.

Only tokenizer.json (the `tokenizers` library) is taken: no pickle, no code, no conversion.
"""

import base64
import binascii
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken, Tokenizer

from tunesmith.errors import ValidationError

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
"""What is copied with a model, bit for bit, where it is there."""
TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
_MAX_JSON = 256 << 20
MOST_GROWTH = 32
"""Times as long as it was a text may become by what is replaced in it, beside what Unicode's own
forms do."""
MOST_ADDED = 1 << 20
"""Characters of tokens that are added to a vocabulary: the library looks for all of them at once,
which takes it long to make ready, and no other thread runs meanwhile."""
_LONGEST_FORM = 33
"""Bytes that Unicode's compatibility forms make of a character, at most."""
_SLOW = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")


class TokenizerFault(ValidationError):
    """A model folder whose tokenizer is missing or cannot be read."""

    error_code = "tokenizer"


class BreakingTold:
    """Around the library's calls: it panics on some damaged tables, outside of Exception, and
    raises a bare Exception for a text that it has no tokens for. Raises TokenizerFault then."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is Exception or (kind is not None and kind.__name__ == "PanicException"):
            raise TokenizerFault(f"the tokenizer breaks on a text: {str(error)[:200]}") from None


@dataclass(frozen=True)
class TokenizerFiles:
    tokenizer: Tokenizer
    raw: bytes
    """tokenizer.json, for its digest."""
    specials: Mapping[str, str]
    """`bos_token`, `eos_token`, …: what a chat template is told."""
    templates: Mapping[str, str]
    """By name; `default` is the usual one, `tool_use` the one for requests with tools."""
    stop_ids: frozenset[int]
    """What generation_config.json and config.json name."""


def read(folder: Path) -> TokenizerFiles:
    """Raises TokenizerFault with what is missing and how to make it."""
    if not folder.is_dir():
        raise TokenizerFault(f"{folder.name}: no such model folder")
    raw = _tokenizer_json(folder)
    config = _json(folder / "tokenizer_config.json")
    tokenizer = _built(folder, raw)
    legacy = {} if "added_tokens_decoder" in config else _json(folder / "special_tokens_map.json")
    specials = _specials(config | legacy)
    _add_missing(tokenizer, config, specials)
    model, generation = _json(folder / "config.json"), _json(folder / "generation_config.json")
    if "eos_token" not in config:
        _fill_eos(tokenizer, specials, (generation, model))
    stops = _ids(generation.get("eos_token_id")) or _ids(model.get("eos_token_id"))
    return TokenizerFiles(tokenizer, raw, specials, _templates(folder, config), stops)


def _tokenizer_json(folder: Path) -> bytes:
    path = folder / "tokenizer.json"
    try:
        if path.stat().st_size > _MAX_JSON:
            raise TokenizerFault(f"{folder.name}: tokenizer.json is over {_MAX_JSON >> 20} MB")
        return path.read_bytes()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise TokenizerFault(f"{folder.name}: tokenizer.json: {error.strerror}") from None
    slow = [name for name in _SLOW if (folder / name).exists()]
    if slow:
        raise TokenizerFault(
            f"{folder.name} has {slow[0]} but no tokenizer.json; make one with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    raise TokenizerFault(f"{folder.name} has no tokenizer: there is no tokenizer.json in it")


def _built(folder: Path, raw: bytes) -> Tokenizer:
    refuse_many(_added(raw))
    try:
        tokenizer = Tokenizer.from_buffer(raw)
    except BaseException as error:  # the library raises bare Exception, or panics
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        reason = str(error)[:200]
        raise TokenizerFault(f"{folder.name}: tokenizer.json cannot be read: {reason}") from None
    growth = max(_growth(tokenizer.normalizer), _growth(tokenizer.decoder))
    if growth > MOST_GROWTH:
        raise TokenizerFault(
            f"{folder.name}: tokenizer.json makes texts up to {growth:,.0f} times as long by what "
            f"it replaces; {MOST_GROWTH} times is the limit"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class _Token(msgspec.Struct):
    content: str = ""


class _Head(msgspec.Struct):
    added_tokens: list[_Token] = []


def _added(raw: bytes) -> list[str]:
    """Of tokenizer.json; none where it is no such file, which the library tells best."""
    try:
        return [token.content for token in msgspec.json.decode(raw, type=_Head).added_tokens]
    except (ValueError, RecursionError):
        return []


def refuse_many(added: Iterable[str]) -> None:
    """Raises TokenizerFault."""
    if sum(map(len, added)) > MOST_ADDED:
        raise TokenizerFault(
            f"the tokens added to the vocabulary have over {MOST_ADDED:,} characters in all"
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
        json.dumps(value, ensure_ascii=False).encode()  # no halves of surrogate pairs
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerFault(f"{path.parent.name}: {path.name} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerFault(f"{path.parent.name}: {path.name} is no JSON object")
    return value


def _specials(config: Mapping[str, Any]) -> dict[str, str]:
    extra = config.get("extra_special_tokens")
    named = dict(config) | (extra if isinstance(extra, dict) else {})
    found = {}
    for name, value in named.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _add_missing(tokenizer: Tokenizer, config: Mapping[str, Any], specials: dict[str, str]) -> None:
    """Tokens that only the configuration names; ids are as transformers gives them."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder")
    rows = listed if isinstance(listed, dict) else {}
    try:
        ordered = sorted(rows.items(), key=lambda item: int(item[0]))
        tokens = [AddedToken(**row) for _, row in ordered if row.get("content") not in known]
    except (TypeError, ValueError, AttributeError):
        raise TokenizerFault("tokenizer_config.json: added_tokens_decoder cannot be read") from None
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    names = list(specials.values()) + [
        each.get("content") if isinstance(each, dict) else each
        for each in (more if isinstance(more, list) else ())
    ]
    known |= {token.content for token in tokens}
    for name in dict.fromkeys(names):
        if isinstance(name, str) and name not in known:
            tokens.append(AddedToken(name, special=True, normalized=False))
    if tokens:
        refuse_many(token.content for token in tokens)
        tokenizer.add_tokens(tokens)


def _fill_eos(
    tokenizer: Tokenizer, specials: dict[str, str], configs: tuple[dict[str, Any], ...]
) -> None:
    """A tokenizer whose class knew its end token by heart: the model's configuration knows it."""
    for config in configs:
        for token_id in sorted(_ids(config.get("eos_token_id"))):
            token = tokenizer.id_to_token(token_id)
            if token is not None:
                specials.setdefault("eos_token", token)


def _ids(value: Any) -> frozenset[int]:
    many = value if isinstance(value, list) else [value]
    return frozenset(
        each for each in many if isinstance(each, int) and not isinstance(each, bool) and each >= 0
    )


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    if (folder / TEMPLATE_FILE).is_file():
        found["default"] = _text(folder / TEMPLATE_FILE)
    for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja")):
        found[path.stem] = _text(path)
    return found or _listed(config.get("chat_template"))


def _listed(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    if not isinstance(value, list):
        return {}
    return {
        each["name"]: each["template"]
        for each in value
        if isinstance(each, dict)
        and isinstance(each.get("name"), str)
        and isinstance(each.get("template"), str)
    }


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > 1 << 22:
            raise TokenizerFault(f"{path.parent.name}: {path.name} is too long")
        with path.open(encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerFault(f"{path.parent.name}: {path.name} cannot be read: {error}") from None


def most_per_byte(tokenizer: Tokenizer) -> int:
    """How many ids one byte of text can become at most, by what is rewritten before the model.

    Every model gives at most one id a byte of what it is handed. Normalizers hand it more:
    compatibility forms up to 18 times as much, a blank written as "▁" three times.
    """
    parts = [part for part in (tokenizer.normalizer, tokenizer.pre_tokenizer) if part is not None]
    names = set().union(*(_types(json.loads(part.__getstate__())) for part in parts))
    if names & {"NFKC", "NFKD", "Precompiled", "Nmt"}:
        return 18
    return 1 if names <= {"ByteLevel", "Split", "Digits", "Sequence", "Punctuation"} else 3


def _growth(part: Any) -> float:
    """By what a normalizer, or a decoder, replaces."""
    if part is None:
        return 1.0
    return min(1e12, prod(map(_grown, _steps(json.loads(part.__getstate__())))))


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    if isinstance(part, dict):
        yield part
        for one in part.get("normalizers") or part.get("decoders") or ():
            yield from _steps(one)


def _grown(step: Mapping[str, Any]) -> float:
    added = len(str(step.get("content", step.get("prepend", ""))).encode())
    match step.get("type"):
        case "Replace":
            words = step.get("pattern")
            text = words.get("String") if isinstance(words, dict) else None
            # an expression, and an empty text, may be found between any two letters
            return max(1.0, added / len(text.encode())) if text else 1.0 + added
        case "Prepend":
            return max(1.0, added / 8)
        case "Precompiled":
            return max(1.0, _longest_form(step.get("precompiled_charsmap")) / _LONGEST_FORM)
    return 1.0


def _longest_form(charsmap: Any) -> int:
    """Bytes that a table of SentencePiece's makes of a character: a trie with its size before it,
    then the forms, each with a NUL at its end."""
    try:
        body = base64.b64decode(charsmap)
    except (TypeError, ValueError, binascii.Error):
        return 0
    forms = body[4 + int.from_bytes(body[:4], "little") :]
    return max(map(len, forms.split(b"\0")))


def _types(part: Any) -> set[str]:
    if isinstance(part, list):
        return set().union(*map(_types, part))
    if not isinstance(part, dict):
        return set()
    inner = part.get("normalizers") or part.get("pretokenizers") or ()
    return {str(part.get("type"))} | _types(list(inner))

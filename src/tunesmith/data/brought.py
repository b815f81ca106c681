"""A tokenizer that a training brings along, apart from its model: packed to one file, and back.

It is a folder with `tokenizer.json`, that file by itself, or a SentencePiece model. Packed it is a
JSON object of file names and texts, so that it can be kept, fetched and named by its digest as a
data set is; unpacked it is a folder as a model's, without a model.
"""

import base64
import binascii
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
from tokenizers import Tokenizer

from tunesmith.data import sentencepiece, tokens
from tunesmith.data.render import Renderer
from tunesmith.data.sentencepiece import NoModel
from tunesmith.data.tokens import TokenizerFault
from tunesmith.data.vocabulary import Vocabulary

SUFFIX = ".tokenizer"
"""Of a packed one."""
MAX_BYTES = 128 << 20
"""Packed, which is a third more than its files."""
MAX_TEMPLATES = 32
_JSON, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_MODELS = ("tokenizer.model", "spiece.model")
_ENDS = (
    *("</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<eos>", "<|eot_id|>", "<|end|>"),
    *("[EOS]", "<end_of_text>"),
)
"""What ends a text, in tokenizers that come without a word on it."""
_SHAPES = "a folder with tokenizer.json, a tokenizer.json, or a SentencePiece .model"


def pack(path: Path, name: str, *, follows_links: bool = False) -> bytes:
    """What lies at a path, as one file; `name` is what it was called.

    Raises TokenizerFault with what is wrong.
    """
    try:
        found = _collected(path, follows_links)
        files = found if _JSON in found else _converted(found)
        _check(files)
    except NoModel as error:
        raise TokenizerFault(f"{name} cannot be read as SentencePiece: {error}") from None
    except TokenizerFault as fault:
        raise TokenizerFault(f"{name}: {fault.message}") from None
    told = {one: base64.b64encode(body).decode() for one, body in files.items()}
    packed = msgspec.json.encode(told, order="sorted")
    if len(packed) > MAX_BYTES:
        raise TokenizerFault(f"{name} is over {MAX_BYTES >> 20} MB")
    return packed


def unpack(packed: Path, folder: Path) -> Path:
    """Write its files, each whole or not at all: several processes may do so. Returns `folder`."""
    for name, body in _read(packed).items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f".{place.name}.{os.getpid()}.part")
        part.write_bytes(body)
        os.replace(part, place)
    return folder


def renderer(packed: Path) -> Renderer:
    """To look at rows with, where nothing is to be saved. Raises ValidationError."""
    with TemporaryDirectory() as folder:
        return Renderer.load(unpack(packed, Path(folder)))


def load(path: Path, name: str, *, follows_links: bool = False) -> Renderer:
    """Of one that is not packed yet. Raises ValidationError."""
    with TemporaryDirectory() as folder:
        packed = Path(folder) / f"one{SUFFIX}"
        packed.write_bytes(pack(path, name, follows_links=follows_links))
        return renderer(packed)


def refuse_larger(vocabulary: int, room: int, name: str, *, is_new: bool) -> None:
    """Raises TokenizerFault where a model has no place for all ids; `room` 0 is unknown."""
    if not room or vocabulary <= room:
        return
    right = f"set vocab_size in the model's config.json to {vocabulary} or more"
    if not is_new:
        right = f"use one of at most {room:,} tokens, or ask for from_scratch: true, and {right}"
    raise TokenizerFault(
        f"{name} has {vocabulary:,} tokens, and the model has room for {room:,}; {right}"
    )


def _collected(path: Path, follows_links: bool) -> dict[str, bytes]:
    if not path.is_dir():
        is_model = path.suffix == ".model"
        if not is_model and path.suffix != ".json":
            raise TokenizerFault(f"it is no tokenizer; give {_SHAPES}")
        return {_MODELS[0] if is_model else _JSON: _bytes(path, follows_links)}
    more = path / tokens.MORE_TEMPLATES
    if more.is_symlink() and not follows_links:
        raise TokenizerFault(f"{more.name} is a link to elsewhere; put the folder itself there")
    inner = sorted(more.glob("*.jinja"))[:MAX_TEMPLATES]
    places = [path / name for name in (*tokens.FILES, tokens.TEMPLATE_FILE)]
    found: dict[str, bytes] = {}
    room = MAX_BYTES * 3 // 4
    for place in (one for one in (*places, *inner) if one.exists()):
        body = found[place.relative_to(path).as_posix()] = _bytes(place, follows_links, room)
        room -= len(body)
    return found


def _bytes(path: Path, follows_links: bool, room: int = MAX_BYTES * 3 // 4) -> bytes:
    """Of a regular file; opening never hangs on a pipe."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follows_links else os.O_NOFOLLOW)
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise TokenizerFault(f"{path.name} is not a regular file")
            body = file.read(room + 1)
    except OSError as error:
        raise TokenizerFault(f"{path.name} cannot be read ({error.strerror})") from None
    if len(body) > room:
        raise TokenizerFault(f"its files are over {MAX_BYTES * 3 // 4 >> 20} MB")
    return body


def _converted(found: Mapping[str, bytes]) -> dict[str, bytes]:
    """With the tokenizer.json that says what its SentencePiece model says. Raises NoModel."""
    name = next((one for one in _MODELS if one in found), None)
    if name is None:
        raise TokenizerFault(f"there is no tokenizer in it; give {_SHAPES}")
    model = sentencepiece.read(found[name])
    body = sentencepiece.convert(model).to_str()
    config = {**model.specials, **_object(found.get(_CONFIG)), **_PLAIN}
    return {**found, _JSON: body.encode(), _CONFIG: _lines(config)}


_PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
"""Have transformers take tokenizer.json as it stands."""


def _check(files: dict[str, bytes]) -> None:
    """That it can be used; names what ends a text, where no file of it does."""
    config = _object(files.get(_CONFIG))
    if "auto_map" in config:
        raise TokenizerFault("it wants to run code of its own (auto_map), which is never run")
    with TemporaryDirectory() as folder:
        _lay_out(files, Path(folder))
        try:
            read = tokens.read(Path(folder))
            Vocabulary(read)
        except TokenizerFault as fault:
            told = fault.message.removeprefix(f"{Path(folder).name}: ")
            raise TokenizerFault(told) from None
    if "eos_token" not in read.specials:
        end = _end_of(read.tokenizer)
        files[_CONFIG] = _lines(_PLAIN | config | ({"eos_token": end} if end else {}))


def _end_of(tokenizer: Tokenizer) -> str | None:
    added = tokenizer.get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special}
    return next((end for end in _ENDS if end in special), None)


def _lay_out(files: Mapping[str, bytes], folder: Path) -> None:
    for name, body in files.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(body)


def _read(packed: Path) -> dict[str, bytes]:
    try:
        if packed.stat().st_size > MAX_BYTES:
            raise ValueError("too large")
        found = msgspec.json.decode(packed.read_bytes(), type=dict[str, str])
        return {_name(name): base64.b64decode(text, validate=True) for name, text in found.items()}
    except (OSError, ValueError, binascii.Error) as error:
        raise TokenizerFault(f"the tokenizer cannot be read: {error}") from None


def _name(name: str) -> str:
    """Raises ValueError for a file that no tokenizer has."""
    inner, _, last = name.rpartition("/")
    is_template = inner == tokens.MORE_TEMPLATES and last.endswith(".jinja")
    if name not in (*tokens.FILES, tokens.TEMPLATE_FILE) and not is_template:
        raise ValueError(f"a file called {name[:80]!r}")
    return name


def _object(body: bytes | None) -> dict[str, Any]:
    if body is None:
        return {}
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise TokenizerFault(f"{_CONFIG} cannot be read as JSON") from None
    if not isinstance(found, dict):
        raise TokenizerFault(f"{_CONFIG} is no JSON object")
    return found


def _lines(config: Mapping[str, Any]) -> bytes:
    return json.dumps(config, ensure_ascii=False, indent=1, sort_keys=True).encode()

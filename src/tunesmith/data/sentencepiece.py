"""A SentencePiece model (`tokenizer.model`) as a tokenizer of the `tokenizers` library.

The file is a protocol buffer and a stranger's: it is read here, field by field, with bounds, and
no code of another library sees it before it was found to be sound. Ids are SentencePiece's own.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tunesmith.data.tokens import TokenizerFault, refuse_many

MAX_BYTES = 32 << 20
MAX_PIECES = 1 << 20
MAX_PIECE_LENGTH = 512
"""Characters; the trainer of SentencePiece makes 16 of them at most, unless told otherwise."""
MAX_CUTS = 16 << 20
"""Places at which pieces can be cut in two, in all."""
_SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _DEFINED, _UNUSED, _BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2
_KINDS = {3: "word", 4: "char"}

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_Value = int | bytes


class NoModel(ValueError):
    """What is wrong with the file, in a few words."""


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    score: float
    kind: int


@dataclass
class SentencePiece:
    """What a model's file says."""

    pieces: list[Piece] = field(default_factory=list)
    algorithm: int = _UNIGRAM
    has_bytes: bool = False
    """Characters without a piece become their bytes."""
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    charsmap: bytes = b""
    """How characters are rewritten, compiled."""
    has_prefix: bool = True
    """A text is read as if a blank stood before it."""
    trims: bool = True
    """Blanks at the ends go, and of several in a row all but one."""

    @property
    def specials(self) -> dict[str, str]:
        """By the names of the field: `bos_token` and so on."""
        ids = {"bos": self.bos_id, "eos": self.eos_id, "unk": self.unk_id, "pad": self.pad_id}
        own = {name: self.pieces[at] for name, at in ids.items() if 0 <= at < len(self.pieces)}
        kinds = (_CONTROL, _UNKNOWN)
        return {f"{name}_token": one.text for name, one in own.items() if one.kind in kinds}


def read(body: bytes) -> SentencePiece:
    """Raises NoModel."""
    if len(body) > MAX_BYTES:
        raise NoModel(f"it is over {MAX_BYTES >> 20} MB")
    found = SentencePiece()
    for number, value in _fields(body):
        if number == _PIECES:
            if len(found.pieces) >= MAX_PIECES:
                raise NoModel(f"it has over {MAX_PIECES:,} pieces")
            found.pieces.append(_piece(_bytes(value)))
        elif number == _TRAINER:
            _take_trainer(found, _bytes(value))
        elif number == _NORMALIZER:
            _take_normalizer(found, _bytes(value))
    _check(found)
    return found


def convert(model: SentencePiece) -> Tokenizer:
    """Raises NoModel where the library does not take it."""
    try:
        tokenizer = Tokenizer(_bpe(model) if model.algorithm == _BPE else _unigram(model))
        tokenizer.normalizer = _normalizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=_SPACE,
            prepend_scheme="first" if model.has_prefix else "never",
            split=not any(_SPACE in piece.text[1:] for piece in model.pieces),
        )
        tokenizer.decoder = _decoder(model)
        added = [piece for piece in model.pieces if piece.kind in (_CONTROL, _DEFINED)]
        refuse_many(piece.text for piece in added)
        tokenizer.add_tokens(
            [
                AddedToken(piece.text, normalized=False, special=piece.kind == _CONTROL)
                for piece in added
            ]
        )
        tokenizer.encode("a 한\n")
    except NoModel:
        raise
    except TokenizerFault as fault:
        raise NoModel(fault.message) from None
    except BaseException as error:  # the library panics on some tables, outside of Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise NoModel(f"it cannot be used: {str(error)[:200]}") from None
    return tokenizer


def _unigram(model: SentencePiece) -> models.Unigram:
    vocabulary = [(piece.text, piece.score) for piece in model.pieces]
    return models.Unigram(vocabulary, model.unk_id, model.has_bytes)


def _bpe(model: SentencePiece) -> models.BPE:
    return models.BPE(
        vocab={piece.text: at for at, piece in enumerate(model.pieces)},
        merges=_merges(model),
        unk_token=model.pieces[model.unk_id].text,
        fuse_unk=True,
        byte_fallback=model.has_bytes,
    )


def _merges(model: SentencePiece) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose piece has the highest score; here a list of pairs,
    the first of which goes first, says the same."""
    known = {
        piece.text: piece.score
        for piece in model.pieces
        if piece.kind not in (_UNKNOWN, _CONTROL, _BYTE)
    }
    if sum(map(len, known)) > MAX_CUTS:
        raise NoModel("its pieces are too long")
    ranked = sorted(known, key=lambda text: -known[text])
    return [
        (text[:at], text[at:])
        for text in ranked
        for at in range(1, len(text))
        if text[:at] in known and text[at:] in known
    ]


def _normalizer(model: SentencePiece) -> normalizers.Normalizer:
    """Blanks at a text's beginning become the one that is read before it. What is defined by the
    user stands between texts with ends of their own: those keep them."""
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    is_parted = any(piece.kind == _DEFINED for piece in model.pieces)
    ends = [
        (r"\A +\z", ""),
        (r" +\z", ""),
        (r"\A +", " " if model.has_prefix else ""),
    ]
    if model.trims:
        rules = [*([] if is_parted else ends), (" {2,}", " ")]
    else:
        rules = [(r"\A ", "  ")] if model.has_prefix and not is_parted else []
    steps += [normalizers.Replace(Regex(pattern), text) for pattern, text in rules]
    return normalizers.Sequence(steps)


def _decoder(model: SentencePiece) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, " ")]
    steps += [decoders.ByteFallback()] if model.has_bytes else []
    steps.append(decoders.Fuse())
    steps += [decoders.Strip(" ", 1, 0)] if model.has_prefix else []
    return decoders.Sequence(steps)


def _check(model: SentencePiece) -> None:
    pieces = model.pieces
    if not pieces:
        raise NoModel("there is no piece in it; a SentencePiece model was expected")
    if model.algorithm not in (_UNIGRAM, _BPE):
        kind = _KINDS.get(model.algorithm, "unknown")
        raise NoModel(f"it is of the kind {kind}; unigram and bpe can be used")
    if len({piece.text for piece in pieces}) < len(pieces):
        raise NoModel("it has a piece twice")
    if not 0 <= model.unk_id < len(pieces) or pieces[model.unk_id].kind != _UNKNOWN:
        raise NoModel("it has no piece for what is unknown")


def _piece(body: bytes) -> Piece:
    text, score, kind = "", 0.0, _NORMAL
    for number, value in _fields(body):
        if number == 1:
            text = _text(_bytes(value))
        elif number == 2:
            (score,) = struct.unpack("<f", _bytes(value, 4))
        elif number == 3:
            kind = _number(value)
    if not 0 < len(text) <= MAX_PIECE_LENGTH:
        raise NoModel(f"it has an empty piece, or one of over {MAX_PIECE_LENGTH} characters")
    if not math.isfinite(score) or not _NORMAL <= kind <= _BYTE:
        raise NoModel("it has a piece whose score or kind is none")
    return Piece(text, score, kind)


def _take_trainer(found: SentencePiece, body: bytes) -> None:
    for number, value in _fields(body):
        if number == 3:
            found.algorithm = _number(value)
        elif number == 24 and _number(value):
            raise NoModel("it treats blanks as the ends of words, which cannot be used here")
        elif number == 35:
            found.has_bytes = bool(_number(value))
        elif number in (40, 41, 42, 43):
            name = ("unk_id", "bos_id", "eos_id", "pad_id")[number - 40]
            setattr(found, name, _number(value))


def _take_normalizer(found: SentencePiece, body: bytes) -> None:
    for number, value in _fields(body):
        if number == 2:
            found.charsmap = _bytes(value)
        elif number == 3:
            found.has_prefix = bool(_number(value))
        elif number == 4:
            found.trims = bool(_number(value))
        elif number == 5 and not _number(value):
            raise NoModel("it does not mark blanks, which cannot be used here")


def _fields(body: bytes) -> Iterator[tuple[int, _Value]]:
    """Number and value of each field of a message. Source: protobuf.dev, "Encoding"."""
    at, end = 0, len(body)
    while at < end:
        key, at = _varint(body, at)
        number, wire = key >> 3, key & 7
        value: _Value
        if wire == 0:
            value, at = _varint(body, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            value, at = body[at : at + size], at + size
        elif wire == 2:
            size, at = _varint(body, at)
            value, at = body[at : at + size], at + size
        else:
            raise NoModel("it is no protocol buffer; a SentencePiece model was expected")
        if at > end or not number:
            raise NoModel("it is cut off, or no protocol buffer; a SentencePiece model is one")
        yield number, value


def _varint(body: bytes, at: int) -> tuple[int, int]:
    """A number of at most 64 bits, and the place after it."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(body):
            break
        byte = body[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & 0xFFFFFFFFFFFFFFFF, at
    raise NoModel("it is cut off, or no protocol buffer; a SentencePiece model is one")


def _number(value: _Value) -> int:
    """Of 32 bits, with a sign."""
    if not isinstance(value, int):
        raise NoModel("it has a text where a number should be")
    return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)


def _bytes(value: _Value, size: int | None = None) -> bytes:
    if not isinstance(value, bytes) or size not in (None, len(value)):
        raise NoModel("it has a number where a text should be")
    return value


def _text(body: bytes) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError:
        raise NoModel("it has a piece that is not UTF-8") from None

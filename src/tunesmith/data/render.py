"""Messages → token ids and loss mask: the one way there, for training, preview and serving.

A conversation's text is the chat template's. It is cut where each answer begins and ends (see
`pieces`), and the pieces are tokenised apart. So `prompt_ids` of the history plus what a model
generates are the ids that it was trained on, whatever the tokenizer would merge across that place.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec
from tokenizers import Tokenizer

from tunesmith.data import fallbacks, templates, tokens
from tunesmith.data.pieces import NOTICES, Cutter, Notice, Piece, Tools
from tunesmith.data.row import Row
from tunesmith.data.sandbox import TemplateError
from tunesmith.data.tokens import TokenizerFiles
from tunesmith.data.vocabulary import Vocabulary
from tunesmith.errors import ValidationError
from tunesmith.spec.chat import Message

__all__ = ["NOTICES", "Encoded", "Notice", "Renderer", "TemplateError", "TrainOn"]

TrainOn = Literal["completions", "all"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """`mask[i]`: token i is a label, predicted from those before it."""

    ids: list[int]
    mask: list[bool]
    notice: Notice | None = None


class Renderer:
    """A tokenizer and a chat template; immutable, safe to use from several threads."""

    def __init__(
        self,
        folder: Path,
        files: TokenizerFiles,
        sources: Mapping[str, str],
        now: Callable[[], datetime],
    ) -> None:
        self.folder, self._files, self._sources, self._now = folder, files, dict(sources), now
        self._vocabulary = Vocabulary(files)
        self._cutter = Cutter(self._vocabulary, self._draw)
        self.tokenizer: Tokenizer = files.tokenizer
        self.bos_token_id = self._vocabulary.bos_id
        self.eos_token_id = self._vocabulary.eos_id
        self.pad_token_id = self._vocabulary.id_of(files.specials.get("pad_token"))

    @classmethod
    def load(cls, folder: Path | str, *, now: Callable[[], datetime] = datetime.now) -> "Renderer":
        """From a model's folder. `now` is the clock of templates that write today's date.

        Raises ValidationError for a model with no tokenizer, or one that cannot be read.
        """
        folder = Path(folder)
        files = tokens.read(folder)
        return cls(folder, files, files.templates, now)

    @property
    def template(self) -> str | None:
        return self._sources.get("default")

    @property
    def tool_template(self) -> str | None:
        """The template that is used where tools are given."""
        return self._sources.get("tool_use") or self.template

    @property
    def template_source(self) -> str:
        """`model`; `alpaca`, `chatml` or `plain` for one of ours."""
        return fallbacks.source_of(self.template or "")

    @cached_property
    def vocabulary_size(self) -> int:
        """Rows that a model's embedding has to have: ids may have gaps."""
        return max(self.tokenizer.get_vocab().values(), default=-1) + 1

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """What ends an answer: the model's end tokens and the template's end of turn."""
        closing = self._cutter.end_of_turn() if self.template is not None else ""
        closing_id = self._vocabulary.id_of(closing) if closing else None
        more = frozenset() if closing_id is None else frozenset({closing_id})
        return frozenset(self._vocabulary.stop_ids) | more

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides which ids a row becomes."""
        told = [dict(self._files.specials), self._sources, sorted(self._files.stop_ids)]
        parts = [self._files.raw, *(msgspec.json.encode(each, order="sorted") for each in told)]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()

    @cached_property
    def tokenizer_digest(self) -> str:
        """SHA-256 of the tokenizer's file and end tokens, whatever the template."""
        ends = msgspec.json.encode(sorted(self.stop_ids))
        return hashlib.sha256(self._files.raw + ends).hexdigest()

    @cached_property
    def tokens_per_byte(self) -> int:
        """A bound that holds for every text: ids at most, for each byte of it in UTF-8."""
        return tokens.most_per_byte(self.tokenizer)

    def with_fallback(self, format: str) -> "Renderer":
        """Itself where the model has a template; else one of ours, by the format of the rows."""
        if self.template is not None:
            return self
        known = self._vocabulary.id_of
        has_marks = None not in (known("<|im_start|>"), known("<|im_end|>"))
        kind = "alpaca" if format == "alpaca" else "chatml" if has_marks else "plain"
        bos = self._files.specials.get("bos_token", "")
        has_bos = self.bos_token_id in self._vocabulary.prefix
        source = fallbacks.fallback(kind, bos if has_bos else "", self._vocabulary.eos)
        return Renderer(self.folder, self._files, {"default": source}, self._now)

    def at(self, now: Callable[[], datetime]) -> "Renderer":
        """The same by another clock."""
        return Renderer(self.folder, self._files, self._sources, now)

    def text(
        self, messages: Sequence[Message], tools: Tools = (), add_generation_prompt: bool = False
    ) -> str:
        """What the template makes of a conversation. Raises TemplateError."""
        return self._draw(messages, tools, add_generation_prompt).text

    def unshown(self, messages: Sequence[Message], tools: Tools = ()) -> list[str]:
        """Roles of those whose words the template leaves out; none where it refuses them. Many
        templates show of a message with calls of tools the calls only: that is no fault."""
        told = [at for at, said in enumerate(messages) if said.content and not said.tool_calls]
        marks = {at: f"mark{at}z" for at in told}
        marked = [
            said.model_copy(update={"content": marks[at]}) if at in marks else said
            for at, said in enumerate(messages)
        ]
        try:
            text = self.text(marked, tools).lower()
        except TemplateError:
            return []
        return sorted({messages[at].role for at, mark in marks.items() if mark not in text})

    def shown(self, row: Row) -> str:
        """The text that a row's tokens are made of. Raises as `encode`."""
        pieces, _ = self._pieces(row)
        return "".join(piece.text for piece in pieces)

    def encode(self, row: Row, train_on: TrainOn = "completions") -> Encoded:
        """All ids of a row and which of them are learnt; nothing is cut off.

        Raises TemplateError where the template refuses the row, ValidationError where nothing of
        it can be learnt.
        """
        pieces, notice = self._pieces(row)
        return self._encoded(pieces, train_on, notice)

    def encode_many(
        self, rows: Sequence[Row], train_on: TrainOn = "completions"
    ) -> list[Encoded | ValidationError]:
        """`encode` of each row, or what it raises; faster than one at a time."""
        drawn = [self._tried(row) for row in rows]
        good = [each for each in drawn if not isinstance(each, ValidationError)]
        known = self._vocabulary.many(piece.text for pieces, _ in good for piece in pieces)
        return [
            each
            if isinstance(each, ValidationError)
            else self._encoded(each[0], train_on, each[1], known)
            for each in drawn
        ]

    def prompt_ids(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """What a model is given to answer: the conversation and the generation prompt."""
        return self._encoded(self._cutter.prompt(messages, tools)).ids

    def encode_text(self, text: str, add_special: bool = True) -> list[int]:
        """Plain text; `add_special` puts in front what the tokenizer puts in front (BOS)."""
        ids = self._vocabulary.ids(text)
        return self._vocabulary.prefix + ids if add_special else ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def save(self, folder: Path | str) -> None:
        """Copy the tokenizer's files bit for bit and write down the template in use.

        `AutoTokenizer` of transformers then loads the same tokenizer and template.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in tokens.FILES:
            source = self.folder / name
            if source.is_file() and not _is_same(source, folder / name):
                shutil.copyfile(source, folder / name)
        for name, text in self._sources.items():
            path = folder / tokens.TEMPLATE_FILE
            if name != "default":
                path = folder / tokens.MORE_TEMPLATES / f"{_plain_name(name)}.jinja"
                path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="")

    def _pieces(self, row: Row) -> tuple[list[Piece], Notice | None]:
        if row.messages:
            return self._cutter.row(row)
        if row.text is not None:
            return [Piece("", is_first=True, is_learnt=True), self._told(row.text)], None
        return [Piece(row.prompt or "", is_first=True), self._told(row.completion or "")], None

    def _tried(self, row: Row) -> tuple[list[Piece], Notice | None] | ValidationError:
        try:
            return self._pieces(row)
        except ValidationError as error:
            return error

    def _told(self, text: str) -> Piece:
        """Text outside a template, which the end token closes."""
        eos = self._vocabulary.eos
        return Piece(text, True, True, has_end=bool(eos) and text.endswith(eos))

    def _encoded(
        self,
        pieces: Sequence[Piece],
        train_on: TrainOn = "completions",
        notice: Notice | None = None,
        known: Mapping[str, list[int]] | None = None,
    ) -> Encoded:
        ids: list[int] = []
        mask: list[bool] = []
        before = ""
        for piece in pieces:
            new = self._vocabulary.follow(before, piece.text, known or {})
            labels = self._labels(piece, len(new))
            if piece.is_first:
                new = self._vocabulary.prefix + new
                labels = [piece.is_learnt] * len(new)
            if piece.is_answer and not piece.has_end and self.eos_token_id is not None:
                new, labels = [*new, self.eos_token_id], [*labels, piece.is_learnt]
            ids += new
            mask += labels
            before = piece.text or before
        return Encoded(ids, [True] * len(ids) if train_on == "all" else mask, notice)

    def _labels(self, piece: Piece, size: int) -> list[bool]:
        """By character ranges where the template marks them, closed by the end token."""
        if piece.marks is None or not piece.is_learnt:
            return [piece.is_learnt] * size
        offsets = self._vocabulary.offsets(piece.text)[-size:] if size else []
        labels = [
            any(left < end and right > start for start, end in piece.marks)
            for left, right in offsets
        ]
        if piece.has_end and any(labels):
            labels[-1] = True
        return labels

    def _draw(self, messages: Sequence[Message], tools: Tools, asks: bool) -> templates.Rendered:
        source = self.tool_template if tools else self.template
        if source is None:
            raise TemplateError("this model has no chat template")
        template = templates.compiled(source)
        plain = [_plain(said, "developer" in source) for said in messages]
        return template.render(plain, list(tools) or None, asks, self._files.specials, self._now)


def _plain(said: Message, knows_developer: bool) -> dict[str, Any]:
    """A message as a template sees it: no empty field, tool arguments as an object."""
    role = "system" if said.role == "developer" and not knows_developer else said.role
    plain: dict[str, Any] = {"role": role}
    for name in ("content", "name", "tool_call_id"):
        value = getattr(said, name)
        if value is not None:
            plain[name] = value
    if said.tool_calls is not None:
        plain["tool_calls"] = [_plain_call(call) for call in said.tool_calls]
    return plain


def _plain_call(call: dict[str, Any]) -> dict[str, Any]:
    """OpenAI writes a call's arguments as JSON in a string; templates expect the object."""
    inner = call.get("function")
    if not isinstance(inner, dict) or not isinstance(inner.get("arguments"), str):
        return call
    try:
        value = msgspec.json.decode(inner["arguments"])
    except (msgspec.DecodeError, RecursionError, ValueError):
        return call
    if not isinstance(value, dict):
        return call
    return call | {"function": inner | {"arguments": value}}


def _is_same(left: Path, right: Path) -> bool:
    return right.exists() and left.samefile(right)


def _plain_name(name: str) -> str:
    return "".join(each if each.isalnum() or each in "-_" else "_" for each in name)[:64]

"""What a row, or a packed block, of a data set becomes for a model: by the code that trains."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from tunesmith.data import brought
from tunesmith.data.fit import Cut
from tunesmith.data.preview import MAX_SHOWN, Preview, preview_block, preview_row
from tunesmith.data.reader import find_row
from tunesmith.data.reading import Reading
from tunesmith.data.render import Renderer
from tunesmith.data.rows import RowIndex
from tunesmith.data.sampling import choose
from tunesmith.data.scan import open_regular
from tunesmith.data.tokens import TokenizerFault
from tunesmith.errors import BadRequestError, JobFailure, ValidationError
from tunesmith.hub import tokenizers
from tunesmith.hub.data import refuse_elsewhere, usual_suffix
from tunesmith.hub.folder import ModelFolder
from tunesmith.hub.principal import Principal
from tunesmith.spec.sampling import Sampling
from tunesmith.train.pretrain import BlockSource

if TYPE_CHECKING:
    from tunesmith.hub import Hub

AT_ONCE = 2
"""Each may read a file from its beginning."""
MAX_BLOCK = 1000
"""Blocks are packed one after the other, from the first."""


@dataclass(frozen=True)
class Wanted:
    """Which row, and how it would be trained on. `cut.max_length` as asked for."""

    cut: Cut
    reading: Reading
    method: Literal["sft", "pretrain"] = "sft"
    row: int | None = None
    """From 1; for pretraining, the number of a block in the order of the first epoch."""
    line: int = 1
    """Where `row` is None."""
    answer: Literal["chosen", "rejected"] = "chosen"
    """Of a pair."""
    seed: int = 42
    """Of that order."""
    sampling: Sampling | None = None
    """For pretraining: which documents, and how often."""
    tokenizer: str | None = None
    """For pretraining: in place of the model's own."""
    limit: int = 4096
    """Tokens that are shown one by one."""


@dataclass(frozen=True)
class Shown:
    format: str
    row: int
    line: int
    max_length: int
    """Which holds: the model's context, where that is shorter than what was asked for."""
    preview: Preview


class Previews:
    def __init__(self, hub: "Hub") -> None:
        self._hub = hub
        self._turn = asyncio.Semaphore(AT_ONCE)

    async def show(self, model: str, dataset: str, wanted: Wanted, who: Principal) -> Shown:
        """Raises NotFoundError, BadRequestError, and ValidationError for a row that cannot be
        read, or is not there. Nothing is kept, and nothing but the model's tokenizer is loaded.
        """
        async with self._turn:
            return await asyncio.to_thread(self._show, model, dataset, wanted, who)

    def _show(self, model: str, dataset: str, wanted: Wanted, who: Principal) -> Shown:
        hub = self._hub
        folder = hub.find_model(model, who, "model_name").folder
        found = hub.find_data(dataset, who, "dataset_path")
        suffix = usual_suffix(found.suffix, found.name, "dataset_path")
        with open_regular(found.path) as file:
            refuse_elsewhere(found.path, file)
            return look(File(file, found.path, suffix), folder, wanted, self._renderer(wanted))

    def _renderer(self, wanted: Wanted) -> "RendererOf":
        if wanted.tokenizer is None:
            return self._hub.renderer
        place = tokenizers.find(self._hub, wanted.tokenizer, "tokenizer")
        try:
            own = brought.load(place, wanted.tokenizer)
        except TokenizerFault as fault:
            raise ValidationError(f"tokenizer: {fault.message}", param="tokenizer") from None
        return lambda folder, format: own


@dataclass(frozen=True)
class File:
    file: BinaryIO
    path: Path
    suffix: str


RendererOf = Callable[[ModelFolder, str], Renderer]
"""How a renderer is found: by a model's folder and the format of the rows."""


def look(at: File, folder: ModelFolder, wanted: Wanted, renderer_of: RendererOf) -> Shown:
    """Raises ValidationError."""
    if not folder.has_tokenizer and wanted.tokenizer is None:
        raise BadRequestError(f"{folder.path.name} has no tokenizer.json", param="model_name")
    length = min(wanted.cut.max_length, folder.context_length or wanted.cut.max_length)
    if wanted.method == "pretrain":
        return _block(at, renderer_of(folder, "text"), wanted, length)
    row, format, number = find_row(
        at.file, at.suffix, wanted.reading, row=wanted.row, line=wanted.line
    )
    is_pair = row.rejected is not None
    train_on = "completions" if is_pair else wanted.cut.train_on
    told = row.rejected if row.rejected is not None and wanted.answer == "rejected" else row
    cut = Cut(length, wanted.cut.overlong, train_on)
    shown = preview_row(renderer_of(folder, format), told, cut, min(wanted.limit, MAX_SHOWN))
    return Shown(format, number, row.line, length, shown)


def _block(at: File, renderer: Renderer, wanted: Wanted, length: int) -> Shown:
    number = wanted.row or 1
    if number > MAX_BLOCK:
        raise ValidationError(f"row: the first {MAX_BLOCK} blocks can be shown", param="row")
    with RowIndex.of(at.file, at.path, at.suffix, wanted.reading) as index:
        rows = index if wanted.sampling is None else choose(index, wanted.sampling)
        try:
            source = BlockSource(rows, renderer, length, wanted.seed)
            source.open(0)
            for _ in range(number - 1):
                source.pull()
            sample = source.pull()
        except JobFailure as failure:
            raise ValidationError(str(failure), param="dataset_path") from None
        format = rows.format
    if sample is None:
        raise ValidationError(f"row: an epoch has fewer than {number} blocks", param="row")
    shown = preview_block(renderer, sample.ids, min(wanted.limit, MAX_SHOWN))
    return Shown(format, number, 0, length, shown)

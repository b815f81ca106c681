"""A served base with a forward pass of our own: chunks of sequences in, rows out.

T rows of a step, H hidden size, R rows that are wanted, V vocabulary entries.
"""

import math
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Many
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from tunesmith.infer.decoder import Decoder, build, module_names
from tunesmith.infer.hosted import Kind
from tunesmith.infer.overlay import Dress, Patch, Stretch
from tunesmith.infer.scheduler import Chunk
from tunesmith.infer.sequence import Sequence
from tunesmith.infer.sight import Sight
from tunesmith.infer.slots import Form, Slots
from tunesmith.nn.packed import Precision, beside, rounded

_ROOTS = {"gpt2": "transformer."}


@dataclass(frozen=True)
class Files:
    """What was read."""

    parameters: int
    weight_shapes: dict[str, tuple[int, ...]]
    """By the names of modules."""


class LeanNet:
    """All rows of a step in one pass, whatever their adapters."""

    def __init__(
        self,
        decoder: Decoder,
        modules: list[str],
        files: Files,
        precision: Precision,
        longest: int,
    ) -> None:
        """`modules` are those that adapters can be laid over."""
        self.decoder = decoder
        self.modules = modules
        self.parameters, self.weight_shapes = files.parameters, files.weight_shapes
        self.precision = precision
        sizes = [decoder.head_size] * len(decoder.blocks)
        form = Form(decoder.kv_heads, sizes, beside(precision), "cpu")
        self.bytes_per_token = form.bytes_per_token
        self._slots: Slots[Sequence] = Slots(form, longest)

    def rows(
        self, chunks: Many[Chunk], worn: Mapping[Sequence, int], kind: Kind
    ) -> tuple[list[Chunk], Tensor]:
        """The chunks in the order of their rows, and the logits (R, V) or last hidden states (R, H)
        of those that they want."""
        sight = Sight.of(chunks, self._slots)
        ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for chunk in sight.chunks:
            wanted += [len(ids) + row - chunk.start for row in chunk.rows]
            ids += chunk.sequence.tokens(chunk.start, chunk.end)
            positions += range(chunk.start, chunk.end)
        spare = [0] * (rounded(len(ids)) - len(ids))
        hidden_TH = self.decoder.hidden(
            torch.tensor(ids + spare), torch.tensor(positions + spare), sight, _dress(sight, worn)
        )
        normed_RH = self.decoder.norm(hidden_TH[torch.tensor(wanted, dtype=torch.long)])
        return sight.chunks, normed_RH if kind == "hidden" else self._logits(normed_RH)

    def _logits(self, normed_RH: Tensor) -> Tensor:
        rows = normed_RH.shape[0]
        if rows == 0:
            return normed_RH.new_zeros(0, self.decoder.head.outputs)
        padded = F.pad(normed_RH, (0, 0, 0, rounded(rows) - rows))
        return self.decoder.logits(padded)[:rows]

    def adopt(self, sequence: Sequence, source: Sequence, tokens: int) -> None:
        """Begin with the keys and values of another's first tokens."""
        self._slots.adopt(sequence, source, tokens, sequence.length)

    def stop(self, sequence: Sequence) -> None:
        """Keep what it has for others to begin with."""
        self._slots.stop(sequence)

    def free(self, sequence: Sequence) -> None:
        self._slots.free(sequence)

    def put_on(self, adapter: int, patches: Mapping[str, Patch]) -> None:
        for block in self.decoder.blocks:
            for linear in block.linears:
                linear.put_on(adapter, patches)

    def adapter_bytes(self, patches: Mapping[str, Patch]) -> int:
        """That they take as they are held."""
        return sum(each.to(self._slots.form.dtype).bytes for each in patches.values())

    def take_off(self, adapter: int) -> None:
        for block in self.decoder.blocks:
            for linear in block.linears:
                linear.take_off(adapter)


def _dress(sight: Sight, worn: Mapping[Sequence, int]) -> Dress:
    singles = [worn.get(chunk.sequence) for chunk in sight.chunks if chunk.end - chunk.start == 1]
    if not worn:
        return Dress([], [])
    stretches = [
        Stretch(place.start, place.end, worn[chunk.sequence])
        for place, chunk in zip(sight.alone, sight.chunks[len(singles) :], strict=True)
        if chunk.sequence in worn
    ]
    return Dress(singles, stretches)


def open_lean(folder: Path, config: Any, precision: Precision, longest: int) -> LeanNet | None:
    """None where transformers has to serve the folder: another architecture, or tensors that are
    not the architecture's."""
    modules = module_names(config)
    if modules is None:
        return None
    with TensorFiles(folder, _ROOTS.get(config.model_type, "model.")) as state:
        try:
            decoder = build(config, state, precision)
        except KeyError:
            return None
        shapes = state.shapes()
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    files = Files(
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        weight_shapes={name.removesuffix(".weight"): shape for name, shape in shapes.items()},
    )
    files.weight_shapes.setdefault("lm_head", tuple(decoder.embedding_VH.shape))
    return LeanNet(decoder, modules, files, precision, longest)


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of a folder's files, each read when it is asked for.

    Names may lack the architecture's root, as those of a bare decoder do.
    """

    def __init__(self, folder: Path, root: str) -> None:
        self._folder, self._root = folder, root
        self._open = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> "TensorFiles":
        for path in sorted(self._folder.glob("*.safetensors")):
            file = self._open.enter_context(safe_open(path, framework="pt"))
            self._files |= dict.fromkeys(file.keys(), file)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By the whole names, the root included."""
        return {
            name if name.startswith((self._root, "lm_head.")) else self._root + name: tuple(
                file.get_slice(name).get_shape()
            )
            for name, file in self._files.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        for each in (name, name.removeprefix(self._root)):
            if each in self._files:
                tensor: Tensor = self._files[each].get_tensor(each)
                return tensor
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return name in self._files or (
            isinstance(name, str) and name.removeprefix(self._root) in self._files
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

"""Several processes that train one model on shares of each step: data parallel, by torchrun.

Every process reads the same rows and draws the same order; each computes its share of a step's
samples, and the gradients are added up, so that all make the same update.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed
from torch.nn import Parameter

from tunesmith.nn.shards import is_part
from tunesmith.train.batches import S

PATIENCE = timedelta(hours=6)
"""Rank 0 may be long in writing what the others do not write."""
MEETING = timedelta(minutes=2)
_OTHER = "rank{}/"


@dataclass(frozen=True)
class Group:
    """Alone, it does nothing: one process trains as if there were no others."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """The one that speaks and writes."""
        return self.rank == 0

    def share(self, samples: Sequence[S]) -> Sequence[S]:
        """This process's part of a step, dealt out by length so that all have about as much."""
        return self.shares(samples)[self.rank]

    def shares(self, samples: Sequence[S]) -> list[Sequence[S]]:
        """Every process's part."""
        if self.size == 1:
            return [samples]
        ordered = sorted(samples, key=lambda sample: sample.tokens)
        return [ordered[rank :: self.size] for rank in range(self.size)]

    def add_up(self, *numbers: float) -> list[float]:
        """Each number's sum over all processes."""
        if self.size == 1:
            return list(numbers)
        together = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(together)
        found: list[float] = together.tolist()
        return found

    def any(self, *flags: bool) -> list[bool]:
        """Each flag, if any process has it: all must go the same way."""
        return [number > 0 for number in self.add_up(*map(float, flags))]

    def add_gradients(self, parameters: Iterable[Parameter]) -> None:
        """Each gradient's sum over all processes; one that is missing counts as zero. Where
        processes hold parts, these have been summed already."""
        if self.size == 1:
            return
        trained = [parameter for parameter in parameters if not is_part(parameter)]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for kind in {(p.dtype, p.device) for p in trained}:
            gradients = [
                p.grad for p in trained if (p.dtype, p.device) == kind and p.grad is not None
            ]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            distributed.all_reduce(flat)
            parts = torch.split(flat, [gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def gather(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On rank 0 every process's tensors, those of rank i named `rank<i>/…`; else its own.

        Shapes and types must be the same everywhere.
        """
        mine = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
        gathered = dict(mine)
        for name, tensor in mine.items():
            if self.size > 1:
                parts = [torch.empty_like(tensor) for _ in range(self.size)]
                distributed.all_gather(parts, tensor)
                for rank, part in enumerate(parts[1:], 1):
                    gathered[_OTHER.format(rank) + name] = part
        return gathered

    def mine(self, gathered: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `gather`."""
        prefix = "" if self.is_first else _OTHER.format(self.rank)
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in gathered.items()
            if (name.startswith(prefix) if prefix else "/" not in name)
        }

    def exchange(self, body: bytes) -> list[bytes]:
        """Every process's bytes, in the order of ranks."""
        if self.size == 1:
            return [body]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        distributed.all_gather(lengths, torch.tensor([len(body)]))
        longest = max(int(length) for length in lengths)
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(body)] = torch.frombuffer(bytearray(body), dtype=torch.uint8)
        parts = [torch.zeros_like(mine) for _ in range(self.size)]
        distributed.all_gather(parts, mine)
        return [
            bytes(part[: int(length)].numpy().tobytes())
            for part, length in zip(parts, lengths, strict=True)
        ]

    def tell(self, body: bytes) -> bytes:
        """Rank 0's bytes, on every process."""
        if self.size == 1:
            return body
        length = torch.tensor([len(body)], dtype=torch.int64)
        distributed.broadcast(length, 0)
        content = torch.zeros(int(length), dtype=torch.uint8)
        if self.is_first:
            content = torch.frombuffer(bytearray(body), dtype=torch.uint8)
        distributed.broadcast(content, 0)
        return bytes(content.numpy().tobytes())


def join() -> Group:
    """As torchrun's environment says; alone where it says nothing."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Group()
    rank = int(os.environ["RANK"])
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    # Opened here: its first pause between two tries to connect grows with the timeout.
    store = distributed.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=rank == 0 and not has_store,
        timeout=MEETING,
        wait_for_workers=False,
    )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=PATIENCE
    )
    return Group(rank, size)


def leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()

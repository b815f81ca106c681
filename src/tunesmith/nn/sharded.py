"""One model over several processes, each of which holds a part of every weight: FSDP2.

Zhao et al. 2023, arXiv:2304.11277, as torch's `fully_shard` has it. A block's weights are gathered
where it computes and let go of after it; gradients are summed to the parts. Each forward and each
backward pass is a conversation of all processes: all have to make as many of them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from tunesmith.nn.batch import FlatBatch, flatten
from tunesmith.nn.hosted import HostedDecoder, HostedModel, HostedScorer, plain_attention
from tunesmith.nn.shards import as_part, whole

Out = TypeVar("Out")


class Gate(nn.Module):
    """What FSDP takes for the whole: whatever is called through it finds its weights gathered."""

    def __init__(self, model: nn.Module, device: str) -> None:
        super().__init__()
        self.model = model
        self.is_open = False
        self._share_out(device)

    def forward(self, call: Callable[..., Out], *arguments: Any) -> Out:
        return call(*arguments)

    def through(self, call: Callable[..., Out], *arguments: Any) -> Out:
        """Once, also where one such call makes another."""
        if self.is_open:
            return call(*arguments)
        self.is_open = True
        try:
            found: Out = self(call, *arguments)
            return found
        finally:
            self.is_open = False

    def _share_out(self, device: str) -> None:
        """Each block is a part of its own; embedding, norm and head are another."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        kind = torch.device(device).type
        if kind == "cuda":
            torch.cuda.set_device(device)
        mesh = init_device_mesh(kind, (distributed.get_world_size(),))
        for block in blocks(self.model):
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh, reshard_after_forward=True)
        for part in self.modules():
            if isinstance(part, FSDPModule):
                # Losses are means over the whole step already: gradients are added up.
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of the longest stack; empty where a model has none."""
    stacks = [one for one in model.modules() if isinstance(one, nn.ModuleList)]
    return list(max(stacks, key=_weights_of, default=()))


def _weights_of(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters())


class ShardedDecoder(HostedDecoder):
    """See `Model`."""

    _gate: Gate
    _whole: Mapping[str, Tensor]

    def share_out(self, device: str) -> None:
        """Before anything is asked of it."""
        self._gate, self._whole = Gate(self._outer, device), {}
        named = self._outer.named_parameters()
        self._trainable = {name: one for name, one in named if one.requires_grad}

    def weights(self) -> dict[str, Tensor]:
        """Parts of them; of tensors that are there under two names, the first."""
        if self._peft is not None:
            return super().weights()
        found: dict[int, tuple[str, Tensor]] = {}
        for name, one in self._model.state_dict(keep_vars=True).items():
            found.setdefault(id(one), (name, one.detach()))
        return dict(found.values())

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        own = self.weights()
        assert own.keys() == weights.keys(), sorted(own.keys() ^ weights.keys())[:4]
        for name, tensor in own.items():
            tensor.copy_(as_part(weights[name], tensor))

    def gather(self) -> None:
        state = self._outer.state_dict(keep_vars=True)
        if self._peft is not None:
            state = {name: one for name, one in state.items() if name in self._trainable}
        found: dict[int, Tensor] = {}
        for one in state.values():
            if id(one) not in found:
                full = whole(one.detach()).cpu()
                found[id(one)] = full if distributed.get_rank() == 0 else full.new_empty(0)
        self._whole = {name: found[id(one)] for name, one in state.items()}

    def save(self, folder: Path) -> None:
        """What was gathered last."""
        with plain_attention(self._model, self._ways.attention):
            self._outer.save_pretrained(str(folder), state_dict=dict(self._whole))
        self._whole = {}

    def idle(self) -> None:
        nothing = self._nothing(flatten([([0, 0], [True, True])], self._device))
        if torch.is_grad_enabled():
            (nothing * 0).backward()  # type: ignore[no-untyped-call]

    def _nothing(self, batch: FlatBatch) -> Tensor:
        """A number that all weights have a part in."""
        raise NotImplementedError

    @property
    def _device(self) -> torch.device:
        return next(self._gate.parameters()).device


class ShardedModel(ShardedDecoder, HostedModel):
    """See `LanguageModel`."""

    def loss_sum(self, batch: FlatBatch) -> Tensor:
        return self._gate.through(super().loss_sum, batch)

    def grades(self, batch: FlatBatch) -> Tensor:
        return self._gate.through(super().grades, batch)

    def log_probs(self, batch: FlatBatch, temperature: float = 1.0) -> Tensor:
        return self._gate.through(super().log_probs, batch, temperature)

    def states(self, batch: FlatBatch) -> Tensor:
        return self._gate.through(super().states, batch)

    def log_probs_and_states(
        self, batch: FlatBatch, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        return self._gate.through(super().log_probs_and_states, batch, temperature)

    def _nothing(self, batch: FlatBatch) -> Tensor:
        return self.loss_sum(batch)


class ShardedScorer(ShardedDecoder, HostedScorer):
    """See `ScoringModel`."""

    def scores(self, batch: FlatBatch) -> Tensor:
        return self._gate.through(self._own_scores, batch)

    def _own_scores(self, batch: FlatBatch) -> Tensor:
        """No view: FSDP hooks onto what comes out."""
        return super().scores(batch).clone()

    def _nothing(self, batch: FlatBatch) -> Tensor:
        return self.scores(batch).sum()

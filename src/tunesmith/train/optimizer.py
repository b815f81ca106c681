"""AdamW with decoupled weight decay (Loshchilov and Hutter 2019), its guard and its state."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from tunesmith.nn.shards import as_part, whole
from tunesmith.spec.train import Optim

_SLOTS = ("exp_avg", "exp_avg_sq", "step")


class Optimizer:
    """Updates named parameters. Norms, biases and whatever has one dimension are not decayed."""

    def __init__(self, parameters: Mapping[str, Parameter], optim: Optim) -> None:
        self._named = dict(parameters)
        self._max_norm = optim.max_grad_norm
        decayed = [p for p in self._named.values() if p.dim() >= 2]
        plain = [p for p in self._named.values() if p.dim() < 2]
        groups = [
            {"params": decayed, "weight_decay": optim.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=optim.learning_rate,
            betas=(optim.beta1, optim.beta2),
            eps=optim.epsilon,
            fused=True,
        )

    def update(self, learning_rate: float, scale: float = 1.0) -> float:
        """One step with what the gradients hold, over `scale`; they are then dropped.

        Returns their norm before clipping. Where that is no finite number, nothing is changed.
        """
        gradients = [p.grad for p in self._named.values() if p.grad is not None]
        if scale != 1:
            torch._foreach_mul_(gradients, 1 / scale)
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = whole(norm)
        value = float(norm)
        if math.isfinite(value):
            if self._max_norm and value > self._max_norm:
                torch.nn.utils.clip_grads_with_norm_(self._named.values(), self._max_norm, norm)
            for group in self._adam.param_groups:
                group["lr"] = learning_rate
            self._adam.step()
        self.drop_gradients()
        return value

    def drop_gradients(self) -> None:
        self._adam.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """`<slot>/<parameter>` → tensor, for those parameters that were ever updated."""
        return {
            f"{slot}/{name}": self._adam.state[parameter][slot]
            for name, parameter in self._named.items()
            if parameter in self._adam.state
            for slot in _SLOTS
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Raises KeyError or ValueError where the state belongs to other parameters."""
        for key in state:
            slot, name = key.split("/", 1)
            parameter = self._named[name]
            value = state[key].to(parameter.device, copy=True)
            if slot != "step" and value.shape != parameter.shape:
                raise ValueError(f"{name} has another shape")
            is_scalar = slot == "step"
            self._adam.state[parameter][slot] = value if is_scalar else as_part(value, parameter)

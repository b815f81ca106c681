"""What a first training step loads late, loaded early: once, on one thread."""

import importlib

import torch

from tunesmith.spec.train import Optim
from tunesmith.train import job as job
from tunesmith.train.optimizer import Optimizer

MODULES = (
    "faulthandler",
    "safetensors.torch",
    "tokenizers",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
    "peft",
)
"""Beside what the trainer's own modules import."""


def up() -> None:
    for name in MODULES:
        importlib.import_module(name)
    _update_once()


def _update_once() -> None:
    """The first update imports torch's compiler front end, which takes seconds.

    There is no backward pass: on a machine with a GPU it would start threads.
    """
    parameter = torch.nn.Parameter(torch.zeros(4, 4))
    parameter.grad = torch.ones(4, 4)
    optimizer = Optimizer({"one": parameter}, Optim())
    optimizer.update(1e-3)

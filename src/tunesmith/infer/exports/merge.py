"""An adapter laid into its base: one model, as plain transformers loads it."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.errors import BadRequestError
from tunesmith.infer.adapters import is_adapter
from tunesmith.infer.model import base_of
from tunesmith.infer.voices import renderer_of

HALVES = {"float16": "fp16", "bfloat16": "bf16"}


def save(model: Path, out: Path) -> str:
    """A full model, or an adapter merged into its base, as safetensors. Returns the format.

    The sum is made in fp32 and written as the base is held. Raises BadRequestError. The engine has
    opened it before: see `asking`.
    """
    base = base_of(model) if is_adapter(model) else model
    net = _read(base)
    held = str(net.config.dtype or torch.float32).removeprefix("torch.")
    if is_adapter(model):
        net = _merged(net, model)
    if held in HALVES:
        net = net.to(getattr(torch, held))
    net.save_pretrained(out)
    renderer_of(model).save(out)
    return HALVES.get(held, "fp32")


def _read(base: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
        held = config.dtype
        net = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (ValueError, OSError, KeyError) as error:
        raise BadRequestError(f"{base.name}: cannot be loaded: {str(error)[:1000]}") from error
    net.config.dtype = held
    return net


def _merged(net: Any, adapter: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(net, str(adapter)).merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise BadRequestError(
            f"{adapter.name}: the adapter cannot be merged: {str(error)[:1000]}"
        ) from error

"""LoRA as PEFT writes it down: which modules, how initialised, under which names it is saved."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tunesmith.nn.folder import ModelFolder, listed, refuse
from tunesmith.nn.projection import AdapterShape
from tunesmith.spec.train import Lora

PREFIX = "base_model.model."
SCORE_MODULES = ["score"]
"""What a reward model's adapter trains whole."""
_NEUTRAL = {"bias": "none", "init_lora_weights": True, "use_rslora": True, "use_dora": True}
"""Values beside the empty ones that our layers honour."""
_IGNORED = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "inference_mode",
    "revision",
    "peft_version",
    "auto_mapping",
    "target_modules",
    "r",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
}


@dataclass(frozen=True)
class AdapterPlan:
    modules: frozenset[str]
    """Full names."""
    shape: AdapterShape
    config: dict[str, Any]
    """Fields of PEFT's LoraConfig."""


def plan_new(lora: Lora, folder: ModelFolder, modules: list[str], transposed: bool) -> AdapterPlan:
    """Raises JobFailure(USER_ERROR) where the targets name no module."""
    is_all = lora.targets == "all-linear"
    wanted = frozenset(modules) if is_all else matching(modules, lora.targets)
    if not wanted:
        raise refuse(
            f"targets {list(lora.targets)} name no linear layer of this model",
            f"it has {listed(_last(name) for name in modules)}; or ask for all-linear",
        )
    targets = sorted({_last(name) for name in modules}) if is_all else list(lora.targets)
    config = {
        "r": lora.rank,
        "lora_alpha": _whole(lora.alpha),
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "target_modules": targets,
        "fan_in_fan_out": transposed,
        "base_model_name_or_path": folder.base_given,
    }
    scale = _scale(lora.rank, lora.alpha, lora.use_rslora)
    return AdapterPlan(wanted, AdapterShape(lora.rank, scale, lora.dropout, lora.use_dora), config)


def plan_known(
    folder: ModelFolder, modules: list[str], *, is_scoring: bool = False
) -> AdapterPlan | None:
    """Of an adapter that was trained before; None where it uses what our layers don't do."""
    config = dict(folder.adapter_config or {})
    if is_scoring and config.get("modules_to_save") == SCORE_MODULES:
        del config["modules_to_save"]
    odd = [
        name
        for name, value in config.items()
        if value and name not in _IGNORED and value != _NEUTRAL.get(name)
    ]
    targets = config.get("target_modules")
    if odd or not isinstance(targets, list):
        return None
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    scale = _scale(rank, alpha, bool(config.get("use_rslora")))
    dropout, has_magnitudes = float(config.get("lora_dropout") or 0), bool(config.get("use_dora"))
    shape = AdapterShape(rank, scale, dropout, has_magnitudes)
    as_they_are = ("use_rslora", "use_dora", "fan_in_fan_out", "target_modules")
    kept = {name: config.get(name) for name in as_they_are}
    kept |= {name: config[name] for name in ("r", "lora_alpha", "base_model_name_or_path")}
    kept["lora_dropout"] = shape.dropout
    return AdapterPlan(matching(modules, targets), shape, kept)


def matching(modules: list[str], targets: Any) -> frozenset[str]:
    """A target is a module's whole name or the end of it, from a dot on."""
    return frozenset(
        name
        for name in modules
        if any(name == target or name.endswith(f".{target}") for target in targets)
    )


def save_adapter(
    folder: Path, plan: AdapterPlan, weights: Mapping[str, Tensor], *, is_scoring: bool = False
) -> None:
    """adapter_config.json and adapter_model.safetensors, which PEFT loads."""
    from peft import LoraConfig

    folder.mkdir(parents=True, exist_ok=True)
    task: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if is_scoring:
        task = {"task_type": "SEQ_CLS", "modules_to_save": SCORE_MODULES}
    config = LoraConfig(inference_mode=True, **task, **plan.config)
    config.save_pretrained(str(folder))
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"), {"format": "pt"})


def published_name(module_and_side: str) -> str:
    """model.layers.0.self_attn.q_proj.lora_A.weight, as PEFT saves it."""
    return PREFIX + module_and_side


def check_fit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], folder: str) -> None:
    """Raises JobFailure(USER_ERROR) where an adapter's tensors are not this model's."""
    for name, tensor in expected.items():
        if name not in found:
            raise refuse(f"{folder}: the adapter lacks {name}", "use it with its own base model")
        if found[name].shape != tensor.shape:
            raise refuse(
                f"{folder}: {name} is {tuple(found[name].shape)}, not {tuple(tensor.shape)}",
                "use the adapter with its own base model",
            )
    foreign = sorted(found.keys() - expected.keys())
    if foreign:
        raise refuse(f"{folder}: the adapter has {foreign[0]}, which this model has not")


def _scale(rank: int, alpha: float, is_steady: bool) -> float:
    """`is_steady`: rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732, section 3)."""
    return alpha / math.sqrt(rank) if is_steady else alpha / rank


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _last(module: str) -> str:
    return module.rsplit(".", 1)[-1]


def copy_into(target: Tensor, source: Tensor) -> None:
    with torch.no_grad():
        target.copy_(source)

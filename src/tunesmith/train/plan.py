"""How a job is computed here: threads, device, precision, compiler, memory."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tunesmith.spec.pipe import Plan, TrainerTask
from tunesmith.spec.train import AnySpec, Pretrain

CPU_MICRO_BATCH_TOKENS = 4096
GPU_MICRO_BATCH_TOKENS = 16384
NARROW = 512
"""Below this width a product ends before a second thread, woken from passive waiting, has begun."""


@dataclass(frozen=True)
class Size:
    """A model's measures, as far as its config and files tell them."""

    weight_bytes: int
    hidden: int
    layers: int

    @classmethod
    def of(cls, folder: Path) -> "Size":
        config = _config(folder)
        files = (path.stat().st_size for path in folder.glob("*.safetensors"))
        hidden = int(config.get("hidden_size") or config.get("n_embd") or 0)
        layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 0)
        embedding = int(config.get("vocab_size") or 0) * hidden
        return cls(sum(files) or 4 * (12 * layers * hidden**2 + embedding), hidden, layers)

    @property
    def parameters(self) -> int:
        return self.weight_bytes // 4


def choose(task: TrainerTask, processes: int = 1) -> Plan:
    """The plan for a first attempt; a given one is used as it is: see `settled`."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    width = Size.of(Path(task.inputs.model)).hidden
    is_cpu = device == "cpu"
    plan = Plan(
        parallel=_parallel(task, processes, device),
        threads=1 if is_cpu and width < NARROW else default_threads(),
        processes=processes,
        device=device,
        precision=_precision(task.spec.run.precision, is_cpu),
        compile=task.spec.run.compile == "on",
        micro_batch_tokens=CPU_MICRO_BATCH_TOKENS if is_cpu else GPU_MICRO_BATCH_TOKENS,
    )
    return settled(task, plan)


def settled(task: TrainerTask, plan: Plan) -> Plan:
    """With what it leaves open decided: later attempts may find less memory, or more."""
    if plan.gradient_checkpointing is not None:
        return plan
    return plan.model_copy(
        update={"gradient_checkpointing": _needs_gradient_checkpointing(task, plan)}
    )


def default_threads() -> int:
    """What OMP_NUM_THREADS says, else the cores this process may run on."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdigit() and int(asked) > 0:
        return min(int(asked), 4096)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _needs_gradient_checkpointing(task: TrainerTask, plan: Plan) -> bool:
    """Whether activations must be computed twice: where asked, or where memory would not do."""
    choice = task.spec.run.gradient_checkpointing
    if choice != "auto":
        return choice == "on"
    size, spec = Size.of(Path(task.inputs.model)), task.spec
    if isinstance(spec, Pretrain):
        sample = spec.sequence_length
    else:
        sample = spec.sequences_a_sample * spec.max_length
    held = _copies(spec) * size.weight_bytes
    if plan.parallel == "fsdp":
        held //= plan.processes
    tokens = max(plan.micro_batch_tokens, sample)
    activations = 4 * 20 * tokens * size.hidden * size.layers
    return held + activations > 0.9 * _free_bytes(plan.device)


def _copies(spec: AnySpec) -> int:
    """Tensors as large as the weights that a training holds: with gradients and two moments."""
    return 4 if isinstance(spec, Pretrain) or spec.lora is None else 1


def _parallel(task: TrainerTask, processes: int, device: str) -> Literal["ddp", "fsdp"]:
    """A copy for each process where that fits: it is faster, and what our own forward needs."""
    spec = task.spec
    if processes == 1 or spec.run.parallel == "ddp":
        return "ddp"
    if spec.run.parallel == "fsdp":
        return "fsdp"
    if not spec.is_shareable or spec.run.quantization or spec.run.generated_rows:
        return "ddp"
    free = _free_bytes(device) / (processes if device == "cpu" else 1)
    held = _copies(spec) * Size.of(Path(task.inputs.model)).weight_bytes
    return "fsdp" if held > 0.9 * free else "ddp"


def _precision(asked: str, is_cpu: bool) -> Literal["fp32", "bf16", "fp16"]:
    """auto on a CPU is fp32, which the lean forward needs and which repeats to the last bit."""
    if asked in ("fp32", "bf16", "fp16"):
        return asked  # type: ignore[return-value]
    return "bf16" if not is_cpu and torch.cuda.is_bf16_supported() else "fp32"


def _free_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [_number(Path("/sys/fs/cgroup/memory.max")), _available_bytes()]
    return min(limit for limit in limits if limit)


def _available_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1 << 62
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else 1 << 62


def _number(path: Path) -> int:
    try:
        text = path.read_text().strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() else 0


def _config(folder: Path) -> dict[str, Any]:
    """The base model's config, also where `folder` is an adapter's; empty if it cannot be read."""
    try:
        if (folder / "config.json").is_file():
            found = json.loads((folder / "config.json").read_bytes())
        else:
            adapter = json.loads((folder / "adapter_config.json").read_bytes())
            found = json.loads(
                (Path(adapter["base_model_name_or_path"]) / "config.json").read_bytes()
            )
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}

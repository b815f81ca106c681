"""The four tasks, and which specification each one's configuration becomes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith.spec.places import places
from tunesmith.spec.tasks.keys import GLOBAL_BATCH, KEYS, OUTPUT_DIR, Key
from tunesmith.spec.train import (
    AnySpec,
    Cpo,
    Grpo,
    Kto,
    Orpo,
    Ppo,
    Preference,
    Pretrain,
    Reward,
    Rloo,
    Sft,
    Simpo,
)

HOLDOUT = "holdout"
ANY = ""
"""The algorithm of a task that has only one."""


@dataclass(frozen=True)
class Task:
    name: str
    told: str
    algorithms: Mapping[str, type[AnySpec]]
    """The first is the one that is meant where none is named."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """By place, where the task's are other than the specification's."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Places that mean nothing to the task, with what would be right."""

    folder: str = ""
    """What the contract calls the folder of the model, where it has a name for it."""

    @property
    def has_algorithms(self) -> bool:
        return ANY not in self.algorithms

    def reads(self, algorithm: str | None = None) -> list[Key]:
        """Those that it reads, of one algorithm or of any."""
        kinds = [self.algorithms[algorithm]] if algorithm is not None else self.algorithms.values()
        known = {place for kind in kinds for place in places(kind)} | {OUTPUT_DIR, GLOBAL_BATCH}
        return [key for key in KEYS if key.place in known and not self.refusal(key)]

    def refusal(self, key: Key) -> str | None:
        return self.refused.get(key.place.partition(".")[0], self.refused.get(key.place))


_HELD = {HOLDOUT: 0.05}
"""Of the rows, where no eval_dataset is given."""
_FULL = {"lora": None, **_HELD}
_ANSWERED = {"run.generated_rows": 32}
_ADAPTERS = "it trains every weight; write task_type: lora for adapters"
TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            "sft",
            "supervised fine-tuning of every weight",
            {ANY: Sft},
            {**_FULL, **_ANSWERED},
            {"lora": _ADAPTERS, "sweep": _ADAPTERS, "run.quantization": _ADAPTERS},
            "model_final",
        ),
        Task(
            "rl",
            "preferences, reward models and reinforcement learning",
            {
                "dpo": Preference,
                "kto": Kto,
                "orpo": Orpo,
                "cpo": Cpo,
                "simpo": Simpo,
                "reward": Reward,
                "grpo": Grpo,
                "rloo": Rloo,
                "ppo": Ppo,
            },
            _FULL,
        ),
        Task(
            "lora",
            "supervised fine-tuning of low-rank adapters",
            {ANY: Sft},
            {"lora": {}, "optim.learning_rate": 2e-4, "row_ranks": True, **_HELD, **_ANSWERED},
        ),
        Task(
            "pretrain",
            "next-token training on plain text",
            {ANY: Pretrain},
            _HELD,
            refused={
                "run.quantization": "it trains every weight",
                "run.generated_rows": "plain text has no answers",
                "run.generated_tokens": "plain text has no answers",
            },
        ),
    )
}

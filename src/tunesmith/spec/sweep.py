"""Several configurations of one training: what may be asked for, and what came of each."""

from collections.abc import Mapping
from itertools import product
from math import prod
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, StringConstraints, TypeAdapter, model_validator

from tunesmith.spec.strict import Strict

MAX_TRIALS = 64
ADAPTERS = "adapters"
"""In an artifact: the folder that holds one adapter a trial, each under its name."""
TABLE = "sweep.json"
"""In an artifact: a `SweepTable`."""

TrialName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}$")]
LoraSetting = Literal["rank", "alpha", "dropout", "targets", "use_rslora", "use_dora"]
OptimSetting = Literal[
    "learning_rate",
    "epochs",
    "max_steps",
    "batch_size",
    "gradient_accumulation_steps",
    "scheduler",
    "warmup_ratio",
    "warmup_steps",
    "weight_decay",
    "beta1",
    "beta2",
    "epsilon",
    "max_grad_norm",
    "seed",
]
Setting = Literal[LoraSetting, OptimSetting]
LORA_SETTINGS: frozenset[str] = frozenset(get_args(LoraSetting))

_Text = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Value = bool | int | float | _Text | Annotated[tuple[_Text, ...], Field(max_length=256)] | None
"""Of a setting; `Lora` and `Optim` say which ones may be."""
Values = Annotated[tuple[Value, ...], Field(min_length=1, max_length=MAX_TRIALS)]


_NAME: TypeAdapter[str] = TypeAdapter(TrialName)


class Sweep(Strict):
    """Trials of one training, side by side over one frozen base, each with an adapter of its own.

    Either `grid`, each combination of the values given, or `trials`, each with what it has
    otherwise than the specification, and a `name` where it is to have one.
    """

    grid: dict[Setting, Values] = Field(
        {}, max_length=20, description="setting → values; each combination is one"
    )
    trials: tuple[dict[Literal[Setting, "name"], Value], ...] = Field(
        (), max_length=MAX_TRIALS, description="what each has otherwise, and a name if it is to"
    )

    @model_validator(mode="after")
    def _check(self) -> "Sweep":
        if bool(self.grid) == bool(self.trials):
            raise ValueError("a sweep has either a grid or trials")
        count = prod(len(values) for values in self.grid.values())
        if count > MAX_TRIALS:
            raise ValueError(f"the grid has {count} combinations; at most {MAX_TRIALS} are run")
        names = [_NAME.validate_python(name) for name, _ in self._listed()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two trials are named {twice[0]!r}")
        return self

    def settings(self) -> dict[TrialName, dict[str, Any]]:
        """What each trial has otherwise, by its name: its own, or trial-1, trial-2, …"""
        return dict(self._listed())

    def _listed(self) -> list[tuple[str, dict[str, Any]]]:
        if self.grid:
            found: list[Mapping[Any, Any]] = [
                dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())
            ]
        else:
            found = list(self.trials)
        return [
            (
                str(one.get("name") or f"trial-{number}"),
                {name: value for name, value in one.items() if name != "name"},
            )
            for number, one in enumerate(found, 1)
        ]


class TrialResult(Strict):
    name: TrialName = Field(description="its own, or trial-1, trial-2, …")
    settings: dict[str, Any] = Field({}, description="what it has otherwise than the others")
    status: Literal["succeeded", "failed"] = Field(description="how it ended")
    error: str | None = Field(None, max_length=500, description="why it failed")
    steps: int = Field(ge=0, description="that it took")
    rows: int = Field(ge=0, description="that it was trained on")
    loss: float | None = Field(None, description="of the last step")
    eval_loss: float | None = Field(None, description="at the end, where there is a validation set")
    path: str | None = Field(
        None, max_length=200, description="of its adapter, inside the output folder"
    )


class SweepTable(Strict):
    """What came of each configuration. The best one's adapter also stands at the root."""

    best: TrialName = Field(description="whose loss is the lowest")
    by: Literal["eval_loss", "loss"] = Field(description="the loss that was compared")
    trials: tuple[TrialResult, ...] = Field(description="in the order that they were asked for")

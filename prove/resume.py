"""Every method, broken off at random steps and gone on with, beside a run left in peace."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

from prove.proof import Figure, Progress, Result, Setting, at_least, none_of
from rl_fixtures import MATCH, guessing
from train_fixtures import (
    Events,
    Forker,
    Place,
    judged,
    make_model,
    pairs,
    preferences,
    sft,
    tuned,
    write_rows,
)
from tunesmith.manifest import BrokenManifest, verify
from tunesmith.spec.pipe import Inputs
from tunesmith.spec.sampling import Sampling, Weights
from tunesmith.spec.train import (
    AnySpec,
    Best,
    Cpo,
    Grpo,
    Kto,
    Lora,
    Orpo,
    Ppo,
    Preference,
    Pretrain,
    PretrainOptim,
    Reward,
    Rloo,
    Run,
    Simpo,
)

EACH_STEP = Run(save_steps=1, save_seconds=3600, keep_checkpoints=3)
TIMES = {"tokens_per_second", "peak_memory_bytes", "cpu_seconds", "eta_seconds", "type", "time"}
"""Of an event, what may differ."""

TAUGHT = [{"kind": "trained", "learning_rate": 1e-3}]

Make = Callable[[], AnySpec]


@dataclass(frozen=True)
class Kind:
    """A method, and the rows that it is tried on."""

    rows: str
    spec: Make
    is_evaluated: bool = False


def _reinforced(kind: type[Any], **over: Any) -> Make:
    given = {
        "rewards": MATCH,
        "lora": None,
        "max_length": 32,
        "max_completion_length": 4,
        "rollout_batch_size": 4,
        "num_generations": 4,
        "kl_target": 0.05,
        "run": EACH_STEP,
    }
    optim = {"learning_rate": 1e-3, "batch_size": 8, "epochs": 1.0, "max_steps": 24}
    return lambda: kind(model="m", dataset="d", optim=optim, **{**given, **over})


def _tuned(kind: type[Any], **over: Any) -> Make:
    return partial(tuned, kind, run=EACH_STEP, epochs=2.0, **over)


def _sft(lora: Lora | None = None, **over: Any) -> Make:
    return partial(sft, lora, **{"run": EACH_STEP, "epochs": 2.0, **over})


def _pretrain(**over: Any) -> AnySpec:
    optim = PretrainOptim(learning_rate=1e-3, epochs=3, batch_size=2)
    plain = Pretrain(model="m", dataset="d", sequence_length=32, optim=optim, run=EACH_STEP)
    return plain.model_copy(update=over)


_DRAWN = Sampling(
    where={"lang": ("ko", "zh")}, weights=Weights(field="lang", values={"ko": 1.5, "zh": 0.75})
)


_WATCHED = EACH_STEP.model_copy(
    update={"eval_steps": 3, "best": Best(), "generated_rows": 4, "generated_tokens": 8}
)
_TRIALS = {"trials": [{"learning_rate": 5e-3, "rank": 2}, {"dropout": 0.4, "seed": 9}]}
KINDS: Mapping[str, Kind] = {
    "SFT full": Kind("pairs", _sft()),
    "SFT LoRA, dropout": Kind("pairs", _sft(Lora(rank=4, dropout=0.2))),
    "SFT rsLoRA": Kind("pairs", _sft(Lora(rank=4, use_rslora=True))),
    "SFT DoRA": Kind("pairs", _sft(Lora(rank=4, use_dora=True, dropout=0.2))),
    "SFT, the best kept": Kind("pairs", _sft(run=_WATCHED, eval_dataset="e"), is_evaluated=True),
    "sweep of 2": Kind("pairs", _sft(Lora(rank=4), sweep=_TRIALS)),
    "pretraining": Kind("text", _pretrain),
    "pretraining, sampled": Kind("text", partial(_pretrain, sampling=_DRAWN, keep_stages=3)),
    "DPO full": Kind("preferences", _tuned(Preference)),
    "DPO LoRA": Kind("preferences", _tuned(Preference, lora=Lora(rank=4))),
    "KTO": Kind("judged", _tuned(Kto)),
    "ORPO": Kind("preferences", _tuned(Orpo)),
    "CPO": Kind("preferences", _tuned(Cpo)),
    "SimPO": Kind("preferences", _tuned(Simpo)),
    "reward model": Kind("preferences", _tuned(Reward)),
    "GRPO full": Kind("guesses", _reinforced(Grpo)),
    "GRPO LoRA": Kind("guesses", _reinforced(Grpo, lora=Lora(rank=4))),
    "RLOO": Kind("guesses", _reinforced(Rloo)),
    "GRPO, a reward model first": Kind(
        "preferences", _reinforced(Grpo, rewards=TAUGHT, max_length=96, lora=Lora(rank=4))
    ),
    "PPO": Kind("guesses", _reinforced(Ppo, update_epochs=2)),
}


def run(setting: Setting, progress: Progress) -> Result:
    breaks = setting.count(2, 10)
    places = _places(setting.inner("rows"))
    tried: dict[str, Tried] = {}
    with closing(Forker()) as forker:
        for done, (name, kind) in enumerate(KINDS.items()):
            progress(done, len(KINDS), name)
            trial = Trial(forker, places[kind.rows], kind, setting.dice(name))
            tried[name] = trial.run(breaks)
    return Result(_figures(tried, breaks), {name: vars(one) for name, one in tried.items()})


def _figures(tried: Mapping[str, "Tried"], breaks: int) -> tuple[Figure, ...]:
    fewest = min(one.breaks for one in tried.values())
    apart = [f"{name}: {fault}" for name, one in tried.items() for fault in one.differences]
    other = [name for name, one in tried.items() if not one.are_weights_equal]
    told = sum(one.told for one in tried.values())
    return (
        at_least(f"each of {len(tried)} kinds of training: times broken off", fewest, breaks),
        none_of("what they tell that differs in a bit", apart, f"{told} events"),
        none_of("kinds whose final weights differ", other),
    )


def _places(folder: Path) -> dict[str, Place]:
    model = make_model(folder / "model")
    text = [
        {"text": f"{row['prompt']}{row['completion']}.", "metadata": {"lang": lang}}
        for row, lang in zip(pairs(60), cycle(("ko", "zh", "en")), strict=False)
    ]
    rows = {
        "pairs": pairs(40),
        "preferences": preferences(40),
        "judged": judged(40),
        "text": text,
    }
    found = {
        name: Place(_made(folder / name), model, write_rows(folder / f"{name}.jsonl", of))
        for name, of in rows.items()
    }
    return found | {"guesses": guessing(_made(folder / "guesses"), epochs=5)}


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@dataclass
class Tried:
    """What came of one kind."""

    breaks: int = 0
    told: int = 0
    differences: list[str] = field(default_factory=list)
    are_weights_equal: bool = False


@dataclass
class Trial:
    forker: Forker
    place: Place
    kind: Kind
    dice: Random

    def run(self, breaks: int) -> Tried:
        spec = self.kind.spec()
        code, calm = self.forker.run(self._task(spec))
        assert code == 0, calm.last
        found = Tried()
        heard: list[dict[str, Any]] = []
        resume: str | None = None
        last = max(calm.losses)
        for number in range(breaks):
            resume = self._break_off(spec, resume, (number + 1) * last // (breaks + 2), heard)
            found.breaks += 1
        code, end = self.forker.run(self._task(spec, resume))
        assert code == 0, end.last
        expected = _told(calm.all)
        found.told = len(expected)
        found.differences = _differences(expected, _told([*heard, *end.all]))
        found.are_weights_equal = _weights(calm) == _weights(end)
        return found

    def _break_off(
        self, spec: AnySpec, resume: str | None, near: int, heard: list[dict[str, Any]]
    ) -> str | None:
        """Kill a trainer, or ask it to stop, a few steps from `near`; what it can go on from."""
        child = self.forker.fork(self._task(spec, resume))
        at = near + self.dice.randrange(3)
        begun = 0 if resume is None else int(resume.rpartition("-")[2])
        child.wait_for("step", max(1, at - begun))
        time.sleep(self.dice.random() * 0.02)
        number = self.dice.choice((signal.SIGKILL, signal.SIGTERM))
        try:
            os.kill(child.pid, number)
        except ProcessLookupError:
            raise AssertionError("a trainer ended before it could be broken off") from None
        child.wait()
        heard += child.events.all
        return _newest(child.events_path.with_suffix("")) or resume

    def _task(self, spec: AnySpec, resume: str | None = None) -> Any:
        rows, model = str(self.place.dataset), str(self.place.model)
        inputs = Inputs(
            model=model, dataset=rows, eval_dataset=rows if self.kind.is_evaluated else None
        )
        return self.place.task(spec, inputs=inputs, resume_from=resume)


def _newest(attempt: Path) -> str | None:
    """The newest whole checkpoint of an attempt."""
    folders = sorted(
        (attempt / "checkpoints").glob("step-*"), key=lambda one: int(one.name.rpartition("-")[2])
    )
    for folder in reversed(folders):
        try:
            verify(folder)
        except BrokenManifest:
            continue
        return str(folder)
    return None


def _told(events: list[dict[str, Any]]) -> dict[str, set[str]]:
    """Everything that was said of a step, by step; said twice it must be the same."""
    found: dict[str, set[str]] = {}
    for event in events:
        if event["type"] in ("step", "evaluated"):
            key = f"{event['type']} {event['step']} {event.get('trial') or ''}".strip()
            said = {name: value for name, value in event.items() if name not in TIMES}
            found.setdefault(key, set()).add(json.dumps(said, sort_keys=True))
    return found


def _differences(expected: dict[str, set[str]], found: dict[str, set[str]]) -> list[str]:
    return [
        f"{key}: {found.get(key)} beside {expected.get(key)}"[:400]
        for key in sorted({*expected, *found})
        if expected.get(key) != found.get(key)
    ]


def _weights(events: Events) -> dict[str, str]:
    artifact = Path(events.last["artifact"])
    files = sorted(artifact.rglob("*.safetensors"))
    assert files, f"no weights at {artifact}"
    return {
        str(file.relative_to(artifact)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }

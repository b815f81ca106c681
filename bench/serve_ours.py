"""The engine without its HTTP: what `bench/serve.py` compares with peers in their own processes."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from pipe import answer_all
from serve_work import NEW, peak_mb, prompts
from tunesmith.infer.engine import Ask, Engine, Stream
from tunesmith.infer.loading import Loader, Wanted
from tunesmith.infer.model import ServedModel
from tunesmith.infer.runner import Runner
from tunesmith.infer.scheduler import Limits
from tunesmith.infer.sequence import Sequence
from tunesmith.nn.memory import keep_freed_memory
from tunesmith.spec.chat import Sampling

_open: dict[str, Runner] = {}


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(asked["threads"])
    found = {
        "speed": _speed,
        "adapters": _adapters,
        "mixed": _mixed,
        "prefix": _prefix,
        "agreement": _agreement,
    }[asked["what"]](asked)
    return {**found, "peak_mb": peak_mb()}


def _runner(asked: dict[str, Any]) -> Runner:
    key = f"{asked['kind']} {asked['model']}"
    if key not in _open:
        keep_freed_memory()
        _open.clear()
        _open[key] = Runner(ServedModel(Path(asked["model"]), precision=asked["kind"]))
        _answer_all(_engine(_open[key]), prompts(4), 8)
    return _open[key]


def _engine(runner: Runner, kept: int = 0) -> Engine:
    wanted = Wanted(runner.model.shape.path, "bench", runner.model.shape.precision)
    limits = Loader(running=64).size_cache(runner.model)
    assert wanted.path.is_dir()
    return Engine(
        runner,
        Limits(
            running=64,
            blocks=limits.blocks,
            longest=limits.longest,
            has_doubling_rooms=limits.has_doubling_rooms,
            kept=kept,
        ),
    )


def _add(engine: Engine, ids: list[int], new: int, adapter: int | None = None) -> Sequence:
    stream = Stream([Ask(ids, Sampling(max_tokens=new, temperature=0))])
    sequence = stream.sequences[0]
    sequence.emit, sequence.adapter = lambda _: None, adapter
    engine.scheduler.add([sequence])
    return sequence


def _answer_all(engine: Engine, asked: list[list[int]], new: int) -> list[Sequence]:
    sequences = [_add(engine, ids, new) for ids in asked]
    _finish(engine)
    return sequences


def _finish(engine: Engine) -> None:
    while not engine.scheduler.is_idle:
        engine.step()
        engine._outbox.clear()


def _timed(engine: Engine) -> dict[str, float]:
    began, spent = time.perf_counter(), time.process_time()
    _finish(engine)
    return {"wall": time.perf_counter() - began, "cpu": time.process_time() - spent}


def _speed(asked: dict[str, Any]) -> dict[str, Any]:
    engine = _engine(_runner(asked))
    sequences = [_add(engine, ids, NEW) for ids in prompts(asked["concurrency"])]
    spent = _timed(engine)
    return {"tokens": sum(len(each.generated) for each in sequences), **spent}


def _adapters(asked: dict[str, Any]) -> dict[str, Any]:
    """One sequence an adapter, beside as many of the base alone."""
    runner = _runner(asked)
    count = len(asked["adapters"])
    _answer_all(_engine(runner), prompts(count), NEW)
    base_mb = _resident_mb()
    for folder in asked["adapters"]:
        if folder not in runner.model.adapters._known:
            runner.model.adapters.load(folder, Path(folder))
    numbers = [runner.model.adapters.key(folder) for folder in asked["adapters"]]
    own_mb = runner.model.adapters.bytes / 2**20
    found: dict[str, Any] = {"base_mb": base_mb, "adapters_mb": own_mb}
    for name, worn in {"base": [None] * len(numbers), "worn": numbers}.items():
        engine = _engine(runner)
        for ids, number in zip(prompts(len(numbers)), worn, strict=True):
            _add(engine, ids, NEW, number)
        found[name] = _timed(engine)
    return {**found, "together_mb": _resident_mb()}


def _mixed(asked: dict[str, Any]) -> dict[str, Any]:
    """Gaps between the tokens of eight chats, alone and while a long prompt is read."""
    found = {}
    for name, long in {"alone": 0, "beside": asked["long"]}.items():
        engine = _engine(_runner(asked))
        chats = [_add(engine, ids, 400) for ids in prompts(8)]
        while any(each.pending > 1 for each in chats) or engine.scheduler.waiting:
            engine.step()
        if long:
            _add(engine, prompts(1, long, seed=9)[0], 1)
        gaps, spent = [], []
        for _ in range(asked["steps"]):
            began, used = time.perf_counter(), time.process_time()
            engine.step()
            gaps.append(time.perf_counter() - began)
            spent.append(time.process_time() - used)
        for each in chats:
            each.is_cancelled = True
        _finish(engine)
        found[name] = {"wall": _p95(gaps), "cpu": _p95(spent)}
    return found


def _p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def _prefix(asked: dict[str, Any]) -> dict[str, Any]:
    """Until the first token of a prompt, and of another that begins with the same tokens."""
    engine = _engine(_runner(asked), kept=8)
    beginning = prompts(1, asked["shared"], seed=3)[0]
    found = {}
    for name, seed in {"first": 4, "again": 5}.items():
        _add(engine, beginning + prompts(1, 20, seed=seed)[0], 1)
        found[name] = _timed(engine)
    return found


def _agreement(asked: dict[str, Any]) -> dict[str, Any]:
    """The likeliest next token after each of many beginnings, as ids, in order."""
    runner = _runner(asked)
    engine = _engine(runner)
    told: list[int] = []
    for ids in asked["rows"]:
        reading = Reading()
        stream = Stream([Ask(ids, Sampling(max_tokens=0), read=lambda one=reading: one)])
        stream.sequences[0].emit = lambda _: None
        engine.scheduler.add(stream.sequences)
        _finish(engine)
        told += reading.likeliest
    return {"likeliest": told}


class Reading:
    kind = "logits"

    def __init__(self) -> None:
        self.likeliest: list[int] = []

    def read(self, start: int, rows: torch.Tensor) -> None:
        del self.likeliest[start:]
        self.likeliest += rows.argmax(-1).tolist()


def _resident_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


if __name__ == "__main__":
    answer_all(answer)

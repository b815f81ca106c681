"""Torn checkpoints: a trainer is killed while it writes one; then single bytes are flipped in them.

The newest folder that has a checkpoint's name must be whole after every kill: it is read here by
hand, and the next trainer goes on from it. A flipped byte must be seen whatever file it is in, and
the checkpoint before be used.
"""

import hashlib
import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import psutil
from safetensors.torch import load_file

from house import PATIENCE, House
from prove.fleet import open_fleet
from prove.proof import Figure, Progress, Result, Setting, at_least, join, none_of
from train_fixtures import Child, Forker, Place, make_model, pairs, sft, write_rows
from tunesmith import manifest
from tunesmith.spec.train import Lora, Run

EVERY_STEP = Run(save_steps=1, keep_checkpoints=2, save_seconds=3600)
KINDS = (None, Lora(rank=4))


def run(setting: Setting, progress: Progress) -> Result:
    kills, flips = setting.count(50, 200), setting.count(50, 200)
    place = _place(setting.inner("trainers"))
    forker = Forker()
    try:
        torn = Torn(place, forker, setting.dice("torn"))
        torn.rage(kills, progress)
    finally:
        forker.close()
    flipped = flip(place.folder, setting.dice("flips"), flips)
    used = [_previous_used(setting, progress)] if setting.scale >= 1 else []
    return join([torn.result(kills), flipped, *used])


def _place(folder: Path) -> Place:
    model = make_model(folder / "model", layers=4)
    return Place(folder, model, write_rows(folder / "rows.jsonl", pairs(60)))


class Torn:
    """A chain of trainers, each killed while it writes, each from the newest one left behind."""

    def __init__(self, place: Place, forker: Forker, dice: Random) -> None:
        self._place, self._forker, self._dice = place, forker, dice
        self._newest: dict[bool, Path | None] = {}
        self.kills = self.mid = 0
        self.faults: list[str] = []

    def rage(self, kills: int, progress: Progress) -> None:
        while self.mid < kills and len(self.faults) < 5:
            self._one(KINDS[self.kills % len(KINDS)])
            progress(self.mid, kills, "killed while writing a checkpoint")

    def _one(self, lora: Lora | None) -> None:
        before = self._newest.get(lora is None)
        spec = sft(lora, epochs=9999.0, run=EVERY_STEP)
        task = self._place.task(spec, resume_from=before and str(before))
        child = self._forker.fork(task)
        child.wait_for("checkpointed", self._dice.choice([1, 1, 2, 3]))
        folder = Path(task.attempt_dir, "checkpoints")
        self._kill_mid(child, folder)
        self._check_start(child, before)
        newest = _newest(folder)
        fault = unloadable(newest) if newest else "none is left, though some were told of"
        if fault is not None:
            self.faults.append(f"after {self.kills} kills: {newest}: {fault}")
        self._newest[lora is None] = newest
        if before is not None:
            shutil.rmtree(before.parent.parent, ignore_errors=True)

    def _kill_mid(self, child: Child, folder: Path) -> None:
        """While a staging folder is there, at a moment within what writing the last one took."""
        began = _wait_for_staging(folder)
        while any(folder.glob(".step-*.part")):
            time.sleep(0.0005)
        took = time.monotonic() - began
        _wait_for_staging(folder)
        time.sleep(self._dice.uniform(0, took))
        child.signal(signal.SIGKILL)
        child.wait()
        self.kills += 1
        self.mid += any(folder.glob(".step-*.part"))

    def _check_start(self, child: Child, before: Path | None) -> None:
        started = child.events.of("started")
        expected = int(before.name[5:]) if before else 0
        if not started or started[0]["start_step"] != expected:
            self.faults.append(f"a trainer did not go on from step {expected}: {started[:1]}")

    def result(self, wanted: int) -> Result:
        return Result(
            (
                at_least("kills while a checkpoint was written", self.mid, wanted),
                none_of("newest checkpoint cannot be loaded", self.faults, f"{self.kills}"),
            ),
            {"torn": {"kills": self.kills, "mid": self.mid, "faults": self.faults}},
        )


def _wait_for_staging(folder: Path) -> float:
    """Returns the moment at which it was seen."""
    deadline = time.monotonic() + PATIENCE
    while not any(folder.glob(".step-*.part")):
        assert time.monotonic() < deadline, "no checkpoint was begun"
        time.sleep(0.0005)
    return time.monotonic()


def _newest(folder: Path) -> Path | None:
    """By name alone, as anybody would look for it."""
    found = sorted(folder.glob("step-*"), key=lambda path: int(path.name[5:]))
    return found[-1] if found else None


def unloadable(folder: Path) -> str | None:
    """What is wrong with a checkpoint, by reading all of it; without the product's own check."""
    try:
        entries = json.loads((folder / "manifest.json").read_bytes())["files"]
        for entry in entries:
            body = (folder / entry["path"]).read_bytes()
            if hashlib.sha256(body).hexdigest() != entry["sha256"]:
                return f"{entry['path']} is torn"
            if entry["path"].endswith(".safetensors"):
                load_file(folder / entry["path"])
        state = json.loads((folder / "state.json").read_bytes())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    told = state["counts"]["step"]
    return None if folder.name == f"step-{told}" else f"it says step {told}"


# flipped bytes


def flip(folder: Path, dice: Random, count: int) -> Result:
    """So many single bytes in each kind of file of the checkpoints that are left."""
    missed: list[str] = []
    counts: dict[str, int] = {}
    for checkpoint in sorted(folder.glob("attempt-*/checkpoints/step-*")):
        if not (checkpoint / "manifest.json").exists():
            continue
        digest = hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()
        for file in _files(checkpoint):
            name = file.relative_to(checkpoint).as_posix()
            for _ in range(count):
                missed += _flip_one(checkpoint, file, digest, dice)
                counts[name] = counts.get(name, 0) + 1
    kinds = f"{sum(counts.values())} in {len(counts)} kinds of file"
    figure = none_of("flipped bytes not seen", missed, kinds)
    enough = Figure("kinds of file with a byte flipped", "≥ 6", str(len(counts)), len(counts) >= 6)
    return Result((figure, enough), {"flips": {"counts": counts, "missed": missed[:20]}})


def _files(checkpoint: Path) -> Iterator[Path]:
    yield from sorted(
        path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size
    )


def _flip_one(checkpoint: Path, file: Path, digest: str, dice: Random) -> list[str]:
    at, bit = dice.randrange(file.stat().st_size), 1 << dice.randrange(8)
    _turn(file, at, bit)
    try:
        manifest.verify(checkpoint, digest)
    except manifest.BrokenManifest:
        return []
    else:
        return [f"{file}: bit {bit} of byte {at}"]
    finally:
        _turn(file, at, bit)


def _turn(file: Path, at: int, bit: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        [old] = opened.read(1)
        opened.seek(at)
        opened.write(bytes([old ^ bit]))


# in a house


def _previous_used(setting: Setting, progress: Progress) -> Result:
    """A byte of each kind of file in the newest checkpoint of a running job, one job each."""
    dice = setting.dice("previous")
    faults: list[str] = []
    kinds: list[str] = []
    with open_fleet(setting.inner("house"), "sqlite", hosts=0) as fleet:
        house = fleet.house
        for lora in (False, True):
            names = _kinds_of(house, lora)
            for name in names:
                fault = _resumes_before(house, lora, name, dice)
                faults += [f"{name}: {fault}"] if fault else []
                kinds.append(name)
                progress(len(kinds), 2 * len(names), f"a byte of {name}")
    told = f"{len(kinds)} files"
    figure = none_of("flipped byte: checkpoint before not used", faults, told)
    return Result((figure,), {"previous": {"files": kinds, "faults": faults}})


def _job(house: House, lora: bool) -> tuple[str, list[dict[str, Any]]]:
    """A running job with two checkpoints, and those."""
    job_id = house.submit(num_epochs=9999, save_steps=10, use_lora=lora, learning_rate=1e-3)

    def look() -> list[dict[str, Any]]:
        told = [one["data"] for one in house.events(job_id) if one["type"] == "checkpointed"]
        return told if len(told) > 1 else []

    return job_id, house.wait(look)


def _kinds_of(house: House, lora: bool) -> list[str]:
    job_id, told = _job(house, lora)
    _end(house, job_id)
    newest = _newest(Path(told[-1]["path"]).parent)
    assert newest is not None
    return [path.relative_to(newest).as_posix() for path in _files(newest)]


def _end(house: House, job_id: str) -> None:
    with house.client as client:
        client.post(f"/jobs/{job_id}/cancel?force=true")
    house.wait_end(job_id)


def _starts(house: House, job_id: str) -> list[int]:
    """The step at which each attempt began."""
    events = house.events(job_id)
    return [one["data"]["start_step"] for one in events if one["type"] == "started"]


def _freeze_at_rest(house: House, job_id: str, trainer: psutil.Process) -> list[dict[str, Any]]:
    """With its newest checkpoint told of, and none begun. Returns all that were told of."""
    while True:
        trainer.send_signal(signal.SIGSTOP)
        time.sleep(1.0)  # what it had said is on its way
        told = [one["data"] for one in house.events(job_id) if one["type"] == "checkpointed"]
        shelf = Path(told[-1]["path"]).parent
        if _newest(shelf) == Path(told[-1]["path"]) and not any(shelf.glob(".step-*")):
            return told
        trainer.send_signal(signal.SIGCONT)
        time.sleep(0.1)


def _resumes_before(house: House, lora: bool, name: str, dice: Random) -> str | None:
    job_id, _ = _job(house, lora)
    trainer = house.trainer(job_id)
    told = _freeze_at_rest(house, job_id, trainer)
    victim = Path(told[-1]["path"], name)
    _turn(victim, dice.randrange(victim.stat().st_size), 1 << dice.randrange(8))
    trainer.kill()
    starts = house.wait(lambda: found if len(found := _starts(house, job_id)) > 1 else None)
    events = house.events(job_id)
    _end(house, job_id)
    notices = [one["data"].get("code") for one in events if one["type"] == "notice"]
    if "checkpoint_rejected" not in notices or starts[1] != told[-2]["step"]:
        return f"resumed at {starts[1]}, not at {told[-2]['step']}; notices: {notices}"
    return None

"""Bit-equal training: a job whose trainer is killed again and again, beside one left in peace."""

import hashlib
import signal
import time
from pathlib import Path
from random import Random
from typing import Any

from house import House
from prove.fleet import Fleet, open_fleet
from prove.processes import living
from prove.proof import Figure, Progress, Result, Setting, at_least, none_of

STEPS_A_KILL = 80
"""Optimizer steps of the job, for each time that it is killed."""
KINDS: dict[str, dict[str, Any]] = {
    "SFT full": {"use_lora": False},
    "SFT LoRA": {"use_lora": True, "lora_dropout": 0.1},
    "DPO full": {"kind": "dpo", "use_lora": False, "learning_rate": 1e-5},
    "DPO LoRA": {"kind": "dpo", "use_lora": True},
}


def run(setting: Setting, progress: Progress) -> Result:
    kills = setting.count(5, 20)
    figures: list[Figure] = []
    detail: dict[str, Any] = {}
    with open_fleet(setting.inner("house"), "sqlite", hosts=0, TUNESMITH_CPU_SLOTS="1") as fleet:
        for done, (kind, body) in enumerate(KINDS.items()):
            progress(done, len(KINDS), kind)
            pair = Pair(fleet, body, kills, setting.dice(kind))
            figures += pair.figures(kind)
            detail[kind] = {"kills": pair.kills, "mid": pair.mid, "differences": pair.differences}
    return Result(tuple(figures), detail)


class Pair:
    """One job disturbed, the same job undisturbed."""

    def __init__(self, fleet: Fleet, body: dict[str, Any], kills: int, dice: Random) -> None:
        self._house, self._dice = fleet.house, dice
        self.wanted, self.kills, self.mid = kills, 0, 0
        whole = {
            "max_steps": STEPS_A_KILL * (kills + 1),
            "num_epochs": 9999,
            "save_steps": 20,
            "learning_rate": 1e-3,
            **body,
        }
        disturbed = self._disturb(self._house.submit(**whole))
        calm = self._house.submit(**whole)
        for job_id in (disturbed, calm):
            job = self._house.wait_end(job_id)
            assert job["status"] == "completed", job
        self.differences = self._compare(disturbed, calm)
        self.are_weights_equal = _weights(self._house, disturbed) == _weights(self._house, calm)

    def _disturb(self, job_id: str) -> str:
        """Half of the kills come while a checkpoint is written."""
        last = 0
        while self.kills < self.wanted and not self._has_ended(job_id):
            trainers = [one for one in living(self._house.workspace) if one.role == "trainer"]
            if not trainers or trainers[0].pid == last or not self._goes_on(job_id):
                time.sleep(0.01)
                continue
            if self.kills % 2:
                is_mid = self._wait_for_staging(job_id)
                self.mid += is_mid
            else:
                time.sleep(self._dice.uniform(0, 0.4))
            last = trainers[0].pid
            self.kills += trainers[0].send(signal.SIGKILL)
        return job_id

    def _goes_on(self, job_id: str) -> bool:
        """Whether this attempt has made a checkpoint: else the job gets nowhere."""
        folders = self._attempts(job_id)
        return bool(folders) and any((folders[-1] / "checkpoints").glob("step-*"))

    def _attempts(self, job_id: str) -> list[Path]:
        found = (self._house.home / "jobs" / job_id / "attempts").glob("*")
        return sorted(found, key=lambda path: int(path.name))

    def _wait_for_staging(self, job_id: str) -> bool:
        folder = self._attempts(job_id)[-1] / "checkpoints"
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if any(folder.glob(".step-*.part")):
                time.sleep(self._dice.uniform(0, 0.01))
                return True
            time.sleep(0.0005)
        return False

    def _has_ended(self, job_id: str) -> bool:
        return str(self._house.job(job_id)["status"]) in ("completed", "failed", "cancelled")

    def _compare(self, disturbed: str, calm: str) -> list[str]:
        """By step, in hex; a step that was told twice must be the same both times."""
        found = []
        expected = dict(_losses(self._house, calm))
        seen = set()
        for step, loss in _losses(self._house, disturbed):
            seen.add(step)
            if expected.get(step) != loss:
                found.append(f"step {step}: {loss} beside {expected.get(step)}")
        found += [f"step {step} is not told" for step in sorted(set(expected) - seen)]
        self.steps = len(expected)
        return found

    def figures(self, kind: str) -> list[Figure]:
        equal = "equal" if self.are_weights_equal else "different"
        return [
            at_least(f"{kind}: kills ({self.mid} while writing)", self.kills, self.wanted),
            none_of(f"{kind}: losses that differ in a bit", self.differences, f"{self.steps}"),
            Figure(f"{kind}: final weights' SHA-256", "equal", equal, self.are_weights_equal),
        ]


def _losses(house: House, job_id: str) -> list[tuple[int, str]]:
    told = [one["data"] for one in house.events(job_id) if one["type"] == "step"]
    return [(one["step"], float(one["loss"]).hex()) for one in told]


def _weights(house: House, job_id: str) -> dict[str, str]:
    folder = house.workspace / "outputs" / job_id
    files = sorted(folder.glob("*.safetensors"))
    assert files, f"no weights at {folder}"
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

"""Worker hosts in network namespaces: one is cut off and healed while its trainer goes on."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

import netns
from hosts import Host
from house import House, build
from servers import wait_for

JOB = {"num_epochs": 15, "save_steps": 20, "lora_dropout": 0.1, "learning_rate": 1e-3}
BUCKET = "models"
STORE_PORT = 5100
API_PORT = 8100


class Locked(House):
    """A house that is asked with a key."""

    key = ""

    @property
    def client(self) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx2.Client(base_url=self.url, timeout=60, trust_env=False, headers=headers)

    def make_key(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "tunesmith.cli", "keys", "make", *arguments],
            env=os.environ | {"TUNESMITH_WORKSPACE": str(self.workspace)},
            capture_output=True,
            check=True,
            text=True,
        )
        return done.stdout.strip()


@dataclass
class Place:
    net: netns.Network
    house: Locked
    a: Host
    b: Host

    def run(self, **fields: Any) -> str:
        return self.house.submit(**(JOB | fields))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    if not netns.has_root():
        pytest.skip("needs root; the first test of this file sees to it")
    folder = tmp_path_factory.mktemp("hosts")
    with netns.network() as net:
        address = net.add("api")
        net.add("a")
        net.add("b")
        house = _house(folder / "house")
        token = house.make_key("--worker")
        url = f"http://{address}:{API_PORT}"
        with net.inside("api"):
            house.start("api", "--no-worker", "--host", address)
            hosts = [Host(folder / name, url, token, net.prefix(name)) for name in ("a", "b")]
            try:
                yield Place(net, house, *hosts)
            finally:
                for host in hosts:
                    host.end()
                house.end()


def _house(workspace: Path) -> Locked:
    workspace.mkdir()
    built = build(workspace)
    house = Locked(workspace, {"TUNESMITH_LEASE_SECONDS": "2.5"}, port=API_PORT)
    house.key = house.make_key("--owner", "한국어")
    assert built.workspace == house.workspace
    return house


def test_the_rest_of_this_file_runs_as_root_of_a_namespace() -> None:
    if not netns.has_root():
        netns.run_as_root_of_a_namespace(Path(__file__))


def test_a_host_that_is_cut_off_is_fenced_and_another_goes_on_to_the_same_result(
    place: Place,
) -> None:
    place.a.start()
    place.b.start()
    place.net.cut("b")
    disturbed = _cut_off_in_mid_training(place)
    place.net.heal("a")
    _check_zombie(place, disturbed)
    undisturbed = place.run()
    assert place.house.wait_end(undisturbed)["status"] == "completed"
    _check_same(place, disturbed, undisturbed)


def test_the_same_holds_with_checkpoints_in_an_object_store(place: Place) -> None:
    undisturbed = _last_job(place)
    place.house.stop()
    store, address = _store(place)
    try:
        place.house.over |= {
            "TUNESMITH_OBJECT_STORE_URL": f"s3://{BUCKET}/한국/tunesmith",
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }
        place.house.start("api", "--no-worker", "--host", "10.77.0.1")
        place.net.cut("b")
        disturbed = _cut_off_in_mid_training(place)
        attempts = place.house.home / "jobs" / disturbed / "attempts"
        notes = list(attempts.glob("1/checkpoints/*/stored.json"))
        assert notes
        assert not list(attempts.glob("1/checkpoints/*/*.safetensors"))
        place.net.heal("a")
        _check_zombie(place, disturbed)
        _check_same(place, disturbed, undisturbed)
    finally:
        place.house.stop()
        store.kill()
        store.wait()


def _cut_off_in_mid_training(place: Place) -> str:
    """A has the job, is cut off, and B has begun to go on from A's last accepted checkpoint.

    B was cut off before, so that it was A who got the job.
    """
    job_id = place.run()
    place.house.wait_event(job_id, "checkpointed")
    [trainer] = place.a.trainers()
    trainer.suspend()  # or it might be done before anybody misses it
    place.net.cut("a")
    place.net.heal("b")
    started = place.house.wait(lambda: _started(place.house, job_id, fence=2))
    assert started["data"]["start_step"] >= JOB["save_steps"]
    made = _checkpoints(place.a, job_id)
    trainer.resume()
    place.house.wait(lambda: _checkpoints(place.a, job_id) != made)
    return job_id


def _checkpoints(host: Host, job_id: str) -> set[str]:
    """What a cut off trainer has made goes nowhere."""
    place = host.home / "jobs" / job_id / "attempts" / "1" / "checkpoints"
    return {path.name for path in place.glob("step-*")}


def _check_zombie(place: Place, job_id: str) -> None:
    """A hears that another attempt owns the job: its trainer is killed, its files stay."""
    place.house.wait(lambda: f"job {job_id}: attempt 1 was fenced" in place.a.log)
    place.house.wait(lambda: not place.a.trainers())
    assert (place.a.home / "jobs" / job_id / "attempts" / "1").is_dir()
    assert place.house.wait_end(job_id)["status"] == "completed"
    events = place.house.events(job_id)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    fences = [event["fence"] for event in events]
    assert fences == sorted(fences)
    assert sum(event["type"] == "succeeded" for event in events) == 1


def _check_same(place: Place, one: str, other: str) -> None:
    assert _losses(place.house, one) == _losses(place.house, other)
    weights = [
        (place.house.workspace / "outputs" / name / "adapter_model.safetensors").read_bytes()
        for name in (one, other)
    ]
    assert weights[0] == weights[1]


def _started(house: House, job_id: str, fence: int) -> dict[str, Any] | None:
    found = [event for event in house.events(job_id) if event["type"] == "started"]
    return next((event for event in found if event["fence"] == fence), None)


def _losses(house: House, job_id: str) -> dict[int, float]:
    steps = [event["data"] for event in house.events(job_id) if event["type"] == "step"]
    return {step["step"]: step["loss"] for step in steps}


def _last_job(place: Place) -> str:
    [row] = place.house.query("select id from jobs order by number desc limit 1")
    return str(row[0])


def _store(place: Place) -> "tuple[subprocess.Popen[bytes], str]":
    """An S3 server beside the API, with a bucket."""
    address = f"http://10.77.0.1:{STORE_PORT}"
    store = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "10.77.0.1", "-p", str(STORE_PORT)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def is_up() -> bool:
        try:
            return httpx2.put(f"{address}/{BUCKET}", trust_env=False).status_code == 200
        except httpx2.HTTPError:
            return False

    wait_for(is_up, "the object store")
    return store, address

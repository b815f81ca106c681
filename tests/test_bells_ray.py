"""A Ray cluster of one node runs the jobs; what is killed in it loses none."""

from collections.abc import Iterator

import psutil
import pytest

from bells_fixtures import is_gone
from house import House, open_house


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """One cluster for all tests: its start costs seconds."""
    with open_house(tmp_path_factory.mktemp("ray"), ("api", "--bell", "ray")) as opened:
        yield opened
    opened.wait(lambda: not opened.children(""))


def long_job(house: House) -> str:
    job_id = house.submit(num_epochs=20, save_steps=20, learning_rate=1e-3)
    house.wait_event(job_id, "checkpointed")
    return job_id


def token(house: House) -> dict[str, str]:
    return {"Authorization": f"Bearer {(house.home / 'worker.token').read_text()}"}


@pytest.mark.timeout(900)  # two starts of a cluster, on a busy machine
def test_a_job_survives_the_end_of_its_task_and_of_the_whole_cluster(house: House) -> None:
    """kill -9 of Ray's process round the task, then of the dispatcher, which is Ray's head."""
    job_id = long_job(house)
    trainer = house.trainer(job_id)
    worker = house.worker()
    house.kill(psutil.Process(worker.ppid()))
    house.wait(lambda: is_gone(trainer) and is_gone(worker))
    house.wait_event(job_id, "requeued", reason="lapse")
    house.wait(lambda: len(starts(house, job_id)) == 2)
    trainer = house.trainer(job_id)
    house.kill(*house.children("tunesmith.work.ray"))
    house.wait(lambda: is_gone(trainer))
    house.wait(lambda: "dispatcher ended" in (house.workspace / "server.log").read_text())
    house.wait(lambda: house.children("raylet/raylet"))  # a new cluster is long in coming
    house.wait(lambda: len(starts(house, job_id)) == 3)
    job = house.wait_end(job_id)
    assert (job["status"], job["attempts"]) == ("completed", 3), job
    assert starts(house, job_id)[0] == 0
    assert all(step >= 20 for step in starts(house, job_id)[1:])


def starts(house: House, job_id: str) -> list[int]:
    events = house.events(job_id)
    return [event["data"]["start_step"] for event in events if event["type"] == "started"]


def test_a_job_is_cancelled_while_its_task_runs_and_its_place_is_free(house: House) -> None:
    job_id = house.submit(num_epochs=10_000)
    house.wait_event(job_id, "step")
    worker = house.worker()
    with house.client as client:
        client.post(f"/jobs/{job_id}/cancel")
    assert house.wait_end(job_id)["status"] == "cancelled"
    house.wait(lambda: is_gone(worker))


def test_the_api_counts_the_cluster_and_lists_the_queue_to_operators_only(house: House) -> None:
    with house.client as client:
        house.wait(lambda: client.get("/health").json()["workers"] == 1)
        assert client.get("/internal/v1/waiting").status_code == 401
        listed = client.get("/internal/v1/waiting", headers=token(house))
    assert listed.json() == {"jobs": []}
    [(capacity,)] = house.query("select capacity from workers")
    assert '"slots":0' in capacity.replace(" ", "")


def test_a_server_that_stops_lets_the_task_write_a_checkpoint(house: House) -> None:
    job_id = long_job(house)
    house.stop()
    house.wait(lambda: not house.children(""))
    assert house.query("select state, lapses from jobs where id = :id", id=job_id) == [
        ("queued", 0)
    ]

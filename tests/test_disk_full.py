"""A full disk stops nothing that runs, loses nothing that was said, and heals without a restart."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from api_fixtures import ASKED, ONE, make_workspace, open_door
from disks import Disk, a_disk
from house import KEY, PATIENCE, House, build
from train_fixtures import Forker, Place, make_model, pairs, sft, write_rows
from tunesmith import manifest
from tunesmith.spec.train import Run
from tunesmith.store.reserve import PIECES, Reserve, Room

MB = 1 << 20


def until(look: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


# the reserve


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with a_disk(tmp_path / "disk", "8m") as mounted:
        yield mounted


def test_a_reserve_holds_bytes_and_names_and_gives_them_back_piece_by_piece(disk: Disk) -> None:
    before = Room.of(disk.folder)
    reserve = Reserve(disk.folder / "reserve", 4 * MB)
    assert reserve.hold()
    assert reserve.hold()
    held = Room.of(disk.folder)
    assert before.bytes - held.bytes >= 4 * MB
    assert before.names is not None
    assert held.names is not None
    assert before.names - held.names >= PIECES
    disk.fill()
    assert disk.free_bytes == 0
    assert reserve.release()
    assert disk.free_bytes == 4 * MB // PIECES
    disk.fill()  # somebody was quicker
    assert not reserve.hold()
    assert disk.free_bytes == 0
    assert reserve.release(PIECES)
    assert not reserve.release()
    disk.empty()
    assert reserve.hold()


def test_a_reserve_of_nothing_is_always_held(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path / "reserve", 0)
    assert reserve.hold()
    assert not reserve.release()
    assert not (tmp_path / "reserve").exists()


# the server


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return make_workspace(tmp_path)


def open_on(disk: Disk, workspace: Path, **over: Any) -> Any:
    return open_door(
        workspace,
        database_url=f"sqlite:///{disk.folder}/db.sqlite",
        reserve_bytes=MB,
        reaper_seconds=0.1,
        **over,
    )


def submit_until_full(door: TestClient) -> list[str]:
    """The ids that were acknowledged before the first refusal, which must be a clear one."""
    taken: list[str] = []
    for _ in range(3000):
        reply = door.post("/train/sft", json=ASKED, headers=ONE)
        if reply.status_code != 200:
            assert reply.status_code == 507, reply.text
            assert "disk" in reply.json()["detail"]
            assert "full" in reply.json()["detail"]
            return taken
        taken.append(reply.json()["job_id"])
    raise AssertionError("the disk was never full")


def test_a_full_database_disk_refuses_new_jobs_alone_and_heals_by_itself(
    disk: Disk, workspace: Path
) -> None:
    with open_on(disk, workspace) as door:
        assert door.get("/health/ready").json() == {"ready": True, "reason": None}
        disk.fill(leave_bytes=MB + MB // 4)
        taken = submit_until_full(door)
        disk.fill()
        assert len(taken) > 5
        refused = door.get("/health/ready")
        assert refused.status_code == 503
        assert refused.headers["Retry-After"] == "5"
        assert "is full" in refused.json()["reason"]
        assert str(disk.folder) in refused.json()["reason"]
        assert door.get("/health").status_code == 200
        assert len(door.get("/jobs?limit=1000", headers=ONE).json()) >= min(len(taken), 5)
        for job_id in taken[:20]:  # by the reserve
            assert door.get(f"/jobs/{job_id}", headers=ONE).json()["job_id"] == job_id
            reply = door.post(f"/jobs/{job_id}/cancel", headers=ONE)
            assert reply.status_code == 200, reply.text
        assert door.post("/train/sft", json=ASKED, headers=ONE).status_code == 507
        disk.empty()
        until(lambda: door.get("/health/ready").status_code == 200)
        assert door.post("/train/sft", json=ASKED, headers=ONE).status_code == 200
        for job_id in taken:
            state = door.get(f"/jobs/{job_id}", headers=ONE).json()["status"]
            assert state == ("cancelled" if job_id in taken[:20] else "pending")


def test_a_disk_without_names_is_a_full_disk(tmp_path: Path, workspace: Path) -> None:
    with (
        a_disk(tmp_path / "few", "32m", "nr_inodes=100") as few,
        open_on(few, workspace) as door,
    ):
        few.fill_names()
        assert door.post("/train/sft", json=ASKED, headers=ONE).status_code == 507
        until(lambda: door.get("/health/ready").status_code == 503)
        assert "0 names" in door.get("/health/ready").json()["reason"]
        few.empty()
        until(lambda: door.get("/health/ready").status_code == 200)
        assert door.post("/train/sft", json=ASKED, headers=ONE).status_code == 200


def test_a_server_starts_on_a_full_disk_and_says_so(disk: Disk, workspace: Path) -> None:
    with open_on(disk, workspace) as door:
        job_id = door.post("/train/sft", json=ASKED, headers=ONE).json()["job_id"]
    disk.fill()
    with open_on(disk, workspace) as door:
        assert door.get("/health/ready").status_code == 503
        assert door.get(f"/jobs/{job_id}", headers=ONE).json()["status"] == "pending"
        assert door.post(f"/jobs/{job_id}/cancel", headers=ONE).status_code == 200
        disk.empty()
        until(lambda: door.get("/health/ready").status_code == 200)


def test_an_upload_that_finds_no_room_leaves_nothing(tmp_path: Path, workspace: Path) -> None:
    with (
        a_disk(workspace / ".tunesmith", "8m") as home,
        open_door(workspace, reserve_bytes=MB, reaper_seconds=0.1) as door,
    ):
        home.fill(leave_bytes=2 * MB)
        row = b'{"prompt": "\xea\xb0\x95", "completion": "x"}\n'
        large = {"file": ("rows.jsonl", row * (3 * MB // len(row)))}
        reply = door.post("/upload/dataset", files=large, headers=ONE)
        assert reply.status_code == 507, reply.text
        assert list((home.folder / "blobs").iterdir()) == []
        small = {"file": ("rows.jsonl", row * 10)}
        assert door.post("/upload/dataset", files=small, headers=ONE).status_code == 200


def test_a_running_job_and_a_chat_go_on_while_the_disk_is_full(tmp_path: Path) -> None:
    house = build(tmp_path, TUNESMITH_RESERVE_BYTES=str(2 * MB))
    with a_disk(house.home, "64m") as home:
        try:
            go_through_a_full_disk(house.start(), home)
        finally:
            house.end()


def go_through_a_full_disk(house: House, home: Disk) -> None:
    talk = {
        "model": "models/tiny",
        "messages": [{"role": "user", "content": "강물 🌊"}],
        "max_tokens": 2,
    }
    with house.client as client:
        assert client.post(
            "/v1/chat/completions", json=talk, headers=KEY, timeout=PATIENCE
        ).is_success
        long, short = house.submit(num_epochs=10_000), house.submit(num_epochs=3)
        house.wait_event(long, "step")
        home.fill()
        house.wait(lambda: client.get("/health/ready").status_code == 503)
        at = house.job(long)["state"]
        assert at in ("starting", "running")
        assert client.post(
            "/v1/chat/completions", json=talk, headers=KEY, timeout=PATIENCE
        ).is_success
        home.fill()
        assert client.post(f"/jobs/{long}/cancel").status_code == 200
        home.empty()
        house.wait(lambda: client.get("/health/ready").status_code == 200)
        assert house.wait_end(long)["status"] == "cancelled"
        ended = house.wait_end(short)
        assert (ended["status"], ended["attempts"]) in (("completed", 1), ("failed", 1))
        if ended["status"] == "failed":
            failed = house.wait_event(short, "failed")
            assert failed["data"]["failure_class"] == "disk_full"
        for job_id in (long, short):
            events = house.events(job_id)
            assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
        again = house.submit(max_steps=2)
        assert house.wait_end(again)["status"] == "completed"
    assert " 500 " not in (house.workspace / "server.log").read_text()
    assert "Traceback" not in (house.workspace / "server.log").read_text()


# the trainer


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    made = Forker()
    yield made
    made.close()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(
        tmp_path, make_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", pairs(60))
    )


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Disk]:
    """Under the folder of the first attempt; what it says and its log lie beside it."""
    with a_disk(tmp_path / "attempt-1", "24m") as mounted:
        yield mounted


def endless(place: Place, keep: int) -> Any:
    run = Run(save_steps=10, keep_checkpoints=keep, save_seconds=3600)
    return place.task(sft(epochs=9999, run=run))


def checkpoints(task: Any) -> list[Path]:
    return sorted(Path(task.attempt_dir, "checkpoints").iterdir())


def test_training_goes_on_over_a_checkpoint_that_had_no_room(
    forker: Forker, place: Place, work: Disk
) -> None:
    task = endless(place, keep=1)
    child = forker.fork(task)
    child.wait_for("checkpointed")
    work.fill()
    until(lambda: any(said["code"] == "checkpoint_failed" for said in child.events.of("notice")))
    [kept] = checkpoints(task)
    manifest.verify(kept)
    told = len(child.events.of("checkpointed"))
    work.empty()
    child.wait_for("checkpointed", told + 1)
    child.signal(signal.SIGTERM)
    assert child.wait() == 0
    assert child.events.last["type"] == "stopped"
    manifest.verify(Path(child.events.of("checkpointed")[-1]["path"]))


def test_older_checkpoints_make_room_for_a_new_one_but_the_newest_stays(
    forker: Forker, place: Place, work: Disk
) -> None:
    task = endless(place, keep=5)
    child = forker.fork(task)
    child.wait_for("checkpointed", 3)
    size = child.events.of("checkpointed")[0]["size_bytes"]
    child.signal(signal.SIGSTOP)
    work.fill(leave_bytes=size // 2)
    before = {path.name for path in checkpoints(task)}
    child.signal(signal.SIGCONT)
    told = len(child.events.of("checkpointed"))
    child.wait_for("checkpointed", told + 2)
    child.signal(signal.SIGKILL)
    child.wait()
    whole = [path for path in checkpoints(task) if not path.name.endswith(".part")]
    assert whole
    assert {path.name for path in whole} != before
    newest = max(whole, key=lambda path: int(path.name[5:]))
    manifest.verify(newest)


def test_a_model_that_finds_no_room_fails_the_job_in_numbers(
    forker: Forker, place: Place, work: Disk
) -> None:
    run = Run(save_steps=20, save_seconds=3600, keep_checkpoints=1)
    task = place.task(sft(epochs=99, max_steps=400, run=run))
    child = forker.fork(task)
    child.wait_for("checkpointed")
    work.fill()
    assert child.wait() == 1
    failed = child.events.last
    assert failed["failure_class"] == "disk_full"
    assert "no room for the finished model: it wants about " in failed["message"]
    assert " MB left" in failed["message"]
    assert str(task.attempt_dir) in failed["message"]
    [kept] = checkpoints(task)
    manifest.verify(kept)
    assert {path.name for path in Path(task.attempt_dir).iterdir()} == {"checkpoints", "filler"}


def test_a_job_that_can_never_keep_its_model_fails_before_its_first_step(
    forker: Forker, place: Place, work: Disk
) -> None:
    task = place.task(sft(max_steps=3))
    work.fill(leave_bytes=MB // 2)
    status, events = forker.run(task)
    assert status == 1
    assert not events.of("started")
    assert events.last["failure_class"] == "disk_full"
    assert "it wants about" in events.last["message"]


def test_little_room_is_a_warning_at_the_start(forker: Forker, place: Place, work: Disk) -> None:
    task = place.task(sft(max_steps=2))
    work.fill(leave_bytes=2 * MB)
    status, events = forker.run(task)
    assert status == 0
    assert "disk_low" in {said["code"] for said in events.of("notice")}
    assert events.last["type"] == "finished"

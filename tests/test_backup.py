"""A backup of a busy house, and what becomes of it: every acknowledged job, with all it needs."""

import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from api_fixtures import ASKED, ONE, make_workspace, open_door
from disks import a_disk
from house import House, open_house
from tunesmith import manifest
from tunesmith.cli import main
from tunesmith.errors import (
    BadRequestError,
    ConflictError,
    NoSpaceError,
    NotFoundError,
    ServerError,
)
from tunesmith.hub.backup import Made, back_up
from tunesmith.hub.restore import Restored, restore
from tunesmith.settings import Settings
from tunesmith.store import migrate, sqlite
from work_fixtures import Bench, an_api


@pytest.fixture(params=["sqlite", "postgresql"])
def databases(request: pytest.FixtureRequest) -> Callable[[], str]:
    """Makes an empty database and returns its URL; for SQLite it is the workspace's own file."""
    if request.param == "sqlite":
        return str
    postgres = request.getfixturevalue("postgres")
    return lambda: str(postgres.database())


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return make_workspace(tmp_path / "작업 水")


def settings(workspace: Path, url: str = "") -> Settings:
    return Settings.read({}, workspace=workspace, database_url=url, reserve_bytes=0)


def save(workspace: Path, url: str, into: Path, with_models: bool = False) -> Made:
    return back_up(settings(workspace, url), into, with_models=with_models, tell=lambda _: None)


def build_again(source: Path, workspace: Path, url: str = "") -> Restored:
    return restore(source, settings(workspace, url), lambda _: None)


def test_a_backup_under_load_holds_every_job_and_file_that_was_acknowledged_before_it(
    tmp_path: Path, workspace: Path, databases: Callable[[], str]
) -> None:
    url = databases()
    taken: list[str] = []
    kept: list[str] = []
    is_over = threading.Event()

    def storm(number: int) -> None:
        turn = 0
        while not is_over.is_set():
            turn += 1
            reply = door.post("/train/sft", json=ASKED, headers=ONE)
            taken.append(reply.json()["job_id"])
            row = json.dumps({"prompt": f"강 {number} {turn}", "completion": "水 🌊"})
            sent = {"file": (f"{number}-{turn}.jsonl", row.encode() + b"\n")}
            reply = door.post("/upload/dataset", files=sent, headers=ONE)
            assert reply.status_code == 200, reply.text
            kept.append(reply.json()["dataset_path"])

    with open_door(workspace, database_url=url, reserve_bytes=0) as door:
        senders = [threading.Thread(target=storm, args=(number,)) for number in range(3)]
        for sender in senders:
            sender.start()
        while len(kept) < 12 and any(sender.is_alive() for sender in senders):
            is_over.wait(0.02)
        before, held = list(taken), list(kept)
        made = save(workspace, url, tmp_path / "backup")
        is_over.set()
        for sender in senders:
            sender.join()
    assert made.left_out == []
    again, new_url = tmp_path / "again", databases()
    build_again(tmp_path / "backup", again, new_url)
    shutil.copytree(workspace / "models", again / "models")
    (again / "data").mkdir(exist_ok=True)
    with open_door(again, database_url=new_url, reserve_bytes=0) as door:
        listed = door.get("/jobs?limit=1000", headers=ONE).json()
        jobs = {job["job_id"] for job in listed}
        assert set(before) <= jobs
        for path in held:
            reply = door.post("/train/sft", json=ASKED | {"dataset_path": path}, headers=ONE)
            assert reply.status_code == 200, reply.text
        hub = door.app.state.hub  # type: ignore[attr-defined]
        for job_id in jobs:
            seqs = [event.seq for event in hub.events_after(job_id, 0)]
            assert seqs == list(range(1, len(seqs) + 1))
            job = hub.store.read(lambda tx, job_id=job_id: _row(tx, job_id))
            assert job["last_seq"] == len(seqs)
            assert Path(job["dataset"]["path"]).is_file()
            assert Path(job["dataset"]["path"]).is_relative_to(again)
            assert job["output_dir"] == str(again / "outputs" / job_id)


def _row(tx: Any, job_id: str) -> dict[str, Any]:
    from tunesmith.store.tables import jobs

    return dict(tx.execute(jobs.select().where(jobs.c.id == job_id)).mappings().one())


def test_a_job_that_ran_goes_on_from_its_checkpoint_in_the_restored_house(tmp_path: Path) -> None:
    with open_house(tmp_path / "one") as house:
        ended = house.submit(max_steps=2)
        assert house.wait_end(ended)["status"] == "completed"
        job_id = house.submit(num_epochs=60, save_steps=20)
        house.wait_event(job_id, "checkpointed")
        arguments = ["backup", str(tmp_path / "saved"), "--with-models"]
        assert main([*arguments, "--workspace", str(house.workspace)]) == 0
    assert main(["restore", str(tmp_path / "saved"), "--workspace", str(tmp_path / "two")]) == 0
    second = House(tmp_path / "two")
    shutil.copytree(house.workspace / "models", second.workspace / "models")
    assert stat.S_IMODE(second.home.stat().st_mode) == 0o700
    assert stat.S_IMODE((second.home / "worker.token").stat().st_mode) == 0o600
    manifest.verify(second.workspace / "outputs" / ended)
    try:
        second.start()
        again = second.wait_event(job_id, "requeued")
        assert again["data"]["reason"] == "restored"
        assert again["data"]["lapses"] == 0
        assert second.wait(lambda: starts(second, job_id)[1:])[0] >= 20
        with second.client as client:
            assert client.post(f"/jobs/{job_id}/cancel").status_code == 200
        assert second.wait_end(job_id)["status"] == "cancelled"
        assert second.job(ended)["status"] == "completed"
        fences = [event["fence"] for event in second.events(job_id)]
        assert fences == sorted(fences)
    finally:
        second.end()


def starts(house: House, job_id: str) -> list[int]:
    """The step that each attempt began at."""
    events = house.events(job_id)
    return [event["data"]["start_step"] for event in events if event["type"] == "started"]


def test_a_job_whose_checkpoints_were_not_backed_up_starts_anew_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    row = {
        "job_id": "0badcafe",
        "fence": 1,
        "step": 20,
        "path": str(tmp_path / "attempts" / "1" / "checkpoints" / "step-20"),
        "manifest_sha256": "0" * 64,
        "size_bytes": 1,
        "at": 0.0,
    }
    with an_api(tmp_path) as api:
        bench = Bench(tmp_path, api)
        script = "assert task['resume_from'] is None; finish()"
        outcome = bench.run(script, fence=2, checkpoints=[row])
        assert outcome["kind"] == "succeeded"
        [(_, notice)] = api.events
        assert notice["code"] == "checkpoint_missing"
        assert "starts from the beginning" in notice["message"]


@pytest.fixture
def saved(tmp_path: Path, workspace: Path) -> Path:
    with open_door(workspace, reserve_bytes=0) as door:
        assert door.post("/train/sft", json=ASKED, headers=ONE).status_code == 200
    save(workspace, "", tmp_path / "saved")
    return tmp_path / "saved"


def test_a_backup_is_private_and_says_what_it_is(saved: Path, workspace: Path) -> None:
    assert stat.S_IMODE(saved.stat().st_mode) == 0o700
    for name in ("database.sqlite", "files/.tunesmith/worker.token"):
        assert stat.S_IMODE((saved / name).stat().st_mode) == 0o600
    detail = manifest.verify(saved).detail
    assert detail["database"] == "sqlite"
    assert detail["workspace"] == str(workspace)
    token = (workspace / ".tunesmith" / "worker.token").read_bytes()
    assert (saved / "files" / ".tunesmith" / "worker.token").read_bytes() == token


def every_file(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def test_a_changed_or_missing_byte_anywhere_is_refused(saved: Path, tmp_path: Path) -> None:
    for path in every_file(saved):
        body = path.read_bytes()
        for damaged in (body[:-1], body[:-1] + bytes([body[-1] ^ 1])):
            path.write_bytes(damaged)
            with pytest.raises((BadRequestError, ServerError)):
                build_again(saved, tmp_path / "again")
            path.write_bytes(body)
    (saved / "files" / "more").write_text("")
    with pytest.raises(BadRequestError, match="more is not in the manifest"):
        build_again(saved, tmp_path / "again")
    (saved / "files" / "more").unlink()
    (saved / manifest.MANIFEST).rename(tmp_path / "aside")
    with pytest.raises(BadRequestError, match="never finished"):
        build_again(saved, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_nothing_is_overwritten(saved: Path, workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(ConflictError, match="a restore overwrites nothing"):
        build_again(saved, workspace)
    with pytest.raises(ConflictError, match="a backup overwrites nothing"):
        save(workspace, "", saved)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConflictError):
        save(workspace, "", file)
    with pytest.raises(ConflictError):
        build_again(saved, file)
    with pytest.raises(NotFoundError, match="no database"):
        save(tmp_path / "nowhere", "", tmp_path / "new")


def test_a_database_in_use_is_not_restored_over(saved: Path, tmp_path: Path, postgres: Any) -> None:
    url = postgres.database()
    with pytest.raises(BadRequestError, match="does not change the kind"):
        build_again(saved, tmp_path / "one", url)
    with open_door(make_workspace(tmp_path / "busy"), database_url=url, reserve_bytes=0):
        pass
    save(tmp_path / "busy", url, tmp_path / "pg")
    with pytest.raises(ConflictError, match="is not empty"):
        build_again(tmp_path / "pg", tmp_path / "two", url)


def test_a_password_is_on_no_command_line(
    tmp_path: Path, workspace: Path, postgres: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pg_dump that writes down what it was told stands in for the real one."""
    url = postgres.database()
    with open_door(workspace, database_url=url, reserve_bytes=0):
        pass
    spy = tmp_path / "bin" / "pg_dump"
    spy.parent.mkdir()
    spy.write_text(f'#!/bin/sh\necho "$@" "$PGPASSWORD" > {tmp_path}/told; exit 3\n')
    spy.chmod(0o700)
    monkeypatch.setenv("PATH", f"{spy.parent}{os.pathsep}{os.environ['PATH']}")
    secret = url.replace("tunesmith@", "tunesmith:geheim@")
    with pytest.raises(ServerError, match="pg_dump ended with status 3"):
        save(workspace, secret, tmp_path / "saved")
    *arguments, password = (tmp_path / "told").read_text().split()
    assert password == "geheim"
    assert "geheim" not in " ".join(arguments)
    assert not (tmp_path / "saved" / manifest.MANIFEST).exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadRequestError, match="pg_dump is not installed here"):
        save(workspace, url, tmp_path / "more")


def test_a_backup_of_a_newer_version_is_refused_and_an_older_one_is_migrated(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reseal(saved, schema="9999", version="9.9")
    with pytest.raises(ServerError, match=r"schema 9999, newer .* Tunesmith 9.9 or newer"):
        build_again(saved, tmp_path / "again")
    assert main(["restore", str(saved), "--workspace", str(tmp_path / "again")]) == 1
    assert "newer than this version" in capsys.readouterr().err
    make_old(tmp_path / "early" / ".tunesmith" / "db.sqlite")
    save(tmp_path / "early", "", tmp_path / "old")
    assert manifest.verify(tmp_path / "old").detail["schema"] == "0001"
    build_again(tmp_path / "old", tmp_path / "new")
    with open_door(tmp_path / "new", reserve_bytes=0) as door:
        hub = door.app.state.hub  # type: ignore[attr-defined]
        found = hub.store.read(lambda tx: tx.scalars(text("select name from secrets")).all())
        assert "표시" in found
        assert hub.store.read(migrate.current) == migrate.known()[-1]


def reseal(saved: Path, **over: Any) -> None:
    detail = manifest.verify(saved).detail
    manifest.seal(saved, "backup", detail | over)


def make_old(place: Path) -> None:
    """A database as the first version left it, with a mark in it."""
    sqlite.prepare_file(place)
    engine = create_engine(f"sqlite:///{place}", module=sqlite.find_library())
    migrate.upgrade(engine, "0001")
    with engine.begin() as connection:
        connection.execute(text("insert into secrets values ('표시', x'01')"))
    engine.dispose()


def test_an_upload_that_was_taken_away_meanwhile_costs_nothing(
    tmp_path: Path, workspace: Path
) -> None:
    """A row without its file, as a disk's fault leaves it, is told of and stops nothing else."""
    with open_door(workspace, reserve_bytes=0) as door:
        for name in ("one", "two"):
            row = json.dumps({"prompt": name, "completion": "水"}).encode() + b"\n"
            sent = {"file": (f"{name}.jsonl", row)}
            assert door.post("/upload/dataset", files=sent, headers=ONE).status_code == 200
    [blob, *_] = (workspace / ".tunesmith" / "blobs").iterdir()
    blob.unlink()
    made = save(workspace, "", tmp_path / "saved")
    assert made.left_out == [f"{blob}: it is not there any more"]
    manifest.verify(tmp_path / "saved")


def test_a_backup_that_finds_no_room_leaves_none(tmp_path: Path, workspace: Path) -> None:
    with open_door(workspace, reserve_bytes=0) as door:
        row = b'{"prompt": "a", "completion": "' + b"x" * 10_000 + b'"}\n'
        sent = {"file": ("large.jsonl", row * 300)}
        assert door.post("/upload/dataset", files=sent, headers=ONE).status_code == 200
    with a_disk(tmp_path / "small", "2m") as small:
        with pytest.raises(NoSpaceError, match="small is full"):
            save(workspace, "", small.folder)
        assert list(small.folder.iterdir()) == []


def test_a_damaged_upload_is_named(tmp_path: Path, workspace: Path) -> None:
    with open_door(workspace, reserve_bytes=0) as door:
        sent = {"file": ("one.jsonl", b'{"prompt": "a", "completion": "b"}\n')}
        assert door.post("/upload/dataset", files=sent, headers=ONE).status_code == 200
    [blob] = (workspace / ".tunesmith" / "blobs").iterdir()
    blob.chmod(0o600)
    blob.write_bytes(b"another")
    made = save(workspace, "", tmp_path / "saved")
    assert len(made.left_out) == 1
    assert "not the ones that were uploaded" in made.left_out[0]

"""The proofs themselves: a tiny storm on both databases, a checker that misses no planted fault."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from prove import torn
from prove.__main__ import PROOFS, main
from prove.checker import RULES, Remains, check
from prove.fleet import Client, Fleet, Ledger, open_fleet
from prove.processes import living
from prove.proof import Setting
from prove.puppet import CAPACITY, Puppet
from prove.rows import damage
from prove.storm import storm


def quiet(done: int, total: int, note: str) -> None:
    return


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_tiny_storm_loses_nothing_and_doubles_nothing(tmp_path: Path, database: str) -> None:
    result = storm(Setting(tmp_path, seed=5), quiet, database, kills=4, zombies=1, hosts=1)
    assert result.is_met, (result.figures, result.detail)
    assert result.detail[database]["killed"]["zombie"] == 1
    assert living(*tmp_path.glob("*/*")) == []


# the checker


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, Ledger]]:
    """What a good house left: jobs that succeeded, one at the second try, and a cancelled one."""
    folder = tmp_path_factory.mktemp("checker")
    with open_fleet(folder, "sqlite", 0, ("api", "--no-worker")) as fleet:
        token = (fleet.house.home / "worker.token").read_text().strip()
        ledger = Ledger()
        with Client(fleet.url) as client:
            first = ledger.submit(client, "first", {"max_steps": 3})
            abandon(fleet, token)
            cancelled = ledger.submit(client, "cancelled", {"max_steps": 3})
            ledger.cancel(client, cancelled)
            puppet = Puppet(fleet.url, token, 1, Setting(folder).dice(), lambda job, moment: None)
            ledger.submit(client, "second", {"max_steps": 3})
        for job_id in ledger.accepted:
            fleet.house.wait_end(job_id)
        puppet.close()
        assert puppet.failure is None
        fleet.stop()
        assert fleet.house.query("select fence from jobs where id = :id", id=first) == [(2,)]
        yield fleet, ledger


def abandon(fleet: Fleet, token: str) -> None:
    """Claim the only job and never be heard of again."""
    ask = {"worker_id": "lost", "boot_id": "b", "claim_id": "c", "capacity": CAPACITY}
    head = {"Authorization": f"Bearer {token}"}
    with httpx2.Client(base_url=fleet.url, headers=head, trust_env=False) as client:
        for _ in range(300):
            if client.post("/internal/v1/work", json={**ask, "wait_seconds": 1}).json()["attempt"]:
                return
            time.sleep(0.1)
    raise AssertionError("nothing to claim")


def faults_of(house: tuple[Fleet, Ledger]) -> set[str]:
    """The rules that found something."""
    fleet, ledger = house
    return {rule for rule, found in check(Remains.read(fleet.house, ledger)).items() if found}


def test_what_a_good_house_leaves_has_no_fault(house: tuple[Fleet, Ledger]) -> None:
    assert faults_of(house) == set()


NAMED = {
    "TRIED": "(select id from jobs where state = 'succeeded' and fence = 2)",
    "ENDED": "(select min(id) from jobs where state = 'succeeded')",
    "STOPPED": "(select id from jobs where state = 'cancelled')",
}
PLANTED: dict[str, list[str]] = {
    "lost": ["update jobs set state = 'running' where id = TRIED"],
    "wrong end": [
        "update jobs set state = 'failed' where id = TRIED",
        "update jobs set state = 'succeeded' where id = STOPPED",
    ],
    "twice": [
        "update attempts set outcome = (select outcome from attempts where fence = 2) "
        "where fence = 1 and job_id = TRIED",
        "update jobs set fence = fence + 1 where id = TRIED",
        "update attempts set ended_at = null where fence = 1 and job_id = TRIED",
        "update events set type = 'succeeded' where seq = 2 and job_id = TRIED",
        "update events set fence = 1 where type = 'claimed' and job_id = TRIED",
    ],
    "stale": [
        "update events set fence = 1 where job_id = TRIED "
        "and seq = (select max(seq) from events where job_id = TRIED)",
    ],
    "gap": [
        "delete from events where seq = 3 and job_id = TRIED",
        "update jobs set last_seq = last_seq + 1 where id = TRIED",
        "update events set seq = seq + 100 where seq = 2 and job_id = TRIED",
    ],
    "artifact": [
        "update attempts set outcome = json_set(outcome, '$.manifest_sha256', 'no') "
        "where fence = 2 and job_id = TRIED",
        "update jobs set artifact = '/elsewhere' where id = TRIED",
        "update jobs set state = 'cancelled' where id = TRIED",
    ],
    "words": [
        "update events set data = json_set(data, '$.step', 1) where type = 'step'",
        "update attempts set last_n = last_n + 1 where job_id = TRIED",
        "update events set data = json_set(data, '$.loss', 2.5), fence = 1 where job_id = TRIED "
        "and type = 'step' and data ->> '$.step' = 2",
        "insert into events select job_id, seq + 50, fence, at, type, json_set(data, '$.loss', 3) "
        "from events where type = 'step' and job_id = TRIED",
    ],
    "whole run": [
        "update events set data = json_set(data, '$.start_step', 7) where type = 'started'",
        "update jobs set total_steps = 9 where id = ENDED",
    ],
    "devices": [
        "insert into reservations values ('w', 'gpu:0', 'job:0badcafe', 1)",
        "update quotas set unfinished = unfinished + 1",
    ],
    "outbox": [
        "insert into webhook_endpoints (id, owner, name, url, event_types, secret, created_at) "
        "values ('we_1', 'test-key-001', '알림', '', '[\"fine_tuning.job.succeeded\"]', '', 0)",
        "insert into outbox (id, endpoint_id, job_id, body, created_at, due_at, give_up_at) "
        "values ('evt_1', 'we_1', TRIED, '{\"type\": \"fine_tuning.job.succeeded\"}', 0, 0, 0)",
    ],
    "integrity": ["insert into events values ('0badcafe', 1, 0, 0, 'queued', '{}')"],
}


@pytest.mark.parametrize(
    ("rule", "statement"),
    [(rule, statement) for rule, statements in PLANTED.items() for statement in statements],
)
def test_the_checker_catches_a_row_that_was_tampered_with(
    house: tuple[Fleet, Ledger], rule: str, statement: str
) -> None:
    place = house[0].house.home / "db.sqlite"
    before = place.read_bytes()
    for name, meant in NAMED.items():
        statement = statement.replace(name, meant)
    damage(house[0].house, statement)
    try:
        assert rule in faults_of(house)
    finally:
        place.write_bytes(before)


def test_the_checker_catches_promises_that_were_not_kept(house: tuple[Fleet, Ledger]) -> None:
    fleet, kept = house
    jobs = {row["id"]: row["state"] for row in Remains.read(fleet.house, kept).jobs.values()}
    succeeded = next(job_id for job_id, state in jobs.items() if state == "succeeded")
    cancelled = next(job_id for job_id, state in jobs.items() if state == "cancelled")

    def told(**change: object) -> set[str]:
        return faults_of((fleet, Ledger(**{**vars(kept), **change})))

    assert "lost" in told(accepted={**kept.accepted, "0badcafe": {}})
    assert "lost" in told(accepted={succeeded: {}})
    assert "cancel" in told(cancelled={succeeded, cancelled})
    assert "cancel" in told(cancelled=set(), refused={cancelled})
    assert "wrong end" in told(cancelled=set())


def spoil_model(fleet: Fleet, job_id: str) -> None:
    place = fleet.house.workspace / "outputs" / job_id / "training.json"
    place.write_text(place.read_text() + " ")


def swap_model(fleet: Fleet, job_id: str) -> None:
    place = fleet.house.workspace / "outputs" / job_id
    shutil.rmtree(place)
    place.mkdir()


def add_model(fleet: Fleet, job_id: str) -> None:
    [(stopped,)] = fleet.house.query("select id from jobs where state = 'cancelled'")
    place = fleet.house.workspace / "outputs" / stopped
    place.mkdir()
    (place / "model.safetensors").write_bytes(b"1")


def leave_copy(fleet: Fleet, job_id: str) -> None:
    (fleet.house.workspace / "outputs" / ".강물.new").mkdir()


def leave_receipt(fleet: Fleet, job_id: str) -> None:
    place = fleet.house.home / "jobs" / job_id / "attempts" / "1"
    place.mkdir(parents=True, exist_ok=True)
    (place / "exit.json").write_text("{}")


@pytest.mark.parametrize(
    ("rule", "act"),
    [
        ("artifact", spoil_model),
        ("artifact", swap_model),
        ("artifact", add_model),
        ("leftovers", leave_copy),
        ("leftovers", leave_receipt),
    ],
)
def test_the_checker_catches_files_that_were_tampered_with(
    house: tuple[Fleet, Ledger], rule: str, act: Callable[[Fleet, str], None], tmp_path: Path
) -> None:
    fleet, _ = house
    workspace = fleet.house.workspace
    shutil.copytree(workspace, tmp_path / "kept")
    [(job_id,)] = fleet.house.query("select min(id) from jobs where state = 'succeeded'")
    act(fleet, job_id)
    try:
        assert rule in faults_of(house)
    finally:
        shutil.rmtree(workspace)
        shutil.copytree(tmp_path / "kept", workspace)


def test_every_rule_has_a_planted_fault() -> None:
    assert {*PLANTED, "cancel", "leftovers"} == set(RULES)


# torn checkpoints


def test_a_checkpoint_that_is_torn_by_hand_is_told_of(tmp_path: Path) -> None:
    folder = tmp_path / "step-1"
    folder.mkdir()
    assert "FileNotFoundError" in str(torn.unloadable(folder))


# the runner


def test_the_runner_writes_what_came_out(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    told = ["--only", "torn", "--scale", "0.04", "--seed", "7", "--out", str(report)]
    assert main(told) == 0
    written = json.loads(report.read_text())
    assert written["seed"] == 7
    assert written["is_met"]
    assert [one["name"] for one in written["proofs"]] == ["torn"]
    assert all(figure["is_met"] for figure in written["proofs"][0]["figures"])


def test_a_proof_that_breaks_off_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROOFS, "absent", "a proof that nobody wrote")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # what is left is kept
    report = tmp_path / "report.json"
    assert main(["--only", "absent", "--out", str(report)]) == 1
    assert not json.loads(report.read_text())["is_met"]


def test_an_unknown_proof_is_refused_with_the_names_of_those_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "strom"])
    assert "storm" in capsys.readouterr().err

"""Work for a worker that was started for one job, and the queue as a dispatcher sees it."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from servers import wait_for
from store_fixtures import Ledger, new_ask
from tunesmith.settings import Settings
from tunesmith.spec.hands import DISPATCHER
from tunesmith.store import claims
from tunesmith.work.worker import RING_SIGNAL, is_running, run
from work_fixtures import an_api


def test_a_worker_for_one_job_gets_that_one_and_no_other(ledger: Ledger) -> None:
    first, second = ledger.submit(priority=9), ledger.submit()
    claimed = ledger.claim("one", only=second.id)
    assert claimed is not None
    assert claimed.job.id == second.id
    assert ledger.claim("two", only=second.id) is None
    assert ledger.claim("two", only="00000000") is None
    assert ledger.get(first.id).fence == 0


def test_a_worker_for_one_job_leaves_no_row_and_limits_no_submit(ledger: Ledger) -> None:
    """It has what its job needs: another job may need more than that."""
    job = ledger.submit()
    ask = new_ask("one", "c1", only=job.id, slots=1, max_slots=1, max_memory_bytes=1 << 20)
    assert ledger.store.read(lambda tx: claims.may_claim(tx, ask))
    assert ledger.write(lambda tx: claims.claim(tx, ask, lease_seconds=60)) is not None
    assert not ledger.store.read(lambda tx: claims.may_claim(tx, new_ask("two", only=job.id)))
    assert ledger.store.read(claims.known_workers) == {}


def test_a_claim_for_one_job_whose_answer_was_lost_comes_again(ledger: Ledger) -> None:
    job = ledger.submit()
    ask = new_ask("one", "c1", only=job.id)
    both = [ledger.write(lambda tx: claims.claim(tx, ask, lease_seconds=60)) for _ in range(2)]
    assert [one and (one.job.id, one.fence) for one in both] == [(job.id, 1)] * 2


def test_what_waits_is_listed_in_the_order_of_claims_and_bounded(ledger: Ledger) -> None:
    made = [ledger.submit(priority=priority).id for priority in (0, 5, 0)]
    ledger.submit(is_validated=False)
    order = [made[1], made[0], made[2]]
    assert [job.job_id for job in ledger.store.read(claims.waiting)] == order
    assert [job.job_id for job in ledger.store.read(lambda tx: claims.waiting(tx, 2))] == order[:2]
    ledger.claim()
    assert made[1] not in [job.job_id for job in ledger.store.read(claims.waiting)]


def test_a_dispatcher_counts_as_a_worker_that_serves_no_model(ledger: Ledger) -> None:
    for name in (f"{DISPATCHER}host", "ray-host"):
        ask = new_ask(name)
        ledger.write(partial(claims.seen_worker, ask=ask))
    assert ledger.store.read(lambda tx: claims.count_workers(tx, 60)) == 2
    assert ledger.store.read(lambda tx: claims.count_workers(tx, 60, DISPATCHER)) == 1


def test_an_idle_worker_asks_when_it_is_rung(tmp_path: Path) -> None:
    """By its own pause it would ask twice while the test waits."""
    asks: list[dict[str, Any]] = []

    def take(path: str, body: dict[str, Any]) -> tuple[int, str]:
        asks.append(body)
        return 200, "{}"

    settings = {"WORKSPACE": str(tmp_path), "BELL": "celery", "POLL_SECONDS": "60"}
    settings["SHOULD_FORK_TRAINERS"] = "0"
    (tmp_path / ".tunesmith").mkdir()
    with an_api(tmp_path / ".tunesmith") as api:
        api.take = take  # type: ignore[method-assign]
        worker = subprocess.Popen(
            [sys.executable, "-m", "tunesmith.work.worker", "--parent", str(os.getpid())],
            env=os.environ | {f"TUNESMITH_{name}": value for name, value in settings.items()},
            stderr=subprocess.DEVNULL,
        )

        def has_asked_often() -> bool:
            worker.send_signal(RING_SIGNAL)  # it may come before anything is set up for it
            return len(asks) >= 10

        try:
            wait_for(has_asked_often, "questions")
        finally:
            worker.terminate()
            assert worker.wait(60) == 0
    assert {ask["wait_seconds"] for ask in asks[:10]} == {3}


def test_a_worker_whose_server_has_come_and_gone_ends(tmp_path: Path) -> None:
    """A server takes its address away when it is stopped; one that was killed leaves it."""
    settings = Settings.read({}, workspace=tmp_path)
    assert run(settings, is_beside=True) == 0
    assert not is_running(settings)


@pytest.mark.parametrize(
    "over", [{"poll_seconds": 0}, {"poll_seconds": 61}, {"poll_seconds": "nan"}, {"bell": "gong"}]
)
def test_settings_of_a_bell_have_bounds(over: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(over))):
        Settings.read({}, **over)

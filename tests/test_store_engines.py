"""Engines are wanted, placed, watched and let go; their devices are theirs alone."""

from typing import Any

import pytest

from store_fixtures import Ledger, new_ask
from tunesmith.errors import NotFoundError
from tunesmith.spec.hands import EngineReport, EngineStatus
from tunesmith.spec.records import Needs
from tunesmith.store import engines
from tunesmith.store.engines import Engine


def want(ledger: Ledger, path: str = "/모델", **over: Any) -> Engine:
    over = {"max_engines": 2, **over}
    return ledger.write(lambda tx: engines.want(tx, path, path[1:], **over))


def ask(ledger: Ledger, *said: EngineStatus, worker_id: str = "w1", **over: Any) -> list[Any]:
    asked = new_ask(worker_id, "e", engines=said, **over)
    given = ledger.write(lambda tx: engines.orders(tx, asked, max_engines=2))
    return [(order.action, order.engine_id) for order in given]


def get(ledger: Ledger, engine_id: str) -> Engine:
    return ledger.store.read(lambda tx: engines.get(tx, engine_id))


def say(engine: Engine, state: Any, **over: Any) -> EngineStatus:
    return EngineStatus(id=engine.id, state=state, **over)


def make_ready(ledger: Ledger, path: str = "/모델", **over: Any) -> Engine:
    before = ledger.store.read(engines.list_engines)
    engine = want(ledger, path, **over)
    ask(ledger, *[say(one, one.state, url=one.url, pid=one.pid) for one in before])
    report = EngineReport(
        worker_id="w1", id=engine.id, state="ready", url="http://127.0.0.1:1", pid=5
    )
    ledger.write(lambda tx: engines.report(tx, report))
    return get(ledger, engine.id)


def test_many_who_want_a_model_get_one_engine(ledger: Ledger) -> None:
    first = want(ledger)
    assert want(ledger).id == first.id
    assert ask(ledger) == [("start", first.id)]
    assert want(ledger).id == first.id
    assert get(ledger, first.id).state == "starting"


def test_an_order_is_given_again_until_it_arrived(ledger: Ledger) -> None:
    engine = want(ledger)
    assert ask(ledger) == [("start", engine.id)]
    assert ask(ledger) == [("start", engine.id)]
    assert ask(ledger, say(engine, "starting")) == []
    assert ask(ledger, say(engine, "ready", url="http://127.0.0.1:1", pid=5)) == []
    assert get(ledger, engine.id).state == "ready"
    assert get(ledger, engine.id).url == "http://127.0.0.1:1"


def test_the_one_idle_for_longest_makes_room(ledger: Ledger) -> None:
    first, second = make_ready(ledger, "/a"), make_ready(ledger, "/b")
    ledger.clock.pass_by(5)
    ledger.write(lambda tx: engines.used(tx, first.id))
    third = want(ledger, "/c")
    states = [say(one, "ready", url=one.url, pid=one.pid) for one in (first, second)]
    assert ask(ledger, *states) == [("stop", second.id)]
    assert ask(ledger, states[0], say(second, "stopped")) == [("start", third.id)]


def test_idle_engines_are_asked_to_stop(ledger: Ledger) -> None:
    engine = make_ready(ledger)
    ledger.clock.pass_by(100)
    assert ledger.write(lambda tx: engines.stop_idle(tx, 200)) == []
    ledger.clock.pass_by(200)
    assert ledger.write(lambda tx: engines.stop_idle(tx, 200)) == [engine.id]
    assert ask(ledger, say(engine, "ready", url=engine.url, pid=5)) == [("stop", engine.id)]
    again = want(ledger)
    assert again.id != engine.id


def test_a_failure_is_told_for_a_while_before_another_try(ledger: Ledger) -> None:
    engine = want(ledger)
    ask(ledger)
    ask(ledger, say(engine, "failed", error="메모리 부족"))
    assert want(ledger).error == "메모리 부족"
    ledger.clock.pass_by(11)
    assert want(ledger).state == "wanted"


def test_an_engine_that_its_worker_no_longer_has_is_given_up_and_can_be_wanted_again(
    ledger: Ledger,
) -> None:
    engine = make_ready(ledger)
    assert ask(ledger) == []
    assert get(ledger, engine.id).state == "stopped"
    assert want(ledger).state == "wanted"


def test_an_engine_nobody_knows_is_stopped(ledger: Ledger) -> None:
    stray = EngineStatus(id="engine-stray", state="ready")
    assert ask(ledger, stray) == [("stop", "engine-stray")]


def test_engines_and_jobs_share_no_gpu(ledger: Ledger) -> None:
    engine = want(ledger, needs=Needs(gpus=1))
    assert ask(ledger, gpus=(0, 1)) == [("start", engine.id)]
    assert get(ledger, engine.id).gpus == (0,)
    ledger.submit(needs=Needs(gpus=1))
    claimed = ledger.claim(gpus=(0, 1))
    assert claimed is not None
    assert claimed.gpus == (1,)
    another = want(ledger, "/b", needs=Needs(gpus=1))
    assert ask(ledger, say(engine, "starting"), gpus=(0, 1)) == []
    assert ask(ledger, say(engine, "stopped"), gpus=(0, 1)) == [("start", another.id)]


def test_an_engine_takes_a_gpu_that_is_free_and_else_none(ledger: Ledger) -> None:
    """Where it may."""
    first = want(ledger, "/a")
    ledger.clock.pass_by(1)
    second = want(ledger, "/b")
    asked = new_ask("w1", "e", gpus=(0,))
    ledger.write(lambda tx: engines.orders(tx, asked, max_engines=2, may_take_gpu=True))
    assert [get(ledger, one.id).gpus for one in (first, second)] == [(0,), ()]
    ledger.submit(needs=Needs(gpus=1))
    assert ledger.claim(gpus=(0,)) is None


def test_engines_of_a_silent_worker_are_given_up(ledger: Ledger) -> None:
    ledger.claim()
    engine = make_ready(ledger)
    assert ledger.write(lambda tx: engines.lost(tx, 60)) == []
    ledger.clock.pass_by(61)
    assert ledger.write(lambda tx: engines.lost(tx, 60)) == [engine.id]
    assert get(ledger, engine.id).state == "failed"


def test_another_worker_s_word_about_an_engine_counts_for_nothing(ledger: Ledger) -> None:
    engine = make_ready(ledger)
    report = EngineReport(worker_id="w2", id=engine.id, state="failed", error="x")
    ledger.write(lambda tx: engines.report(tx, report))
    assert get(ledger, engine.id).state == "ready"


def test_an_engine_that_is_unknown_is_not_found(ledger: Ledger) -> None:
    with pytest.raises(NotFoundError):
        get(ledger, "engine-none")


def test_a_wanted_engine_that_nobody_took_stops_at_once(ledger: Ledger) -> None:
    engine = want(ledger)
    ledger.write(lambda tx: engines.stop(tx, engine.id))
    assert get(ledger, engine.id).state == "stopped"
    assert ask(ledger) == []
    assert ledger.store.read(engines.list_engines) == []


def test_an_engine_takes_memory_but_no_job_s_slot(ledger: Ledger) -> None:
    want(ledger, needs=Needs(memory_bytes=6 << 30))
    size: dict[str, Any] = {"slots": 1, "max_slots": 1, "max_memory_bytes": 8 << 30}
    ask(ledger, **size)
    ledger.submit(needs=Needs(memory_bytes=3 << 30))
    small = ledger.submit(needs=Needs(memory_bytes=1 << 30))
    claimed = ledger.claim(**size)
    assert claimed is not None
    assert claimed.job.id == small.id

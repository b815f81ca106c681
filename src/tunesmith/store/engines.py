"""Which engines are wanted, where they run, and what they said last."""

import secrets
from typing import Any, Literal

from sqlalchemy import ColumnElement, and_, delete, func, insert, select, update
from sqlalchemy.engine import Connection, RowMapping

from tunesmith.errors import NotFoundError
from tunesmith.spec.hands import EngineReport, EngineStatus, WorkAsk
from tunesmith.spec.records import Needs
from tunesmith.spec.strict import Strict
from tunesmith.store import reservations
from tunesmith.store.rows import clean
from tunesmith.store.tables import engines, now, touch, workers
from tunesmith.store.tables import reservations as reserved

_LIVE = ("wanted", "starting", "ready")
_PLACED = ("starting", "ready")
TOPIC = "engines"


class Engine(Strict):
    id: str
    model_path: str
    model_name: str
    precision: str
    """How its weights are kept: auto, fp32, bf16, int8 or int4."""
    state: Literal["wanted", "starting", "ready", "failed", "stopped"]
    should_stop: bool
    needs: Needs
    options: dict[str, Any]
    gpus: tuple[int, ...]
    worker_id: str | None
    url: str | None
    key: str
    """The bearer key that only the API and this engine know."""
    pid: int | None
    error: str | None
    created_at: float
    changed_at: float
    last_used: float


class Order(Strict):
    action: Literal["start", "stop"]
    engine_id: str
    engine: Engine | None
    """None where the worker reports an engine that is not known here."""


def want(
    tx: Connection,
    model_path: str,
    model_name: str,
    *,
    max_engines: int,
    needs: Needs = Needs(),
    options: dict[str, Any] | None = None,
    precision: str = "auto",
    retry_seconds: float = 10,
) -> Engine:
    """The engine of a model: the live one, or one that failed just now, or a new one.

    Where `max_engines` are live, the one that was idle for longest is asked to stop.
    """
    lately = and_(engines.c.state == "failed", engines.c.changed_at > now() - retry_seconds)
    is_live = and_(engines.c.state.in_(_LIVE), engines.c.should_stop.is_(False))
    same = and_(engines.c.model_path == model_path, engines.c.precision == precision)
    for usable in (is_live, lately):
        row = _first(tx, and_(same, usable))
        if row is not None:
            used(tx, row["id"])
            return _to_engine(row)
    _retire(tx, same)
    if (tx.scalar(select(func.count()).select_from(engines).where(is_live)) or 0) >= max_engines:
        _evict(tx)
    made = {"model_path": model_path, "model_name": model_name, "precision": precision}
    return _create(tx, made, needs, options or {})


def _first(tx: Connection, where: ColumnElement[bool]) -> RowMapping | None:
    query = select(engines).where(where).order_by(engines.c.changed_at.desc()).limit(1)
    return tx.execute(query).mappings().first()


def _retire(tx: Connection, same: ColumnElement[bool]) -> None:
    """An engine of this model that is on its way out gives its name up."""
    leaving = select(engines.c.id).where(same, engines.c.state.in_(_LIVE))
    for engine_id in tx.scalars(leaving).all():
        _settle(tx, engine_id, "stopped", None)


def _evict(tx: Connection) -> None:
    oldest = (
        select(engines.c.id)
        .where(engines.c.state == "ready", engines.c.should_stop.is_(False))
        .order_by(engines.c.last_used)
        .limit(1)
    )
    engine_id = tx.scalar(oldest)
    if engine_id is not None:
        stop(tx, engine_id)


def _create(tx: Connection, model: dict[str, str], needs: Needs, options: dict[str, Any]) -> Engine:
    row = {
        "id": "engine-" + secrets.token_hex(6),
        **model,
        "state": "wanted",
        "needs_gpus": needs.gpus,
        "needs_memory_bytes": needs.memory_bytes,
        "options": options,
        "gpus": [],
        "key": "sk-" + secrets.token_urlsafe(32),
    }
    times = {"created_at": now(), "changed_at": now(), "last_used": now()}
    tx.execute(insert(engines).values(**row, **times))
    touch(tx, TOPIC)
    touch(tx, "queue")
    return get(tx, row["id"])  # type: ignore[arg-type]


def get(tx: Connection, engine_id: str) -> Engine:
    """Raises NotFoundError."""
    row = _first(tx, engines.c.id == engine_id)
    if row is None:
        raise NotFoundError(f"no engine {clean(engine_id)[:100]!r}")
    return _to_engine(row)


def list_engines(tx: Connection, *, is_live: bool = True) -> list[Engine]:
    query = select(engines).order_by(engines.c.created_at)
    if is_live:
        query = query.where(engines.c.state.in_(_LIVE))
    return [_to_engine(row) for row in tx.execute(query).mappings()]


def used(tx: Connection, engine_id: str) -> None:
    tx.execute(update(engines).where(engines.c.id == engine_id).values(last_used=now()))


def stop(tx: Connection, engine_id: str) -> None:
    """Ask for the end: at once where no worker has it, else by an order."""
    waiting = tx.execute(
        update(engines)
        .where(engines.c.id == engine_id, engines.c.state == "wanted")
        .values(state="stopped", changed_at=now())
    )
    if not waiting.rowcount:
        tx.execute(
            update(engines)
            .where(engines.c.id == engine_id, engines.c.state.in_(_PLACED))
            .values(should_stop=True)
        )
    touch(tx, TOPIC)
    touch(tx, "queue")


def stop_idle(tx: Connection, idle_seconds: float) -> list[str]:
    """Ask engines to stop that nobody used for so long; returns their ids."""
    is_idle = and_(
        engines.c.state == "ready",
        engines.c.should_stop.is_(False),
        engines.c.last_used < now() - idle_seconds,
    )
    idle = list(tx.scalars(select(engines.c.id).where(is_idle)))
    for engine_id in idle:
        stop(tx, engine_id)
    return idle


def orders(
    tx: Connection, ask: WorkAsk, *, max_engines: int, may_take_gpu: bool = False
) -> list[Order]:
    """Take in what the worker says of its engines, and tell it what to start and to stop.

    `may_take_gpu`: an engine that needs none gets one where one is free.
    An order is given again until the worker's list shows that it arrived; ids make that safe.
    """
    for status in ask.engines:
        _take_in(tx, ask.worker_id, status)
    said = {status.id: status.state for status in ask.engines}
    query = select(engines).where(
        engines.c.worker_id == ask.worker_id, engines.c.state.in_(_PLACED)
    )
    mine = {row["id"]: _to_engine(row) for row in tx.execute(query).mappings()}
    running = [name for name, state in said.items() if state in _PLACED]
    given = [
        Order(action="stop", engine_id=name, engine=mine.get(name))
        for name in running
        if name not in mine or mine[name].should_stop
    ]
    for engine in mine.values():
        if engine.id in said:
            continue
        if engine.state == "ready" or engine.should_stop:
            _settle(tx, engine.id, "stopped", "its worker started anew without it")
        else:
            given.append(Order(action="start", engine_id=engine.id, engine=engine))
    return given + _place(tx, ask, max_engines, may_take_gpu)


def _place(tx: Connection, ask: WorkAsk, max_engines: int, may_take_gpu: bool) -> list[Order]:
    """Give wanted engines to this worker, as far as they fit."""
    placed = select(func.count()).select_from(engines).where(engines.c.state.in_(_PLACED))
    left = max_engines - (tx.scalar(placed) or 0)
    query = (
        select(engines)
        .where(engines.c.state == "wanted")
        .order_by(engines.c.created_at, engines.c.id)
        .limit(max(0, left))
        .with_for_update(skip_locked=True)
    )
    given = []
    for row in tx.execute(query).mappings().all():
        free = reservations.room(tx, ask.worker_id, ask.capacity)
        gpus = max(row["needs_gpus"], int(may_take_gpu and bool(free.gpus)))
        needs = Needs(gpus=gpus, memory_bytes=row["needs_memory_bytes"])
        if needs.gpus > len(free.gpus) or (
            not needs.gpus and needs.memory_bytes > free.memory_bytes
        ):
            continue
        engine = _start(tx, row["id"], ask.worker_id, needs, free.gpus[: needs.gpus])
        if engine is not None:
            given.append(Order(action="start", engine_id=engine.id, engine=engine))
    return given


def _start(
    tx: Connection, engine_id: str, worker_id: str, needs: Needs, gpus: tuple[int, ...]
) -> Engine | None:
    taken = tx.execute(
        update(engines)
        .where(engines.c.id == engine_id, engines.c.state == "wanted")
        .values(state="starting", worker_id=worker_id, gpus=list(gpus), changed_at=now())
    )
    if not taken.rowcount:
        return None
    reservations.reserve(tx, worker_id, f"engine:{engine_id}", needs, gpus)
    touch(tx, TOPIC)
    return get(tx, engine_id)


def report(tx: Connection, said: EngineReport) -> None:
    """Take in what a worker says of one engine; of an engine that is not its own, nothing."""
    _take_in(tx, said.worker_id, said)


def _take_in(tx: Connection, worker_id: str, said: EngineStatus) -> None:
    row = _first(tx, and_(engines.c.id == said.id, engines.c.worker_id == worker_id))
    if row is None or row["state"] not in _PLACED:
        return
    if said.state in ("failed", "stopped"):
        _settle(tx, said.id, said.state, said.error)
        return
    if row["state"] == "ready" and said.state == "starting":
        return
    if (row["state"], row["url"], row["pid"]) == (said.state, said.url, said.pid):
        return
    tx.execute(
        update(engines)
        .where(engines.c.id == said.id, engines.c.state == row["state"])
        .values(state=said.state, url=said.url, pid=said.pid, changed_at=now())
    )
    touch(tx, TOPIC)


def _settle(tx: Connection, engine_id: str, state: str, error: str | None) -> None:
    ended = tx.execute(
        update(engines)
        .where(engines.c.id == engine_id, engines.c.state.in_(_LIVE))
        .values(
            state=state,
            error=None if error is None else clean(error),
            url=None,
            pid=None,
            changed_at=now(),
        )
    )
    if ended.rowcount:
        tx.execute(delete(reserved).where(reserved.c.holder == f"engine:{engine_id}"))
        touch(tx, TOPIC)
        touch(tx, "queue")


def lost(tx: Connection, silent_seconds: float) -> list[str]:
    """Give up engines whose worker has not asked for so long; returns their ids."""
    heard = select(workers.c.id).where(workers.c.seen_at >= now() - silent_seconds)
    query = select(engines.c.id).where(
        engines.c.state.in_(_PLACED), engines.c.worker_id.not_in(heard)
    )
    gone = list(tx.scalars(query))
    for engine_id in gone:
        _settle(tx, engine_id, "failed", f"its worker has been silent for {silent_seconds:.0f} s")
    return gone


def forget_all(tx: Connection) -> None:
    """None of them runs: this database was restored."""
    for engine_id in tx.scalars(select(engines.c.id).where(engines.c.state.in_(_LIVE))).all():
        _settle(tx, engine_id, "stopped", None)


def _to_engine(row: RowMapping) -> Engine:
    needs = {"gpus": row["needs_gpus"], "memory_bytes": row["needs_memory_bytes"]}
    kept = {name: row[name] for name in Engine.model_fields if name != "needs"}
    return Engine.model_validate({**kept, "needs": needs})

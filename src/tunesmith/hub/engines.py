"""Which engine answers for a model: asked for, waited for, routed to, put away when unused."""

import asyncio
import logging
import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx2
import msgspec
from sqlalchemy.engine import Connection

from tunesmith.errors import NotReadyError, TuningAPIError
from tunesmith.hub import looks
from tunesmith.hub.aboard import Aboard, Unservable
from tunesmith.hub.answers import Answer, Target, bearer
from tunesmith.hub.foreign import Foreign
from tunesmith.hub.found import Found
from tunesmith.hub.hop import Hop, HopError, HopTimeout
from tunesmith.hub.names import FoundModel
from tunesmith.hub.principal import Principal
from tunesmith.hub.pulse import Pulse
from tunesmith.infer.contract import FIT
from tunesmith.settings import Settings
from tunesmith.spec.chat import MODEL_HEADER
from tunesmith.spec.hands import DISPATCHER, EngineOrder, EngineReport, WorkAsk
from tunesmith.spec.records import Needs
from tunesmith.store import engines as rows
from tunesmith.store.database import Store

if TYPE_CHECKING:
    from tunesmith.hub import Hub

log = logging.getLogger(__name__)
_to_json = msgspec.json.Encoder().encode

ENGINE_BYTES = 600 << 20
"""An engine without its weights: torch, a cache for a few requests."""
WORKER_SECONDS = 15.0
"""A server that was just started waits so long for its worker, before it refuses a chat."""
REPEAT_SECONDS = 10.0
GIVEN_UP_SECONDS = 3.0
"""From a word to an engine that does not answer until it is killed."""
LOST_SECONDS = 120.0
"""A worker that did not ask for so long has lost its engines."""


class Engines:
    """The API's view of the engines; the workers' hosts run them."""

    def __init__(self, hub: "Hub") -> None:
        self._hub = hub
        self._ordered: dict[tuple[str, str, str], float] = {}
        self._used: set[str] = set()
        self._given_up: set[str] = set()
        """Engines that do not answer: nothing that they do is waited for."""
        self._busy: dict[str, int] = {}
        self._pulse = Pulse(hub.settings.engine_silent_seconds)
        self._looking: asyncio.Task[None] | None = None
        self._client: httpx2.AsyncClient | None = None
        self.foreign = Foreign(hub.settings, self._http)
        self._found = Found(hub, self.foreign)
        self._aboard = Aboard(self._http)
        self.hop = Hop()

    @property
    def _settings(self) -> Settings:
        return self._hub.settings

    @property
    def _store(self) -> Store:
        return self._hub.store

    async def ask(
        self,
        path: str,
        model: str,
        body: dict[str, Any],
        who: Principal,
        precision: str | None = None,
    ) -> Answer:
        """Send a request to the engine that holds `model`, started if need be.

        `precision` None takes the engine that is there, and auto where none is.
        Raises NotFoundError for a model that is not there, NotReadyError (503, Retry-After) for
        one whose engine does not come up.
        """
        for is_last_try in (False, True):
            target = None
            try:
                target, served = await self.place(model, who, precision)
                answer = await self._send(target, path, body | {"model": served}, model)
            except (HopError, httpx2.TransportError) as error:
                if target is not None:
                    await self._doubt(target, error)
                if is_last_try or isinstance(error, HopTimeout | httpx2.ReadTimeout):
                    raise _not_ready(f"the engine of {model!r} does not answer") from None
                continue
            if (
                answer.status != 404
                or is_last_try
                or not self._aboard.forget(target.engine_id, served)
            ):
                return answer
            await answer.close()
        raise AssertionError

    async def place(
        self, model: str, who: Principal, precision: str | None = None, field: str = "model"
    ) -> tuple[Target, str]:
        """Where a model answers, and how it is called there. Raises as `ask`."""
        found = await self._found.find(model, who, field)
        if isinstance(found, Target):
            return found, found.base_name
        target = await self.foreign.holding(found) or await self.ready(found, precision)
        try:
            return target, await self._aboard.served_name(target, found)
        except httpx2.TransportError as error:
            await self._doubt(target, error)
            raise

    async def _doubt(self, target: Target, error: Exception) -> None:
        """A connection may break, on an engine that is well and talks to others."""
        if not await looks.is_alive(self._http(), target):
            await self._lost(target, f"{type(error).__name__}: {error}")

    async def _send(self, target: Target, path: str, body: dict[str, Any], model: str) -> Answer:
        self._used.add(target.engine_id)
        if not target.is_ours:
            body = {name: value for name, value in body.items() if name != FIT}
        self._busy[target.engine_id] = self._busy.get(target.engine_id, 0) + 1
        url, headers = target.url + path, bearer(target.key) | {MODEL_HEADER: quote(model)}
        try:
            wire = await self.hop.post(url, headers, _to_json(body))
        except BaseException:
            self.let_go(target.engine_id)
            raise
        answer = Answer(target, wire, self, url)
        try:
            if not answer.is_stream:
                await answer.read()
        except BaseException:
            await answer.close()
            raise
        return answer

    async def ready(self, found: FoundModel, precision: str | None = None) -> Target:
        """Wait for the engine of the model's base; ask the workers for one where there is none.

        Raises NotReadyError; Unservable where it was tried and cannot be."""
        began = time.monotonic()
        deadline = began + self._settings.engine_start_seconds
        with self._hub.watcher.watch("engines") as touched:
            engine_id = await self._want(found, precision)
            while True:
                touched.clear()
                row = self._store.read(partial(rows.get, engine_id=engine_id))
                if row.state == "ready" and row.url:
                    return Target(row.id, row.url, row.key)
                if row.state == "failed":
                    raise Unservable(f"{found.name!r} could not be served: {row.error}")
                if row.state == "stopped":
                    engine_id = await self._want(found, precision)
                    continue
                is_alone = not self._hub.hands.living_workers(but=DISPATCHER)
                if is_alone and time.monotonic() - began > WORKER_SECONDS:
                    raise _not_ready("no worker is running that could start an engine")
                left = deadline - time.monotonic()
                if left <= 0:
                    raise _not_ready(f"the engine of {found.name!r} is not ready yet")
                await self._hub.wait(touched, min(left, 2.0))

    async def _want(self, found: FoundModel, precision: str | None) -> str:
        """The engine's id; a commit only where there is none that is ready."""
        base = str(found.folder.base)
        living = self._living()
        for row in living:
            is_it = row.model_path == base and precision in (None, row.precision)
            if is_it and _is_of(row, found) and row.state == "ready" and not row.should_stop:
                return row.id
        memory = found.folder.weight_bytes * 2 + ENGINE_BYTES

        def work(tx: Connection) -> rows.Engine:
            for row in rows.list_engines(tx):
                if row.model_path == base and not _is_of(row, found):
                    rows.stop(tx, row.id)
            return rows.want(
                tx,
                base,
                found.folder.base.name,
                max_engines=self._settings.max_engines,
                needs=Needs(memory_bytes=memory),
                options={"mark": found.folder.mark},
                precision=precision or self._settings.engine_precision,
            )

        return (await self._hub.write(work)).id

    async def reported(self, report: EngineReport) -> None:
        """A worker tells how an engine is."""
        if report.state in ("failed", "stopped"):
            self._aboard.lost(report.id)
        await self._hub.write(lambda tx: rows.report(tx, report))

    async def orders(self, ask: WorkAsk) -> tuple[EngineOrder, ...]:
        """What this worker should start and stop; a commit only where there is something."""
        if not self._store.read(lambda tx: _differs(tx, ask)):
            return ()
        given = await self._hub.write(
            lambda tx: rows.orders(
                tx,
                ask,
                max_engines=self._settings.max_engines,
                may_take_gpu=self._settings.engine_device == "auto",
            )
        )
        return tuple(self._order(order) for order in given if self._is_news(order, ask))

    def _is_news(self, order: rows.Order, ask: WorkAsk) -> bool:
        """Whether it is worth an answer: an order is repeated only after a while."""
        mark = (ask.boot_id, order.engine_id, order.action)
        now = time.monotonic()
        is_news = now - self._ordered.get(mark, -math.inf) > REPEAT_SECONDS
        if is_news:
            self._ordered[mark] = now
        return is_news

    def _order(self, order: rows.Order) -> EngineOrder:
        engine = order.engine
        if engine is None:
            return EngineOrder(id=order.engine_id, action=order.action)
        if order.action == "stop":
            is_dead = engine.id in self._given_up
            grace = GIVEN_UP_SECONDS if is_dead else self._settings.engine_drain_seconds
            return EngineOrder(id=engine.id, action="stop", grace_seconds=grace)
        return EngineOrder(
            id=engine.id,
            action=order.action,
            model_path=engine.model_path,
            model_name=engine.model_name,
            key=engine.key,
            log_path=str(self._settings.home / "engines" / f"{engine.id}.log"),
            threads=self._settings.slots,
            precision=engine.precision,
            gpus=engine.gpus,
            options=engine.options,
        )

    async def tidy(self) -> None:
        """Stop engines that nobody used for a while; give up those whose worker is gone."""
        living = self._living()
        self._forget_all_but({row.id for row in living})
        busy = [name for name, count in self._busy.items() if count > 0]
        used, self._used = {*self._used, *busy}, set()

        def work(tx: Connection) -> None:
            for engine_id in used:
                rows.used(tx, engine_id)
            rows.stop_idle(tx, self._settings.engine_idle_seconds)
            rows.lost(tx, LOST_SECONDS)

        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look_after())
        if used or living:
            await self._hub.write(work)

    async def _look_after(self) -> None:
        """Stop engines that are frozen: whoever waits there is then served by a new one."""
        await self.foreign.look()
        ready = [row for row in self._living() if row.state == "ready" and not row.should_stop]
        try:
            for row in await self._pulse.silent(self._http(), [row for row in ready if row.url]):
                await self._lost(Target(row.id, row.url or "", row.key), "silent for too long")
        except TuningAPIError as error:  # the next turn looks again
            log.error("a silent engine could not be stopped: %s", error)

    def _forget_all_but(self, living: set[str]) -> None:
        """Of engines that are no more."""
        self._given_up &= living
        self._busy = {name: count for name, count in self._busy.items() if count > 0}
        self._aboard.forget_all_but(living)
        recent = time.monotonic() - REPEAT_SECONDS
        self._ordered = {mark: at for mark, at in self._ordered.items() if at > recent}

    async def describe(self, target: Target) -> dict[str, Any] | None:
        """An engine's own `/model_info`; None of one that has none."""
        return await looks.model_info(self._http(), target)

    async def expositions(self) -> list[tuple[rows.Engine, str]]:
        """What each engine that is ready tells Prometheus."""
        ready = [row for row in self._living() if row.state == "ready" and row.url]
        return await looks.expositions(self._http(), ready)

    def health(self) -> dict[str, Any]:
        """The fields of the inference contract's health."""
        ready = [row for row in self._living() if row.state == "ready"]
        names = [row.model_name for row in ready]
        if self.foreign.is_well:
            names += self.foreign.names
        return {
            "model_loaded": bool(names),
            "model_name": names[0] if names else None,
            "device": "cuda" if ready and ready[0].gpus else "cpu",
        }

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        self.hop.close()
        if self._client is not None:
            await self._client.aclose()

    def _living(self) -> list[rows.Engine]:
        return self._store.read(lambda tx: rows.list_engines(tx))

    async def _lost(self, target: Target, reason: str) -> None:
        self._aboard.lost(target.engine_id)
        log.error("engine %s does not answer: %s", target.engine_id, reason)
        if not target.is_ours:
            return
        self._given_up.add(target.engine_id)
        await self._hub.write(lambda tx: rows.stop(tx, target.engine_id))

    def let_go(self, engine_id: str) -> None:
        """A request to this engine is over."""
        self._busy[engine_id] = max(0, self._busy.get(engine_id, 0) - 1)

    def _http(self) -> httpx2.AsyncClient:
        if self._client is None:
            limits = httpx2.Limits(max_connections=1000, max_keepalive_connections=100)
            timeout = httpx2.Timeout(600, connect=5)
            self._client = httpx2.AsyncClient(timeout=timeout, limits=limits, trust_env=False)
        return self._client


def _is_of(row: rows.Engine, found: FoundModel) -> bool:
    """Whether it was started for the files that are there now: a folder's may be replaced."""
    mark: str = row.options.get("mark", found.folder.mark)
    return mark == found.folder.mark


def _differs(tx: Connection, ask: WorkAsk) -> bool:
    """Whether what is written down and what the worker has are not the same."""
    said = {status.id: status.state for status in ask.engines}
    living = {row.id: row for row in rows.list_engines(tx)}
    mine = [row for row in living.values() if row.worker_id == ask.worker_id]
    return (
        any(row.state == "wanted" for row in living.values())
        or any(row.should_stop or said.get(row.id) != row.state for row in mine)
        or any(name not in living for name in said)
    )


def _not_ready(said: str) -> NotReadyError:
    error = NotReadyError(said)
    error.retry_after = 5
    return error

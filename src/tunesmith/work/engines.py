"""Engines of this host: started and stopped as the API orders, watched, reported."""

import asyncio
import json
import logging
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.errors import TuningAPIError
from tunesmith.spec.hands import EngineOrder, EngineReport, EngineStatus
from tunesmith.work.fork import Child, Forker
from tunesmith.work.pump import CappedLog, pump
from tunesmith.work.wire import Nothing, Wire

log = logging.getLogger(__name__)

STOP_SECONDS = 10.0
"""At this worker's end."""
DRAIN_SECONDS = 600
"""An engine waits no longer than that for its last requests, whoever waits for it."""
START_SECONDS = 600.0
"""For an engine to say that it is ready; a large model is long in coming."""
KEY_VARIABLE = "TUNESMITH_ENGINE_KEY"


@dataclass
class _Engine:
    order: EngineOrder
    status: EngineStatus
    child: Child | None = None
    halt: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once it should end."""
    grace_seconds: float = STOP_SECONDS
    """For the requests that it is answering then."""
    task: "asyncio.Task[None] | None" = None


@dataclass
class Engines:
    worker_id: str
    wire: Wire
    forker: Forker
    max_log_bytes: int
    module: str = "tunesmith.infer.server"
    command: str = ""
    """Of engines of another make; empty: ours."""
    _engines: dict[str, _Engine] = field(default_factory=dict)
    _tasks: "set[asyncio.Task[None]]" = field(default_factory=set)

    def statuses(self) -> tuple[EngineStatus, ...]:
        return tuple(engine.status for engine in self._engines.values())

    def obey(self, order: EngineOrder) -> None:
        """Start or stop an engine; an order that was obeyed already changes nothing."""
        engine = self._engines.get(order.id)
        if order.action == "start" and engine is None:
            engine = _Engine(order, EngineStatus(id=order.id, state="starting"))
            self._engines[order.id] = engine
            engine.task = asyncio.create_task(self._run(engine))
        elif order.action == "stop" and engine is not None:
            if not engine.halt.is_set():
                engine.grace_seconds = order.grace_seconds
            engine.halt.set()
        elif order.action == "stop":
            status = EngineStatus(id=order.id, state="stopped")
            self._keep(asyncio.create_task(self._report(status)))

    async def close(self) -> None:
        """Stop all of them, and tell the API, as far as it listens."""
        for engine in self._engines.values():
            engine.halt.set()
        running = [engine.task for engine in self._engines.values() if engine.task]
        if running:
            await asyncio.wait(running, timeout=STOP_SECONDS + 3)

    def _program(self, order: EngineOrder) -> tuple[str, list[str]]:
        if not self.command:
            return self.module, _arguments(order)
        return "tunesmith.work.foreign", [*_arguments(order), "--command", self.command]

    def _keep(self, task: "asyncio.Task[None]") -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, engine: _Engine) -> None:
        """From the order to the end that was reported. Never raises."""
        try:
            error = await self._live(engine)
        except Exception as broken:
            log.exception("engine %s: supervising failed", engine.order.id)
            error = f"the engine could not be started: {broken}"
        # What had served and died is started anew at the next question; what never came up is not.
        was_ready = engine.status.state == "ready"
        if engine.halt.is_set():
            await self._change(engine, state="stopped")
        else:
            state = "stopped" if was_ready else "failed"
            await self._change(engine, state=state, error=error[:4000])
        self._engines.pop(engine.order.id, None)

    async def _live(self, engine: _Engine) -> str:
        """Why it ended. Raises OSError where it could not be started."""
        journal = CappedLog(Path(engine.order.log_path), self.max_log_bytes)
        try:
            child = engine.child = await self.forker.start(
                *self._program(engine.order), _environment(engine.order)
            )
            helpers = [
                asyncio.create_task(pump(child.stderr, journal)),
                asyncio.create_task(self._end(engine, child)),
            ]
            try:
                return await self._watch(engine, child)
            finally:
                child.kill()
                await asyncio.wait(helpers[:1], timeout=5)
                child.close()
                for helper in helpers:
                    helper.cancel()
                await asyncio.gather(*helpers, return_exceptions=True)
        finally:
            journal.close()

    async def _watch(self, engine: _Engine, child: Child) -> str:
        child.stdin.close()
        try:
            said = await asyncio.wait_for(_first_word(child), START_SECONDS)
        except TimeoutError:
            return f"the engine was not ready after {START_SECONDS:.0f} s; see its log"
        port = said.get("port")
        if said.get("type") != "ready" or not isinstance(port, int):
            return str(said.get("message") or "the engine ended before it was ready; see its log")
        url = f"http://127.0.0.1:{port}"
        telling = asyncio.create_task(self._change(engine, state="ready", url=url, pid=child.pid))
        silent = asyncio.create_task(_drain(child))
        try:
            status = await asyncio.shield(child.exited)
        finally:
            for task in (telling, silent):
                task.cancel()
            await asyncio.gather(telling, silent, return_exceptions=True)
        return f"the engine ended with status {status}; see its log"

    async def _end(self, engine: _Engine, child: Child) -> None:
        """Once it should end: a kind word, then a hard one."""
        await engine.halt.wait()
        child.signal(signal.SIGTERM)
        await asyncio.wait([child.exited], timeout=engine.grace_seconds)
        child.kill()

    async def _change(self, engine: _Engine, **changes: object) -> None:
        engine.status = engine.status.model_copy(update={"url": None, "error": None} | changes)
        await self._report(engine.status)

    async def _report(self, status: EngineStatus) -> None:
        report = EngineReport(worker_id=self.worker_id, **status.model_dump())
        try:
            await self.wire.insist(f"/engines/{status.id}", report, Nothing)
        except TuningAPIError as error:  # the next poll carries its status too
            log.error("engine %s: the report was refused: %s", status.id, error)


def _arguments(order: EngineOrder) -> list[str]:
    argv = ["--model", order.model_path, "--model-name", order.model_name]
    argv += ["--host", "127.0.0.1", "--port", "0", "--key-env", KEY_VARIABLE]
    argv += ["--threads", str(order.threads), "--precision", order.precision]
    argv += ["--grace-seconds", str(DRAIN_SECONDS)]
    argv += ["--device", "cuda" if order.gpus else "cpu"]
    return [*argv, "--die-with-parent"]


def _environment(order: EngineOrder) -> dict[str, str]:
    told = {KEY_VARIABLE: order.key}
    if order.gpus:
        told["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, order.gpus))
    return told


async def _first_word(child: Child) -> dict[str, Any]:
    try:
        said = json.loads(await child.stdout.readline() or b"{}")
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


async def _drain(child: Child) -> None:
    while await child.stdout.read(1 << 16):
        pass

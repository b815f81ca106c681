"""Ray's side of the bell: `python -m tunesmith.work.ray` gives each waiting job a task of its own.

The API starts it with `--bell ray`. A task asks Ray for what its job needs, claims that one job and
runs it to its end. A task that is lost loses nothing: the job's lease lapses, the job waits again,
and gets another task.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import time
import uuid
from dataclasses import asdict, dataclass, field
from typing import Any

from tunesmith.errors import TuningAPIError
from tunesmith.settings import Settings
from tunesmith.spec.hands import (
    DISPATCHER,
    Capacity,
    Waiting,
    WaitingJob,
    WorkAsk,
    WorkReply,
)
from tunesmith.work.attempt import first_of
from tunesmith.work.errand import Errand
from tunesmith.work.gang import split
from tunesmith.work.wire import Unreachable, Wire
from tunesmith.work.worker import EXIT_LOCKED, locked

log = logging.getLogger(__name__)

LOCK = "dispatcher.lock"
LOOK_SECONDS = 1.0
"""Between two looks at the queue."""
TELL_SECONDS = 10.0
"""Between two words to the API of what the cluster has."""
MAX_PENDING = 64
"""Tasks that wait for their resources: more would only fix their order too early."""
MAX_PAUSE_SECONDS = 60.0
"""Between two tasks of a job, where they come to nothing."""
LEAVE_SECONDS = 38.0
"""For tasks to end at a stop."""
_SECRETS = {
    f"TUNESMITH_{name}"
    for name in ("API_KEY", "WORKER_TOKEN", "HUB_TOKEN", "DATABASE_URL", "REDIS_URL")
}


class Cluster:
    """Ray, connected: what it has, and tasks in it."""

    def __init__(self, address: str) -> None:
        """An empty address starts a cluster here. Raises whatever Ray does where there is none."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        self._ray = ray
        options: dict[str, Any] = {"include_dashboard": False} if not address else {}
        ray.init(
            address=address or "local",
            namespace="tunesmith",
            log_to_driver=False,
            logging_level="ERROR",
            **options,
        )
        self._task = ray.remote(_portable())
        self._gang = ray.remote(_portable_gang())

    def submit(self, errand: Errand, job: WaitingJob) -> Any:
        """One task on one node, or a head on the first of several. All else sees only that a job
        has a task, and that it ended."""
        nodes = split(job.gpus, [int(node.get("GPU", 0)) for node in self._nodes()])
        if job.gpus and nodes > 1:
            return self._gang.options(
                num_cpus=0, max_retries=0, name=f"tunesmith-{job.job_id}"
            ).remote(asdict(errand), nodes, job.gpus // nodes)
        memory = {} if job.gpus else {"memory": job.memory_bytes}
        return self._task.options(
            num_cpus=1, num_gpus=job.gpus, max_retries=0, name=f"tunesmith-{job.job_id}", **memory
        ).remote(asdict(errand))

    def outcome(self, task: Any) -> str | None:
        """What went wrong, "" for nothing; None while it waits or runs."""
        if not self._ray.wait([task], timeout=0)[0]:
            return None
        try:
            return str(self._ray.get(task))
        except self._ray.exceptions.TaskCancelledError:
            return ""
        except self._ray.exceptions.RayError as error:
            return f"{type(error).__name__}: {str(error).splitlines()[-1][:500]}"

    def cancel(self, task: Any) -> None:
        self._ray.cancel(task)

    def capacity(self) -> Capacity:
        """What the largest node has, and the GPUs of all; nothing of it is free to whoever asks
        the API."""
        nodes = self._nodes()
        most = {name: int(max((node.get(name, 0) for node in nodes), default=0)) for name in _KINDS}
        most["GPU"] = int(sum(node.get("GPU", 0) for node in nodes))
        return Capacity(
            slots=0,
            memory_bytes=0,
            max_slots=min(most["CPU"], 4096),
            max_gpus=min(most["GPU"], 1024),
            max_memory_bytes=most["memory"],
        )

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def close(self) -> None:
        self._ray.shutdown()


_KINDS = ("CPU", "GPU", "memory")


def _portable() -> Any:
    """The task, carried to the node as it is: a node without this package can say so."""

    def task(values: dict[str, Any]) -> str:
        import socket

        import ray

        node = socket.gethostname()
        try:
            from tunesmith.work.errand import Errand, run
        except ImportError as error:
            return f"node {node}: {error}; install the API's version of tunesmith there"
        fault = run(Errand(**values), [int(index) for index in ray.get_gpu_ids()])
        return fault and f"node {node}: {fault}"

    return task


def _portable_gang() -> Any:
    """The head of a gang: it takes as many GPUs on each of several nodes, all or none, starts the
    worker on the first and processes of the trainer on the others, and ends them together."""
    alone = _portable()

    def other(values: dict[str, Any], node: int) -> str:
        import ray

        from tunesmith.work.errand import Errand, join

        return join(Errand(**values), node, [int(index) for index in ray.get_gpu_ids()])

    def place() -> str:
        import socket

        import ray

        with socket.socket() as found:
            found.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{found.getsockname()[1]}"

    def gang(values: dict[str, Any], nodes: int, gpus: int) -> str:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = ray.util.placement_group([{"CPU": 1, "GPU": gpus}] * nodes, "STRICT_SPREAD")

        def on(node: int, task: Any, gpus: int) -> Any:
            there = PlacementGroupSchedulingStrategy(group, node)
            options = {"num_cpus": 1, "num_gpus": gpus, "max_retries": 0}
            return ray.remote(task).options(scheduling_strategy=there, **options)

        others = []
        try:
            values = values | {"nodes": nodes, "endpoint": ray.get(on(0, place, 0).remote())}
            head = on(0, alone, gpus).remote(values)
            others = [on(node, other, gpus).remote(values, node) for node in range(1, nodes)]
            return str(ray.get(head))
        finally:
            for task in others:
                ray.cancel(task)
            ray.util.remove_placement_group(group)

    return gang


def errand(settings: Settings, job: WaitingJob) -> Errand:
    """The token goes only where an address for other hosts is set."""
    server, token = settings.base_url or settings.public_url, ""
    if server:
        own = settings.worker_token.get_secret_value()
        token = own or (settings.home / "worker.token").read_text().strip()
    shown = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("TUNESMITH_") and name not in _SECRETS
    }
    return Errand(
        job_id=job.job_id,
        workspace=str(settings.workspace.resolve()),
        api_host=socket.gethostname(),
        server=server,
        token=token,
        settings=tuple(shown.items()),
    )


@dataclass
class _Pause:
    """After tasks of a job that came to nothing."""

    tasks: int = 0
    until: float = 0.0


@dataclass
class Dispatcher:
    settings: Settings
    wire: Wire
    cluster: Cluster
    _tasks: dict[str, Any] = field(default_factory=dict)
    """By job: the task that waits for resources, or runs."""
    _pauses: dict[str, _Pause] = field(default_factory=dict)
    _told: float = 0.0
    _last_fault: str = ""

    async def run(self, stopping: asyncio.Event) -> None:
        """Until `stopping`; then running tasks stop after a checkpoint."""
        while not stopping.is_set():
            try:
                await self._turn()
            except Unreachable:  # the wire told of it
                pass
            except TuningAPIError as error:
                self._complain(f"the API refused the dispatcher: {error}")
            await first_of(stopping, seconds=LOOK_SECONDS)
        await self._leave()

    async def _turn(self) -> None:
        self._collect()
        if time.monotonic() - self._told > TELL_SECONDS:
            await self._tell()
        waiting = (await self.wire.ask("/waiting", None, Waiting, seconds=30)).jobs
        names = {job.job_id for job in waiting}
        self._pauses = {name: pause for name, pause in self._pauses.items() if name in names}
        room = MAX_PENDING - len(names & self._tasks.keys())
        for job in waiting:
            if room > 0 and job.job_id not in self._tasks and self._is_due(job.job_id):
                self._tasks[job.job_id] = self.cluster.submit(errand(self.settings, job), job)
                log.info("job %s: a task asks for %d GPUs", job.job_id, job.gpus)
                room -= 1

    def _collect(self) -> None:
        for name, task in list(self._tasks.items()):
            fault = self.cluster.outcome(task)
            if fault is None:
                continue
            del self._tasks[name]
            pause = self._pauses.setdefault(name, _Pause())
            pause.tasks += 1
            pause.until = time.monotonic() + min(2.0 ** (pause.tasks - 1), MAX_PAUSE_SECONDS)
            if fault:
                self._complain(f"job {name}: its task failed: {fault}")

    def _is_due(self, name: str) -> bool:
        return name not in self._pauses or time.monotonic() >= self._pauses[name].until

    async def _tell(self) -> None:
        """So that a job that no node could take is refused, and the API counts its hands."""
        ask = WorkAsk(
            worker_id=DISPATCHER + socket.gethostname()[:100],
            claim_id=uuid.uuid4().hex,
            capacity=self.cluster.capacity(),
            wait_seconds=0,
            host={"name": socket.gethostname(), "pid": os.getpid()},
        )
        await self.wire.ask("/work", ask, WorkReply, seconds=30)
        self._told = time.monotonic()

    async def _leave(self) -> None:
        for task in self._tasks.values():
            self.cluster.cancel(task)
        deadline = time.monotonic() + LEAVE_SECONDS
        while self._tasks and time.monotonic() < deadline:
            self._collect()
            await asyncio.sleep(0.1)

    def _complain(self, fault: str) -> None:
        """Once, and again after another."""
        if fault != self._last_fault:
            log.error("%s", fault)
        self._last_fault = fault


async def serve(settings: Settings, cluster: Cluster) -> None:
    """Dispatch until SIGTERM or SIGINT; to be called once Ray has taken the signals for itself."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    wire = Wire(settings.home)
    try:
        await Dispatcher(settings, wire, cluster).run(stopping)
    finally:
        await wire.close()


def main() -> int:
    """Returns the exit status: 75 where a dispatcher is here, 1 where there is no cluster."""
    settings = Settings.read()
    logging.basicConfig(
        level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    with locked(settings, LOCK) as is_alone:
        if not is_alone:
            return EXIT_LOCKED
        try:
            cluster = Cluster(settings.ray_address)
        except Exception as error:  # its own, of no common kind; the API tries again
            place = f"at {settings.ray_address!r}" if settings.ray_address else "on this machine"
            log.error("no Ray cluster %s: %s: %s", place, type(error).__name__, error)
            return 1
        try:
            asyncio.run(serve(settings, cluster))
        finally:
            cluster.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

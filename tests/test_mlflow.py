"""The mirror in MLflow: one run a job, each point once, and an MLflow that fails fails alone."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from api_fixtures import hub_of, open_door
from servers import free_port, wait_for
from store_fixtures import Ledger, new_ask, new_job, started, step, succeeded
from tunesmith.hub.metrics import points
from tunesmith.hub.mlflow import cut, key_for, without_password
from tunesmith.settings import Settings
from tunesmith.spec.hands import NumberedEvent
from tunesmith.spec.records import Job, JobEvent, StopMode
from tunesmith.store import events, jobs, mirrors
from tunesmith.store.tables import mirrors as rows

OWNER = "test-key-001"
REST = "/api/2.0/mlflow/"
MLFLOW_PATIENCE = 240.0
"""Its start alone takes ten seconds of CPU."""


class Fake:
    """A server with MLflow's calls, kept in memory, that fails when told to."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.refusing = 0
        """Status that everything is answered with."""
        self.refused: dict[str, tuple[int, str]] = {}
        """By call: status and error code."""
        self.hanging = threading.Event()
        self.hanging.set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self.hanging.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, call: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.asked.append(call)
        self.hanging.wait(60)
        if self.refusing:
            return self.refusing, {}
        if call in self.refused:
            status, code = self.refused[call]
            return status, {"error_code": code, "message": "아니 🎣"}
        return self._do(call, body)

    def _do(self, call: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if call == "experiments/get-by-name":
            return 200, {"experiment": {"experiment_id": "7"}}
        if call == "runs/search":
            found = [run for run in self.runs.values() if run["job_id"] in body["filter"]]
            return 200, {"runs": [{"info": {"run_id": run["id"]}} for run in found]}
        if call == "runs/create":
            job_id = next(tag["value"] for tag in body["tags"] if tag["key"] == "tunesmith.job_id")
            run_id = f"run{len(self.runs)}-{job_id}"
            self.runs[run_id] = {"id": run_id, "job_id": job_id, "points": [], "status": "RUNNING"}
            return 200, {"run": {"info": {"run_id": run_id}}}
        run = self.runs.get(body["run_id"])
        if run is None:
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no run"}
        if call == "runs/log-batch":
            told = body.get("metrics", ())
            run["points"] += [(one["key"], one["step"], one["timestamp"]) for one in told]
        elif call == "runs/update":
            run["status"] = body["status"]
        return 200, {}


def _handler(fake: Fake) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: dict[str, Any]) -> None:
            call = self.path.partition("?")[0].removeprefix(REST)
            status, found = fake.answer(call, body)
            text = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    return Handler


@pytest.fixture
def fake() -> Iterator[Fake]:
    made = Fake()
    yield made
    made.close()


@pytest.fixture
def door(tmp_path: Path, database_url: str, fake: Fake) -> Iterator[TestClient]:
    with open_door(tmp_path, database_url=database_url, mlflow_url=fake.url) as opened:
        yield opened


@pytest.fixture
def local_door(tmp_path: Path, fake: Fake) -> Iterator[TestClient]:
    with open_door(tmp_path, mlflow_url=fake.url) as opened:
        yield opened


def write(door: TestClient, work: Any) -> Any:
    return hub_of(door).store.write(work).result()


def submit(door: TestClient) -> Job:
    """As a request does: job and mirror in one transaction."""

    def work(tx: Any) -> Job:
        job = jobs.submit(tx, new_job(owner=OWNER), max_unfinished=99, outputs_root="/ws/outputs")
        mirrors.owe(tx, job.id)
        return job

    return write(door, work)  # type: ignore[no-any-return]


def train(door: TestClient, job: Job, steps: int) -> None:
    write(door, lambda tx: jobs.claim(tx, new_ask("w1", job.id), lease_seconds=600))
    said = [started(total_steps=steps), *(step(n, total_steps=steps) for n in range(1, steps + 1))]
    batch = [NumberedEvent(n=n, event=event) for n, event in enumerate(said, 1)]
    write(door, lambda tx: events.append(tx, job.id, 1, "w1", batch))


def finish(door: TestClient, job: Job) -> None:
    ended = succeeded()
    write(door, lambda tx: jobs.finish(tx, job.id, 1, ended, promote=lambda job: job.output_dir))


def mirror_of(door: TestClient, job: Job) -> Any:
    query = rows.select().where(rows.c.job_id == job.id)
    return hub_of(door).store.read(lambda tx: tx.execute(query).mappings().one())


def wait_done(door: TestClient, job: Job) -> None:
    wait_for(lambda: mirror_of(door, job)["done_at"] is not None, f"the mirror of {job.id}")


def losses(fake: Fake, job: Job) -> list[int]:
    run = next(run for run in fake.runs.values() if run["job_id"] == job.id)
    return [number for key, number, _ in run["points"] if key == "loss"]


# a server of our own, that fails when told to


def test_each_job_becomes_one_run_with_each_step_once(door: TestClient, fake: Fake) -> None:
    done, dropped = submit(door), submit(door)
    train(door, done, 200)
    finish(door, done)
    write(door, lambda tx: jobs.request_stop(tx, dropped.id, StopMode.CANCEL, 1))
    wait_done(door, done)
    wait_done(door, dropped)
    assert losses(fake, done) == list(range(1, 201))
    states = {run["job_id"]: run["status"] for run in fake.runs.values()}
    assert states == {done.id: "FINISHED", dropped.id: "KILLED"}
    run_id = mirror_of(door, done)["run_id"]
    assert hub_of(door).mlflow_link(done) == f"{fake.url}/#/experiments/7/runs/{run_id}"


def test_a_run_that_was_made_but_not_recorded_is_found_again(door: TestClient, fake: Fake) -> None:
    fake.refused["runs/log-batch"] = (503, "")
    job = submit(door)
    wait_for(lambda: "runs/log-batch" in fake.asked, "the first batch")
    write(door, lambda tx: tx.execute(rows.update().values(run_id=None)))
    fake.refused.clear()
    train(door, job, 3)
    finish(door, job)
    wait_done(door, job)
    assert len(fake.runs) == 1
    assert losses(fake, job) == [1, 2, 3]


def test_a_batch_whose_record_was_lost_is_sent_again_as_the_same_points(
    local_door: TestClient, fake: Fake
) -> None:
    job = submit(local_door)
    train(local_door, job, 5)
    finish(local_door, job)
    wait_done(local_door, job)
    sent = {"sent_seq": 0, "sent_step": 0, "done_at": None}
    write(local_door, lambda tx: tx.execute(rows.update().values(sent)))
    wait_done(local_door, job)
    (run,) = fake.runs.values()
    assert len(run["points"]) == 2 * len(set(run["points"]))


def test_an_mlflow_that_lost_everything_is_told_everything_again(
    local_door: TestClient, fake: Fake
) -> None:
    job = submit(local_door)
    train(local_door, job, 4)
    wait_for(lambda: mirror_of(local_door, job)["sent_step"] == 4, "the first telling")
    fake.runs.clear()
    finish(local_door, job)
    wait_done(local_door, job)
    assert losses(fake, job) == [1, 2, 3, 4]


@pytest.mark.parametrize("fault", ["down", "slow", "500", "not found"])
def test_an_mlflow_in_trouble_holds_up_no_job_and_is_told_later(
    fault: str, local_door: TestClient, fake: Fake
) -> None:
    if fault == "slow":
        fake.hanging.clear()
    fake.refusing = {"500": 500, "not found": 404, "down": 502}.get(fault, 0)
    job = submit(local_door)
    train(local_door, job, 3)
    finish(local_door, job)
    assert hub_of(local_door).store.read(lambda tx: jobs.get(tx, job.id)).state.is_final
    wait_for(lambda: len(fake.asked) > 0, "a first question")
    assert hub_of(local_door).mlflow_link(job) is None
    fake.refusing = 0
    fake.hanging.set()
    wait_done(local_door, job)
    assert losses(fake, job) == [1, 2, 3]


def test_a_server_that_is_not_there_is_a_line_in_the_row(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        with open_door(tmp_path, mlflow_url=f"http://u:비밀@127.0.0.1:{port}") as door:
            job = submit(door)
            wait_for(lambda: mirror_of(door, job)["error"], "a first try")
            told = mirror_of(door, job)
    assert "does not answer" in told["error"]
    assert "비밀" not in told["error"]
    assert (told["holder"], told["done_at"]) == (None, None)


def test_a_run_that_is_refused_waits_alone(local_door: TestClient, fake: Fake) -> None:
    fake.refused["runs/create"] = (400, "INVALID_PARAMETER_VALUE")
    refused = submit(local_door)
    wait_for(lambda: mirror_of(local_door, refused)["error"], "the refusal")
    write(local_door, lambda tx: jobs.request_stop(tx, refused.id, StopMode.CANCEL, 1))
    fake.refused.clear()
    job = submit(local_door)
    train(local_door, job, 2)
    wait_for(lambda: mirror_of(local_door, job)["sent_step"] == 2, "the other job's run")


def test_jobs_from_before_mlflow_was_named_are_told_too(tmp_path: Path, fake: Fake) -> None:
    with open_door(tmp_path) as door:
        job = write(
            door,
            lambda tx: jobs.submit(
                tx, new_job(owner=OWNER), max_unfinished=9, outputs_root="/ws/outputs"
            ),
        )
    with open_door(tmp_path, mlflow_url=fake.url) as door:
        wait_for(lambda: hub_of(door).mlflow_link(job) is not None, "its run")


def test_a_holder_that_lost_its_row_changes_nothing(ledger: Ledger) -> None:
    job = ledger.submit()
    ledger.write(lambda tx: mirrors.owe(tx, job.id))
    (held,) = ledger.write(lambda tx: mirrors.claim(tx, "a", 5, 60))
    assert (held.job_id, held.run_id, held.tries) == (job.id, None, 1)
    assert ledger.write(lambda tx: mirrors.claim(tx, "b", 5, 60)) == []
    ledger.write(lambda tx: mirrors.release(tx, None))
    assert len(ledger.write(lambda tx: mirrors.claim(tx, "b", 5, 60))) == 1
    assert not ledger.write(lambda tx: mirrors.record_run(tx, job.id, "a", "7", "run"))
    assert ledger.write(lambda tx: mirrors.record_run(tx, job.id, "b", "7", "run"))
    assert not ledger.write(lambda tx: mirrors.advance(tx, job.id, "a", 1, 0))
    assert ledger.write(lambda tx: mirrors.advance(tx, job.id, "b", 1, 0))
    ledger.write(lambda tx: mirrors.let_go(tx, job.id, "b", 0.0))
    assert not ledger.store.read(mirrors.has_due)  # it has heard all there is
    ledger.stop(job.id)
    assert ledger.store.read(mirrors.has_due)


# how events become points


def event(seq: int, kind: str, **data: Any) -> JobEvent:
    return JobEvent(job_id="0" * 8, seq=seq, fence=1, at=1000.5, type=kind, data=data)


def test_a_step_that_an_attempt_says_again_is_one_point() -> None:
    batch = [event(n, "step", step=number, loss=0.5) for n, number in enumerate((1, 2, 2, 3), 1)]
    batch += [event(5, "evaluated", step=3, metrics={"eval_loss": 1.5}), event(6, "notice")]
    found, last = points(batch, 1)
    assert [(one["key"], one["step"]) for one in found] == [
        ("loss", 2),
        ("loss", 3),
        ("eval_loss", 3),
    ]
    assert {one["timestamp"] for one in found} == {1_000_500}
    assert last == 3
    assert points([event(1, "step", step=4, loss=None)], 3) == ([], 4)


def test_each_configuration_of_a_sweep_has_a_curve_of_its_own() -> None:
    batch = [
        event(n, "step", step=n, trial=f"trial-{n % 2 + 1}", trial_step=(n + 1) // 2, loss=0.5)
        for n in range(1, 5)
    ]
    found, last = points(batch, 1)
    assert [(one["key"], one["step"]) for one in found] == [
        ("trial-1/loss", 1),
        ("trial-2/loss", 2),
        ("trial-1/loss", 2),
    ]
    assert last == 4


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("eval/loss", "eval/loss"),
        ("손실 🎣", "손실 _"),
        ("../../etc", "____etc"),
        ("/a", "_a"),
        ("a//b", "a__b"),
        ("..", "_"),
        ("", "_"),
        ("x" * 300, "x" * 250),
    ],
)
def test_a_metric_s_name_is_one_that_mlflow_takes(name: str, key: str) -> None:
    assert key_for(name) == key


def test_what_is_too_long_is_cut_and_a_password_is_not_shown() -> None:
    assert len(cut("긴" * 10_000)) == 500
    assert without_password("https://u:p@h:5000/x/") == "https://h:5000/x"


@pytest.mark.parametrize("url", ["ftp://h", "h:5000", "http://", "http://h/?a=1", "http://a b/"])
def test_an_address_that_is_none_is_refused_at_the_start(url: str) -> None:
    with pytest.raises(ValueError, match="mlflow_url"):
        Settings.read({"TUNESMITH_MLFLOW_URL": url})


# the real server


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with real_server(tmp_path_factory.mktemp("mlflow")) as url:
        yield url


@contextmanager
def real_server(folder: Path) -> Iterator[str]:
    port = free_port()
    quiet = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)),
        *("--host", "127.0.0.1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
        *("--default-artifact-root", str(folder / "artifacts")),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=os.environ | quiet, stdout=log, stderr=log, cwd=folder,
            start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + MLFLOW_PATIENCE
        while not is_healthy(url):
            assert time.monotonic() < deadline, (folder / "log").read_text()[-4000:]
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_healthy(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health", trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False


def test_a_real_mlflow_shows_the_job_and_no_point_twice(tmp_path: Path, mlflow_server: str) -> None:
    with open_door(tmp_path, mlflow_url=mlflow_server) as door:
        job = submit(door)
        train(door, job, 300)
        finish(door, job)
        wait_done(door, job)
        first = mirror_of(door, job)["run_id"]
        again = {"run_id": None, "sent_seq": 0, "sent_step": 0, "done_at": None}
        write(door, lambda tx: tx.execute(rows.update().values(again)))
        wait_done(door, job)
        assert mirror_of(door, job)["run_id"] == first
        link = hub_of(door).mlflow_link(job)
    assert link == f"{mlflow_server}/#/experiments/1/runs/{first}"
    run = get(mlflow_server, "runs/get", run_id=first)["run"]
    tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
    params = {one["key"]: one["value"] for one in run["data"]["params"]}
    assert run["info"]["status"] == "FINISHED"
    assert (tags["tunesmith.job_id"], tags["tunesmith.state"]) == (job.id, "succeeded")
    assert tags["tunesmith.dataset"] == "data/한국어.jsonl"
    assert params["optim.learning_rate"] == str(job.spec.optim.learning_rate)
    found = get(
        mlflow_server, "metrics/get-history", run_id=first, metric_key="loss", max_results=1000
    )["metrics"]
    assert [one["step"] for one in found] == list(range(1, 301))


def get(url: str, call: str, **query: Any) -> Any:
    reply = httpx2.get(f"{url}{REST}{call}", params=query, trust_env=False)
    assert reply.status_code == 200, reply.text
    return reply.json()

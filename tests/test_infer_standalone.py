"""The engine by itself: without a model, with keys and rates, and as several processes."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.requests import Request

import infer_fixtures as made
from servers import free_port
from tunesmith.errors import BadRequestError, TuningAPIError
from tunesmith.infer.fellows import Fellows
from tunesmith.infer.house import House
from tunesmith.infer.loading import Loader, Wanted

PATIENCE = 120.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("standalone")
    made.model_folder(folder / "first")
    made.model_folder(folder / "second", seed=5)
    return folder


@contextmanager
def serving(folder: Path, *command: str, **settings: str) -> Iterator[str]:
    """Yield the address, once it answers. Settings come from a `.env`."""
    port = free_port()
    told = {"TUNESMITH_CPU_SLOTS": "1", **settings}
    (folder / ".env").write_text("".join(f"{name}={text}\n" for name, text in told.items()))
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *(part.replace("PORT", str(port)) for part in command)],
            env=made.ENVIRONMENT,
            stdout=log,
            stderr=log,
            cwd=folder,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        while not _answers(url):
            assert process.poll() is None, (folder / "log").read_text()
        yield url
    finally:
        process.terminate()
        process.wait(PATIENCE)


def _answers(url: str) -> bool:
    time.sleep(0.05)
    try:
        return httpx2.get(f"{url}/health", timeout=PATIENCE).status_code == 200
    except httpx2.TransportError:
        return False


@pytest.fixture(scope="module")
def keys(folder: Path) -> dict[str, str]:
    """By scope: keys that the command line wrote into a file."""
    command = [sys.executable, "-m", "tunesmith.cli", "keys", "create", "--file"]
    found = {}
    for scope in ("infer", "load"):
        words = [*command, str(folder / "keys"), "--scope", scope, "--label", f"to {scope}"]
        ran = subprocess.run(words, env=made.ENVIRONMENT, capture_output=True, text=True)
        found[scope] = ran.stdout.strip()
    return found


@pytest.fixture(scope="module")
def server(folder: Path, keys: dict[str, str]) -> Iterator[str]:
    settings = {
        "TUNESMITH_API_KEYS_FILE": str(folder / "keys"),
        "TUNESMITH_RATE_LIMIT": "4/hour",
        "TUNESMITH_LOG_FORMAT": "json",
        "TUNESMITH_CORS_ORIGINS": "https://pages.example",
    }
    command = ("tunesmith.cli", "serve", "--port", "PORT")
    with serving(folder, *command, **settings) as url:
        yield url


def ask(url: str, method: str, path: str, key: str, **more: Any) -> httpx2.Response:
    headers = {"x-api-key": key} if key else {}
    return httpx2.request(method, url + path, headers=headers, timeout=PATIENCE, **more)


def test_it_starts_without_a_model_and_says_so(server: str, keys: dict[str, str]) -> None:
    health = httpx2.get(f"{server}/health").json()
    assert (health["status"], health["model_loaded"]) == ("healthy", False)
    for path, body in [("/generate", {"prompt": "a"}), ("/chat", {"instruction": "a"})]:
        reply = ask(server, "POST", path, keys["infer"], json=body)
        assert (reply.status_code, "load_model" in reply.json()["detail"]) == (503, True)
    for path in ("/docs", "/redoc"):
        page = httpx2.get(server + path).text
        assert "http://" not in page.replace("http://127.0.0.1", "")
    assert "/generate" in httpx2.get(f"{server}/openapi.json").json()["paths"]


def test_a_key_opens_what_it_was_made_for(server: str, folder: Path, keys: dict[str, str]) -> None:
    params = {"model_path": str(folder / "first")}
    assert ask(server, "POST", "/load_model", "", params=params).status_code == 401
    assert ask(server, "POST", "/load_model", "sk-no", params=params).status_code == 401
    refused = ask(server, "POST", "/load_model", keys["infer"], params=params)
    assert (refused.status_code, "'load'" in refused.json()["detail"]) == (403, True)
    assert ask(server, "POST", "/load_model", keys["load"], params=params).status_code == 200
    assert ask(server, "GET", "/model_info", keys["load"]).status_code == 403
    told = ask(server, "GET", "/model_info", keys["infer"]).json()
    assert told["model_path"] == str(folder / "first")


def test_over_the_rate_is_a_429_that_says_when(server: str, keys: dict[str, str]) -> None:
    body = {"prompt": "a", "max_new_tokens": 2}
    replies = [ask(server, "POST", "/generate", keys["infer"], json=body) for _ in range(5)]
    assert replies[-1].status_code == 429
    assert 3000 < int(replies[-1].headers["retry-after"]) <= 3600
    assert ask(server, "GET", "/model_info", keys["infer"]).status_code == 200


def test_metrics_and_the_log_tell_of_requests(
    server: str, folder: Path, keys: dict[str, str]
) -> None:
    text = ask(server, "GET", "/metrics", keys["infer"]).text
    assert 'tunesmith_engine_requests_total{route="/generate",status="429"}' in text
    for name in ("waiting", "running", "cache_used_ratio", "first_token_seconds_count"):
        assert f"\ntunesmith_engine_{name} " in text
    lines = [json.loads(line) for line in (folder / "log").read_text().splitlines() if "{" in line]
    line = next(each for each in lines if each.get("path") == "/model_info")
    assert {"request_id", "seconds", "generation_seconds", "completion_tokens"} <= set(line)


def test_a_page_of_a_known_origin_may_ask(server: str) -> None:
    ask_first = {"access-control-request-method": "POST", "origin": "https://pages.example"}
    told = httpx2.options(f"{server}/generate", headers=ask_first)
    assert told.headers["access-control-allow-origin"] == "https://pages.example"


def test_a_load_reaches_every_process_also_one_that_comes_later(folder: Path) -> None:
    command = ["gunicorn", "--preload", "-w", "2", "-b", "127.0.0.1:PORT"]  # torch is read once
    command += ["-k", "uvicorn_worker.UvicornWorker", "tunesmith.infer.server:app"]
    settings = {"MODEL_PATH": str(folder / "first")}
    with serving(folder, *command, **settings) as url:
        params = {"model_path": str(folder / "second")}
        assert ask(url, "POST", "/load_model", "", params=params).status_code == 200
        before = _seen(url, 2)
        assert set(before.values()) == {"second"}
        os.kill(next(iter(before)), signal.SIGKILL)
        while len(after := _seen(url, 2)) < 2 or set(after) == set(before):
            pass
        assert set(after.values()) == {"second"}


def _seen(url: str, count: int) -> dict[int, str]:
    """The models of processes that answer, by process id."""
    seen: dict[int, str] = {}
    deadline = time.monotonic() + PATIENCE
    while len(seen) < count and time.monotonic() < deadline:
        try:
            health = httpx2.get(f"{url}/health").json()
        except httpx2.TransportError:
            continue
        seen[health["pid"]] = health["model_name"]
    return seen


def test_what_one_process_cannot_load_none_does(folder: Path, tmp_path: Path) -> None:
    made.model_folder(tmp_path / "wide", hidden_size=192)
    first = Wanted(folder / "first", "first", "fp32")
    wide = Wanted(tmp_path / "wide", "wide", "fp32")
    roomy = House(None, Loader(running=1))
    narrow = House(None, Loader(running=1, cache_bytes=50_000))

    async def meet() -> None:
        async with (
            Fellows(roomy, tmp_path, "1").joined(first),
            Fellows(narrow, tmp_path, "2").joined(first),
        ):
            for house in (roomy, narrow):
                with pytest.raises(BadRequestError, match="holds no 64 tokens"):
                    await house.load(wide)
                assert [_name(each) for each in (roomy, narrow)] == ["first", "first"]
            await narrow.load(Wanted(folder / "second", "second", "fp32"))
            assert [_name(each) for each in (roomy, narrow)] == ["second", "second"]
            roomy.close()
            narrow.close()

    asyncio.run(meet())


def _name(house: House) -> str:
    assert house.served is not None
    return house.served.model_name


def test_without_room_for_both_the_old_model_goes_first_and_comes_back(
    folder: Path, tmp_path: Path
) -> None:
    first, second = Wanted(folder / "first", "first"), Wanted(folder / "second", "second")

    async def swap() -> None:
        house = House(None, Loader(running=1, reserve_bytes=1 << 60))
        house.put(await house.prepare(first))
        old = await house.take(Request({"type": "http"}))
        loading = asyncio.create_task(house.load(second))
        while house.served is not None:
            await asyncio.sleep(0.01)
        late = asyncio.create_task(house.take(Request({"type": "http"})))
        await asyncio.sleep(0.05)
        assert not loading.done()
        assert not late.done()
        old.let_go()
        assert (await loading).model_name == (await late).model_name == "second"
        (await late).let_go()
        made.network("llama").save_pretrained(tmp_path)
        with pytest.raises(TuningAPIError, match="tokenizer"):
            await house.load(Wanted(tmp_path, "mute"))
        assert _name(house) == "second"
        house.close()

    asyncio.run(swap())

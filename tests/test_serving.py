"""Serving through the whole house: the inference contract, engines that come, go and are killed."""

import asyncio
import json
import sys
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

import infer_fixtures as made
from house import KEY, PATIENCE, House, open_house
from infer_fixtures import EngineProcess
from train_fixtures import make_model

GREEDY = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 6}


COMMAND = (
    f"{sys.executable} -m tunesmith.infer.server --model {{model}} --model-name {{name}} "
    "--host {host} --port {port} --key-env TUNESMITH_ENGINE_KEY --threads 1"
)
"""A server that speaks OpenAI's contract: ours, started as another's would be."""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """A server that is there already, with a key, a base and nothing else."""
    folder = tmp_path_factory.mktemp("elsewhere")
    base = made.model_folder(folder / "workspace" / "models" / "theirs")
    made.adapter_folder(folder / "workspace" / "models" / "adapter", base, 1)
    arguments = (f"--model={base}", "--model-name=their-model")
    with made.engine_process(*arguments, log=folder / "log") as process:
        yield process


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, elsewhere: EngineProcess) -> Iterator[House]:
    workspace = next(tmp_path_factory.getbasetemp().glob("elsewhere*")) / "workspace"
    settings = {
        "TUNESMITH_ENGINE_COMMAND": COMMAND,
        "TUNESMITH_ENGINE_URL": f"{elsewhere.url}/v1",
        "TUNESMITH_ENGINE_API_KEY": made.KEY,
    }
    with open_house(workspace, **settings) as opened:
        make_model(opened.workspace / "models" / "other")
        (opened.workspace / "models" / "empty").mkdir()
        yield opened


@pytest.fixture
def http(house: House) -> Iterator[httpx2.Client]:
    with house.client as client:
        client.timeout = httpx2.Timeout(PATIENCE)
        yield client


def load(http: httpx2.Client, path: str, **more: str) -> httpx2.Response:
    return http.post("/load_model", params={"model_path": path, **more})


def events(text: str) -> list[Any]:
    *frames, last, _ = text.split("\n\n")
    assert last == "data: [DONE]"
    return [json.loads(each.removeprefix("data: ")) for each in frames]


def test_a_model_is_loaded_and_answers_without_being_named(http: httpx2.Client) -> None:
    assert http.post("/generate", json={"prompt": "a"}).status_code == 503
    assert http.get("/model_info").status_code == 503
    told = load(http, "models/tiny").json()
    assert (told["status"], told["model_name"]) == ("success", "tiny")
    assert told["model_path"] == "models/tiny"
    whole = http.post("/generate", json={"prompt": "the", **GREEDY}).json()
    assert whole["model_name"] == "tiny"
    *pieces, last = events(
        http.post("/generate", json={"prompt": "the", **GREEDY, "stream": True}).text
    )
    assert "the" + "".join(each["token"] for each in pieces) == whole["generated_text"][0]
    assert last["usage"] == whole["usage"]
    info = http.get("/model_info").json()
    assert (info["model_name"], info["gpu_memory_allocated"]) == ("tiny", "0.00 GB")
    named = {"instruction": "the", "model": "models/other", "max_new_tokens": 4}
    assert http.post("/chat", json=named).json()["model_name"] == "models/other"
    health = http.get("/health").json()
    assert (health["status"], health["model_loaded"]) == ("healthy", True)
    lines = [line for line in http.get("/metrics").text.splitlines() if 'model="tiny"' in line]
    tokens = [line for line in lines if "engine_completion_tokens_total" in line]
    assert float(tokens[0].split()[-1]) >= 12


def test_a_load_that_fails_says_why_and_the_default_stays(http: httpx2.Client) -> None:
    load(http, "models/tiny")
    refused = load(http, "models/other", load_in_8bit="1", load_in_4bit="1")
    assert (refused.status_code, "exclude" in refused.json()["detail"]) == (400, True)
    for path in ("models/nowhere", "models/empty", "/etc", "../..", "a\0b"):
        reply = load(http, path)
        assert reply.status_code in (400, 404), (path, reply.text)
        assert isinstance(reply.json()["detail"], str)
    assert load(http, "models/nowhere").status_code == 404
    assert http.get("/model_info").json()["model_name"] == "tiny"


def test_what_the_contract_forbids_is_a_422(http: httpx2.Client) -> None:
    for body in ({}, {"prompt": "a", "top_p": 1.1}, {"prompt": "a", "typo": 1}, {"prompt": 5}):
        reply = http.post("/generate", json=body)
        assert (reply.status_code, reply.json()["detail"][0]["loc"][0]) == (422, "body")


def test_a_server_elsewhere_answers_for_the_models_that_it_lists(
    house: House, http: httpx2.Client
) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4, "temperature": 0}
    told = {}
    for model in ("their-model", "models/theirs", "models/adapter"):
        reply = http.post("/v1/chat/completions", json={"model": model, **chat}, headers=KEY)
        assert reply.status_code == 200, reply.text
        told[model] = reply.json()["choices"][0]["message"]["content"]
    assert told["their-model"] == told["models/theirs"] != told["models/adapter"]
    listed = http.get("/v1/models", headers=KEY).json()["data"]
    assert "their-model" in {each["id"] for each in listed}
    generated = http.post("/generate", json={"prompt": "a", "model": "their-model", **GREEDY})
    assert generated.json()["model_name"] == "their-model"


def test_an_engine_killed_in_mid_stream_is_an_event_and_the_next_request_is_served(
    house: House, http: httpx2.Client
) -> None:
    load(http, "models/tiny")
    body = {"prompt": "the", "stream": True, "max_new_tokens": 120, "num_return_sequences": 16}
    processes = house.children("--model-name tiny")
    with http.stream("POST", "/generate", json=body) as stream:
        lines = stream.iter_lines()
        assert '"index": ' in next(lines)
        house.kill(*processes)
        rest = [line for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "engine_lost"
    again = http.post("/generate", json={"prompt": "the", **GREEDY})
    assert (again.status_code, again.json()["model_name"]) == (200, "tiny")


def test_two_hundred_requests_at_once_are_answered_or_told_to_wait(
    house: House, http: httpx2.Client
) -> None:
    body = {"prompt": "the", **GREEDY, "max_new_tokens": 2, "model": "models/tiny"}

    async def ask_all() -> list[int]:
        async with httpx2.AsyncClient(base_url=house.url, timeout=PATIENCE) as client:
            asked = (client.post("/generate", json=body) for _ in range(200))
            return [reply.status_code for reply in await asyncio.gather(*asked)]

    statuses = asyncio.run(ask_all())
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 100

"""Serving through the whole house: the inference contract, engines that come, go and are killed."""

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from house import PATIENCE, House, open_house
from train_fixtures import make_model

GREEDY = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with open_house(tmp_path_factory.mktemp("serving")) as opened:
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

"""The inference contract on the engine's own door: generate, chat, what is loaded, load another."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

import infer_fixtures as made
from infer_fixtures import EngineProcess

GREEDY = {"do_sample": False, "repetition_penalty": 1.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contract")
    made.model_folder(folder / "first")
    made.model_folder(folder / "second", seed=5)
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def engine(folders: Path) -> Iterator[EngineProcess]:
    with made.engine_process(f"--model={folders / 'first'}", log=folders / "log") as process:
        yield process


@pytest.fixture
def http(engine: EngineProcess, folders: Path) -> Iterator[httpx2.Client]:
    headers = {"authorization": f"Bearer {made.KEY}"}
    with httpx2.Client(base_url=engine.url, headers=headers, timeout=60) as client:
        yield client
        if client.get("/health").json()["model_name"] != "first":
            assert load(client, folders / "first").status_code == 200


def load(http: httpx2.Client, path: Path, **more: str) -> httpx2.Response:
    return http.post("/load_model", params={"model_path": str(path), **more})


def events(reply: httpx2.Response) -> list[Any]:
    *frames, last, _ = reply.text.split("\n\n")
    assert last == "data: [DONE]"
    return [json.loads(each.removeprefix("data: ")) for each in frames]


def test_a_text_is_gone_on_with(http: httpx2.Client) -> None:
    body = {"prompt": "the fox", "max_new_tokens": 6, **GREEDY, "num_return_sequences": 2}
    told = http.post("/generate", json=body).json()
    assert [text[:7] for text in told["generated_text"]] == ["the fox"] * 2
    assert (told["prompt"], told["model_name"]) == ("the fox", "first")
    assert told["usage"]["completion_tokens"] == 12
    assert told["generation_time"] > 0


def test_a_stream_of_it_comes_a_token_at_a_time_and_ends_with_the_whole(
    http: httpx2.Client,
) -> None:
    body = {"prompt": "the fox", "max_new_tokens": 6, **GREEDY}
    whole = http.post("/generate", json=body).json()
    *pieces, last = events(http.post("/generate", json={**body, "stream": True}))
    assert 2 < len(pieces) <= 6
    assert "the fox" + "".join(each["token"] for each in pieces) == whole["generated_text"][0]
    assert pieces[-1]["finish_reason"] == "length"
    assert last["generated_text"] == whole["generated_text"]
    assert last["usage"] == whole["usage"]


def test_an_instruction_is_one_turn_of_a_conversation(http: httpx2.Client) -> None:
    turn = {"role": "user", "content": "Count.\n1 2 3"}
    more = {"temperature": 0, "max_new_tokens": 8}
    one = http.post("/chat", json={"instruction": "Count.", "input": "1 2 3", **more}).json()
    same = http.post("/chat", json={"messages": [turn], **more}).json()
    openai = {"model": "first", "messages": [turn], "temperature": 0, "max_tokens": 8}
    third = http.post("/v1/chat/completions", json={**openai, "top_p": 0.9}).json()
    assert one["response"] == same["response"] == third["choices"][0]["message"]["content"]
    assert one["instruction"] == "Count."
    streamed = events(http.post("/chat", json={"messages": [turn], **more, "stream": True}))
    assert streamed[-1]["response"] == one["response"]


def test_defaults_give_way_to_the_context_and_wishes_do_not(http: httpx2.Client) -> None:
    prompt = "the fox " * 100
    fits = http.post("/generate", json={"prompt": prompt})
    assert fits.status_code == 200
    assert fits.json()["usage"]["total_tokens"] <= 512
    refused = http.post("/generate", json={"prompt": prompt, "max_new_tokens": 500})
    assert refused.status_code == 400
    assert "the context holds 512 tokens" in refused.json()["detail"]


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("/generate", {}, "prompt"),
    ("/generate", {"prompt": "a", "max_new_tokens": 0}, "max_new_tokens"),
    ("/generate", {"prompt": "a", "temperature": 2.1}, "temperature"),
    ("/generate", {"prompt": "a", "top_p": -0.1}, "top_p"),
    ("/generate", {"prompt": "a", "top_k": -1}, "top_k"),
    ("/generate", {"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
    ("/generate", {"prompt": "a", "num_return_sequences": 17}, "num_return_sequences"),
    ("/generate", {"prompt": "a", "max_token": 5}, "max_token"),
    ("/generate", {"prompt": "a", "stop": ["x"] * 17}, "stop"),
    ("/chat", {"messages": [{"role": "robot", "content": "a"}]}, "role"),
    ("/chat", {"instruction": "a", "messages": [{"role": "user", "content": "b"}]}, "body"),
    ("/chat", {}, "body"),
]


@pytest.mark.parametrize(("path", "body", "field"), BAD, ids=[f"{p} {f}" for p, _, f in BAD])
def test_a_value_out_of_range_is_a_422_that_names_it(
    http: httpx2.Client, path: str, body: dict[str, Any], field: str
) -> None:
    reply = http.post(path, json=body)
    assert reply.status_code == 422
    assert reply.json()["detail"][0]["loc"][-1] == field


def test_a_body_that_is_no_json_is_a_422_too(http: httpx2.Client) -> None:
    for body in (b"", b"[]", b'{"prompt": NaN}', b"[" * 300):
        reply = http.post("/generate", content=body)
        assert (reply.status_code, reply.json()["detail"][0]["loc"]) == (422, ["body"])


def test_edges_of_the_ranges_are_served(http: httpx2.Client) -> None:
    edge = {"temperature": 2, "top_p": 0, "top_k": 0, "num_return_sequences": 16}
    body = {"prompt": "a", "max_new_tokens": 1, "repetition_penalty": 0.01, **edge}
    reply = http.post("/generate", json={**body, "stop": "x", "seed": 3})
    assert len(reply.json()["generated_text"]) == 16
    assert http.post("/generate", json={**body, "top_k": 10**9}).status_code == 200


def test_another_model_takes_over_while_a_stream_goes_on(
    http: httpx2.Client, folders: Path
) -> None:
    body = {"prompt": "a", "max_new_tokens": 400, **GREEDY, "stream": True}
    said: list[httpx2.Response] = []
    alone = events(http.post("/generate", json=body))[-1]
    with http.stream("POST", "/generate", json=body) as stream:
        loading = threading.Thread(target=lambda: said.append(load(http, folders / "second")))
        loading.start()
        text = stream.read().decode()
        loading.join()
    expected = {"status": "success", "model_name": "second", "model_path": str(folders / "second")}
    assert said[0].json().items() >= expected.items()
    last = json.loads(text.split("\n\n")[-3].removeprefix("data: "))
    assert (last["model_name"], last["generated_text"]) == ("first", alone["generated_text"])
    assert http.get("/model_info").json()["model_path"] == str(folders / "second")
    other = http.post("/generate", json={"prompt": "a", "max_new_tokens": 9, **GREEDY}).json()
    assert other["model_name"] == "second"


def test_a_load_that_fails_says_why_and_the_old_model_serves_on(
    http: httpx2.Client, folders: Path
) -> None:
    both = load(http, folders / "second", load_in_8bit="true", load_in_4bit="true")
    assert (both.status_code, "exclude" in both.json()["detail"]) == (400, True)
    for name, status in [("nowhere", 404), ("empty", 400), ("a\0b", 404), ("a" * 3000, 404)]:
        reply = load(http, folders / name)
        assert (name[:9], reply.status_code) == (name[:9], status)
        assert reply.json()["detail"]
    assert http.post("/load_model").status_code == 422
    assert http.get("/health").json()["model_name"] == "first"
    assert http.post("/chat", json={"instruction": "a"}).status_code == 200


def test_a_missing_key_is_a_401_in_the_contracts_shape(engine: EngineProcess) -> None:
    reply = httpx2.post(f"{engine.url}/generate", json={"prompt": "a"})
    assert (reply.status_code, "key" in reply.json()["detail"]) == (401, True)

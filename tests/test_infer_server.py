"""The engine's process, through the official client and raw HTTP on loopback."""

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

import infer_fixtures as made
from infer_fixtures import EngineProcess, ForkServer

USER: Any = [{"role": "user", "content": "안녕하세요, 你好 😀"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    base = made.model_folder(folder / "base")
    for seed, name in enumerate(["one", "two"]):
        made.adapter_folder(folder / name, base, seed)
    return folder


@pytest.fixture(scope="module")
def engine(folders: Path) -> Iterator[EngineProcess]:
    model = f"--model={folders / 'base'}"
    adapter = f"--adapter=ft:tiny:me::one={folders / 'one'}"
    log = folders / "engine.log"
    with made.engine_process(model, "--model-name=tiny", adapter, log=log) as process:
        yield process


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()


@pytest.fixture
def client(engine: EngineProcess) -> Iterator[openai.OpenAI]:
    url = f"{engine.url}/v1"
    with openai.OpenAI(base_url=url, api_key=made.KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def http(engine: EngineProcess) -> Iterator[httpx2.Client]:
    headers = {"authorization": f"Bearer {made.KEY}"}
    with httpx2.Client(base_url=engine.url, headers=headers, timeout=60) as client:
        yield client


def answer(client: openai.OpenAI, **asked: Any) -> str:
    asked = {"model": "tiny", "messages": USER, "max_tokens": 24, "temperature": 0, **asked}
    return client.chat.completions.create(**asked).choices[0].message.content or ""


def streamed(client: openai.OpenAI, **asked: Any) -> list[Any]:
    asked = {"model": "tiny", "messages": USER, "max_tokens": 24, "temperature": 0, **asked}
    return list(client.chat.completions.create(stream=True, **asked))


def content(chunks: list[Any]) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def wait_until(http: httpx2.Client, **expected: int) -> dict[str, Any]:
    """Ask for the health until it shows what is expected; the test's time limit ends it."""
    while True:
        health: dict[str, Any] = http.get("/health").json()
        if all(health[name] == value for name, value in expected.items()):
            return health
        time.sleep(0.01)


def test_a_chat_is_answered_and_counted(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="tiny", messages=USER, max_tokens=9, temperature=0)
    assert reply.object == "chat.completion"
    assert reply.choices[0].finish_reason == "length"
    assert reply.choices[0].message.role == "assistant"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 9
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 9


def test_a_stream_says_the_same_as_a_whole_answer(client: openai.OpenAI) -> None:
    chunks = streamed(client, stream_options={"include_usage": True})
    assert content(chunks) == answer(client)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert all(c.choices[0].finish_reason is None for c in chunks[:-2])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 24


def test_frames_of_a_stream_are_as_published(http: httpx2.Client) -> None:
    body = {"model": "tiny", "messages": USER, "max_tokens": 5, "temperature": 0, "stream": True}
    reply = http.post("/v1/chat/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    frames = reply.text.split("\n\n")
    assert frames.pop() == ""
    assert frames.pop() == "data: [DONE]"
    bodies = [json.loads(frame.removeprefix("data: ")) for frame in frames]
    assert {each["object"] for each in bodies} == {"chat.completion.chunk"}
    assert len({each["id"] for each in bodies}) == 1


def test_eight_streams_progress_together(engine: EngineProcess) -> None:
    async def follow(client: openai.AsyncOpenAI, number: int, order: list[int]) -> str:
        text = ""
        stream = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": f"{number} and again"}],
            max_tokens=150,
            temperature=0,
            stream=True,
            extra_body={"repetition_penalty": 1.3},
        )
        async for chunk in stream:
            order.append(number)
            text += chunk.choices[0].delta.content or ""
        return text

    async def follow_all() -> tuple[list[int], list[str]]:
        order: list[int] = []
        url = f"{engine.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=made.KEY, max_retries=0) as client:
            return order, await asyncio.gather(*(follow(client, n, order) for n in range(8)))

    order, texts = asyncio.run(follow_all())
    assert all(texts)
    starts = [order.index(number) for number in range(8)]
    ends = [len(order) - 1 - order[::-1].index(number) for number in range(8)]
    assert max(starts) < min(ends)


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    whole = answer(client, max_tokens=60, seed=3, temperature=1.0)
    stop = whole[12:15]
    cut = whole[: whole.index(stop)]
    asked = {"max_tokens": 60, "seed": 3, "temperature": 1.0, "stop": [stop, "never said"]}
    chunks = streamed(client, **asked)
    assert content(chunks) == cut
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert answer(client, **asked) == cut


def test_the_same_seed_says_the_same_among_others(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"seed": 11, "temperature": 1.0, "n": 3, "max_tokens": 12}
    first = client.chat.completions.create(model="tiny", messages=USER, **asked)
    answer(client, seed=12, temperature=1.0)
    again = client.chat.completions.create(model="tiny", messages=USER, **asked)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.message.content for choice in again.choices] == texts
    assert len(set(texts)) == 3
    assert answer(client, seed=11, temperature=1.0, max_tokens=12) == texts[0]


def test_adapters_answer_to_their_names(
    client: openai.OpenAI, http: httpx2.Client, folders: Path
) -> None:
    names = ["tiny", "ft:tiny:me::one", "later/two"]
    loaded = {"lora_name": names[2], "lora_path": str(folders / "two")}
    with pytest.raises(openai.NotFoundError) as missing:
        answer(client, model=names[2])
    assert missing.value.code == "model_not_found"
    assert http.post("/v1/load_lora_adapter", json=loaded).status_code == 200
    assert http.post("/v1/load_lora_adapter", json=loaded).status_code == 400
    assert len({answer(client, model=name) for name in names}) == 3
    listed = {each.id: each for each in client.models.list()}
    assert set(listed) == set(names)
    assert getattr(listed[names[2]], "parent", None) == "tiny"
    assert client.models.retrieve(names[2]).id == names[2]
    assert http.get("/model_info").json()["adapters"] == names[1:]
    gone = http.post("/v1/unload_lora_adapter", json={"lora_name": names[2]})
    assert gone.status_code == 200
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "tiny"}).status_code == 409
    with pytest.raises(openai.NotFoundError):
        answer(client, model=names[2])


def test_completions_take_text_lists_and_ids(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 6}
    one = client.completions.create(prompt="the fox", **asked)
    ids = made.tokenizer().encode("the fox").ids
    by_ids = client.completions.create(prompt=ids, **asked)
    several = client.completions.create(prompt=["the fox", "안녕"], n=2, **asked)
    assert one.choices[0].text == by_ids.choices[0].text
    assert [each.index for each in several.choices] == [0, 1, 2, 3]
    assert several.choices[1].text == one.choices[0].text
    chunks = list(client.completions.create(prompt="the fox", stream=True, **asked))
    assert "".join(each.choices[0].text for each in chunks) == one.choices[0].text
    short = client.completions.create(model="tiny", prompt="a").usage
    assert short is not None
    assert short.completion_tokens <= 16


def test_a_context_that_is_too_long_is_refused_with_the_numbers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[5] * 500, max_tokens=13, stream=True)
    assert caught.value.code == "context_length_exceeded"
    assert re.findall(r"\d+", caught.value.message)[-3:] == ["512", "500", "13"]
    fits = client.completions.create(model="tiny", prompt=[5] * 500, max_tokens=12)
    assert fits.usage is not None
    assert fits.usage.prompt_tokens == 500


@pytest.mark.parametrize("sent", ["", "Bearer", "Bearer sk-no", f"Bearer {made.KEY}x", made.KEY])
def test_a_wrong_key_is_a_401(engine: EngineProcess, sent: str) -> None:
    reply = httpx2.get(f"{engine.url}/v1/models", headers={"authorization": sent})
    assert reply.status_code == 401
    assert reply.json()["error"]["code"] == "invalid_api_key"
    assert httpx2.get(f"{engine.url}/health").status_code == 200


def test_leaving_in_mid_stream_frees_the_place(client: openai.OpenAI, http: httpx2.Client) -> None:
    prompt: dict[str, Any] = {
        "model": "tiny",
        "prompt": "go on",
        "max_tokens": 450,
        "temperature": 1.0,
    }
    stream = client.completions.create(stream=True, n=4, **prompt)
    next(iter(stream))
    stream.close()
    health = wait_until(http, running=0, waiting=0)
    assert health["cache_blocks_free"] == health["cache_blocks"]


def test_leaving_before_a_whole_answer_frees_the_place(
    engine: EngineProcess, http: httpx2.Client
) -> None:
    body = {"model": "tiny", "prompt": ["go on"] * 32, "max_tokens": 480, "temperature": 1.0}
    before = http.get("/health").json()["steps"]
    headers = {"authorization": f"Bearer {made.KEY}"}
    with pytest.raises(httpx2.TimeoutException):
        httpx2.post(f"{engine.url}/v1/completions", json=body, headers=headers, timeout=0.2)
    health = wait_until(http, running=0, waiting=0)
    assert health["steps"] - before < 480


BAD_BODIES: list[tuple[bytes, str | None]] = [
    (b"", None),
    (b"[]", None),
    (b'{"model": NaN}', None),
    (b'{"temperature": Infinity}', None),
    (b'{"temperature": 1e999}', None),
    (b'{"seed": 1' + b"0" * 5000 + b"}", None),
    (b'{"model": "\\ud800"}', None),
    (b'{"model": "\xed\xa0\x80"}', None),
    (b"\xff\xfe", None),
    (b"[" * 300 + b"]" * 300, None),
    (b'{"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}", None),
    (b'{"messages": []}', "model"),
    (b'{"model": "tiny"}', "messages"),
    (b'{"model": "tiny", "messages": []}', "messages"),
    (b'{"model": 7, "messages": [{"role": "user"}]}', "model"),
    (b'{"model": "tiny", "messages": [{"role": "robot", "content": ""}]}', "messages.0.role"),
    (b'{"model": "tiny", "messages": [{"role": "user", "content": 5}]}', "messages.0.content"),
    (b'{"model": "tiny", "messages": [{"role": "user"}]}', "messages.0"),
]


def schema(schema: Any) -> dict[str, Any]:
    told = {"name": "it", "strict": True, "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": told}}


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"n": 10**9}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 10**12}, "max_completion_tokens"),
    ({"temperature": "0.5"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"seed": 10**400}, "seed"),
    ({"temperature": 10**400}, "temperature"),
    ({"seed": 2**63}, "seed"),
    ({"stop": ["x"] * 1_000_000}, "stop"),
    ({"stop": [""]}, "stop.0"),
    ({"stop": "x" * 1001}, "stop.0"),
    ({"stream_options": 3}, "stream_options"),
    ({"top_logprobs": 3}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logit_bias": {"400": 1}}, "logit_bias"),
    ({"logit_bias": {"fox": 1}}, "logit_bias.fox"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {str(n): 1 for n in range(2000)}}, "logit_bias"),
    ({"stop_token_ids": [360]}, "stop_token_ids"),
    ({"stop_token_ids": list(range(100))}, "stop_token_ids"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (schema({"type": "objekt"}), "response_format.json_schema.schema"),
    (schema({"enum": ["x"] * 5000}), "response_format.json_schema.schema"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"min_p": 1.1}, "min_p"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"guided_regex": "a+"}, "guided_regex"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"logit_bias": {"1" * 5000: 1}}, "logit_bias"),
    ({"response_format": {"type": "text"}, "echo": True}, "echo"),
]


@pytest.mark.parametrize(("body", "param"), BAD_BODIES, ids=[str(b[:40]) for b, _ in BAD_BODIES])
def test_a_bad_body_is_a_400_that_names_the_field(
    http: httpx2.Client, body: bytes, param: str | None
) -> None:
    reply = http.post("/v1/chat/completions", content=body)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert reply.headers["x-request-id"]


@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS, ids=[p for _, p in BAD_FIELDS])
def test_a_value_out_of_bounds_or_an_option_not_served_is_named(
    http: httpx2.Client, fields: dict[str, Any], param: str
) -> None:
    body = {"model": "tiny", "messages": USER, **fields}
    reply = http.post("/v1/chat/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("param", ["max_tokens", "suffix", "best_of", "logprobs", "prompt"])
def test_options_of_plain_completions_not_served_are_named(http: httpx2.Client, param: str) -> None:
    odd = {"max_tokens": 0, "suffix": "s", "best_of": 3, "logprobs": 21, "prompt": [400]}[param]
    reply = http.post("/v1/completions", json={"model": "tiny", "prompt": "a", param: odd})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_unknown_keys_and_nulls_are_accepted(client: openai.OpenAI) -> None:
    extra = {"x_unknown": {"deep": [1]}, "top_k": None, "stop": None, "user": "me", "n": None}
    assert answer(client, extra_body=extra) == answer(client)


def test_a_body_over_the_limit_is_a_413(http: httpx2.Client) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(18):
            yield b" " * (1 << 20)

    for content_ in (b" " * (17 << 20), parts()):
        reply = http.post("/v1/chat/completions", content=content_)
        assert reply.status_code == 413
        assert reply.json()["error"]["code"] == "too_large"


def test_unknown_routes_have_the_same_shape(http: httpx2.Client) -> None:
    assert http.get("/nowhere").json()["error"]["code"] == "not_found"
    wrong = http.get("/v1/chat/completions")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")


def test_a_ten_megabyte_prompt_is_refused_with_its_length(http: httpx2.Client) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a b " * 900_000}]}
    reply = http.post("/v1/chat/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_health_and_model_info_tell_what_is_served(http: httpx2.Client) -> None:
    health, info = http.get("/health").json(), http.get("/model_info").json()
    assert (health["status"], health["model_loaded"]) == ("healthy", True)
    assert (health["model_name"], health["device"]) == ("tiny", "cpu")
    assert (info["context_length"], info["dtype"]) == (512, "float32")
    assert info["gpu_memory_allocated"] == "0.00 GB"


def test_each_request_leaves_one_line_in_the_log(http: httpx2.Client, folders: Path) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 3, "temperature": 0}
    reply = http.post("/v1/completions", json=body)
    used = reply.json()["usage"]["completion_tokens"]
    while reply.headers["x-request-id"] not in (log := (folders / "engine.log").read_text()):
        time.sleep(0.01)  # the line is written once the answer has been sent
    lines = [each for each in log.splitlines() if reply.headers["x-request-id"] in each]
    assert len(lines) == 1
    assert f"completion_tokens={used}" in lines[0]


def test_a_full_engine_answers_429_with_a_time_to_wait(forks: ForkServer, folders: Path) -> None:
    arguments = [f"--model={folders / 'base'}", "--max-running=1", "--max-waiting=2"]
    with forks.engine(*arguments) as engine:
        body = {"model": "base", "prompt": "a", "n": 3, "stream": True}
        reply = httpx2.post(f"{engine.url}/v1/completions", json=body)
        assert reply.status_code == 429
        assert reply.headers["retry-after"] == "1"
        assert reply.json()["error"]["code"] == "engine_overloaded"
        body = {"model": "base", "prompt": "a", "n": 2, "max_tokens": 3}
        assert httpx2.post(f"{engine.url}/v1/completions", json=body).status_code == 200


def test_an_adapter_folder_alone_is_a_model(forks: ForkServer, folders: Path) -> None:
    with forks.engine(f"--model={folders / 'one'}", "--model-name=mine") as engine:
        url = f"{engine.url}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            assert {each.id for each in client.models.list()} == {"mine", "base"}
            assert answer(client, model="mine") != answer(client, model="base")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("missing", "config.json"),
        ("no tokenizer", "tokenizer"),
        ("port taken", "cannot listen"),
        ("key unset", "not set"),
        ("no room", "--cache-bytes at least"),
    ],
)
def test_what_cannot_start_says_why(
    fault: str, reason: str, forks: ForkServer, folders: Path, tmp_path: Path
) -> None:
    made.network("llama").save_pretrained(tmp_path)
    listener = made.listening_socket()
    arguments = {
        "missing": [f"--model={tmp_path / 'nothing'}"],
        "no tokenizer": [f"--model={tmp_path}"],
        "port taken": [f"--model={folders / 'base'}", f"--port={listener.getsockname()[1]}"],
        "key unset": [f"--model={folders / 'base'}", "--key-env=TUNESMITH_NO_SUCH_KEY"],
        "no room": [f"--model={folders / 'base'}", "--cache-bytes=1000"],
    }
    pid, said = forks.start(*arguments[fault])
    listener.close()
    assert forks.wait(pid) == 1
    assert said["type"] == "failed"
    assert reason in said["message"]


def test_memory_that_ends_at_load_is_told_in_a_sentence(forks: ForkServer, tmp_path: Path) -> None:
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "head_dim": 256}
    model = made.hollow_folder(tmp_path / "large", **wide)
    pid, said = forks.start(f"--model={model}", more_bytes=300 << 20)
    assert forks.wait(pid) == 1
    assert said["type"] == "failed"
    assert "the memory ended while it was loaded" in said["message"]


def test_a_failure_in_mid_stream_is_an_event_and_the_next_request_is_served(
    forks: ForkServer, tmp_path: Path
) -> None:
    model = made.model_folder(tmp_path)
    made.break_tokens_from(model, 180)
    with (
        forks.engine(f"--model={model}", "--model-name=broken") as engine,
        openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0) as client,
    ):
        asked: dict[str, Any] = {"model": "broken", "prompt": [5, 6], "max_tokens": 400}
        chunks = client.completions.create(**asked, temperature=2, seed=1, stream=True)
        with pytest.raises(openai.APIError) as caught:
            for _ in chunks:
                pass
        assert caught.value.code == "internal"
        with pytest.raises(openai.InternalServerError):
            client.completions.create(**asked, temperature=2, seed=1)
        assert client.completions.create(**{**asked, "max_tokens": 1}).choices[0].text


def test_streams_under_way_end_before_the_process_does(forks: ForkServer, folders: Path) -> None:
    pid, said = forks.start(f"--model={folders / 'base'}")
    body = {"model": "base", "prompt": "a", "max_tokens": 200, "temperature": 1, "stream": True}
    url = f"http://127.0.0.1:{said['port']}/v1/completions"
    with httpx2.stream("POST", url, json=body, timeout=60) as reply:
        os.kill(pid, signal.SIGTERM)
        text = reply.read().decode()
    assert text.endswith("data: [DONE]\n\n")
    assert forks.wait(pid) == 0


def test_a_forked_engine_computes_with_several_threads_and_dies_with_its_parent(
    folders: Path, tmp_path: Path
) -> None:
    forks = ForkServer(tmp_path)
    arguments = [f"--model={folders / 'base'}", "--die-with-parent", "--threads=2"]
    pid, said = forks.start(*arguments)
    body = {"model": "base", "prompt": "the fox " * 30, "max_tokens": 5}
    url = f"http://127.0.0.1:{said['port']}/v1/completions"
    assert httpx2.post(url, json=body, timeout=60).status_code == 200
    forks.close()
    while is_alive(pid):
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"

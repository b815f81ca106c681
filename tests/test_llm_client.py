"""The client of the inference contract, the self-test and the terminal's chat, at a real engine."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import infer_fixtures as made
from tunesmith.cli import main
from tuning_sdk import AsyncLLMClient, BadRequestError, LLMClient, NotFoundError, TuningAPIError

GREEDY = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("client")
    made.model_folder(folder / "first")
    made.model_folder(folder / "second", seed=5)
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with made.engine_process(f"--model={folder / 'first'}", log=folder / "log") as engine:
        yield engine.url


@pytest.fixture
def client(url: str) -> Iterator[LLMClient]:
    with LLMClient(url, made.KEY) as client:
        yield client


def test_a_text_is_gone_on_with_whole_or_in_pieces(client: LLMClient) -> None:
    whole = client.generate("the fox", **GREEDY, num_return_sequences=2)
    assert whole["generated_text"] == whole.generated_text
    assert whole.generated_text[0].startswith("the fox")
    assert whole.usage is not None
    assert whole["usage"]["completion_tokens"] == 12
    pieces = client.generate("the fox", stream=True, **GREEDY)
    assert "".join(pieces) == whole.text
    with pytest.raises(KeyError):
        whole["no_such_field"]


def test_an_instruction_and_a_conversation_are_answered(client: LLMClient) -> None:
    whole = client.chat("say hello", **GREEDY)
    assert whole.instruction == "say hello"
    turns = [{"role": "user", "content": "say hello"}]
    assert client.chat(messages=turns, **GREEDY).response == whole.response
    assert "".join(client.chat(messages=turns, stream=True, **GREEDY)) == whole.response


def test_another_model_is_loaded_and_described(client: LLMClient, folder: Path) -> None:
    assert client.model_info().model_name == "first"
    loaded = client.load_model(str(folder / "second"))
    assert (loaded.status, loaded.model_name) == ("success", "second")
    assert client.health_check()["model_name"] == "second"
    client.load_model(str(folder / "first"))


def test_what_is_refused_is_the_servers_own_error(client: LLMClient) -> None:
    with pytest.raises(NotFoundError):
        client.load_model("/no/such/folder")
    with pytest.raises(BadRequestError, match="exclude"):
        client.load_model("x", load_in_8bit=True, load_in_4bit=True)
    with pytest.raises(TuningAPIError, match="temperature"):
        list(client.generate("x", stream=True, temperature=9))
    with pytest.raises(ValueError, match="one continuation"):
        client.generate("x", stream=True, num_return_sequences=2)


def test_the_async_client_says_the_same(client: LLMClient, url: str) -> None:
    whole, said = client.generate("the fox", **GREEDY), client.chat("say hello", **GREEDY)

    async def ask() -> None:
        async with AsyncLLMClient(url, made.KEY) as other:
            assert (await other.generate("the fox", **GREEDY)).text == whole.text
            pieces = [piece async for piece in other.stream_generate("the fox", **GREEDY)]
            assert "".join(pieces) == whole.text
            assert (await other.chat("say hello", **GREEDY)).text == said.text
            told = [piece async for piece in other.stream_chat("say hello", **GREEDY)]
            assert "".join(told) == said.text
            assert (await other.health_check())["status"] == "healthy"
            assert (await other.model_info()).model_name == "first"
            with pytest.raises(NotFoundError):
                await other.load_model("/no/such/folder")

    asyncio.run(ask())


def test_check_calls_each_endpoint_and_tells_what_fails(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", url, "--api-key", made.KEY]) == 0
    shown = capsys.readouterr().out
    for name in ("health", "models", "info", "generate", "chat", "stream", "embeddings"):
        assert f"\n{name} " in shown
    assert "FAILED" not in shown
    only = ["check", url, "--api-key", made.KEY, "--only", "health,chat", "--json"]
    assert main(only) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(one["endpoint"], one["state"]) for one in told] == [("health", "ok"), ("chat", "ok")]
    assert main(["check", url, "--only", "chat", "--api-key", "sk-wrong"]) == 1
    assert "401" in capsys.readouterr().out
    assert main(["check", url, "--only", "nothing"]) == 2
    assert "choose among health" in capsys.readouterr().err


def test_two_models_are_shown_side_by_side_and_a_conversation_is_kept(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(["the fox", "/history", "/compare first", "the fox", "/compare", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    command = ["chat", "first", "--server", url, "--api-key", made.KEY]
    assert main([*command, "--temperature", "0", "--max-tokens", "4", "--system", "be brief"]) == 0
    out, told = capsys.readouterr()
    assert "system: be brief\nuser: the fox\nassistant: " in told
    (header,) = [line.split() for line in out.splitlines() if line.split() == ["first", "first"]]
    assert len(header) == 2
    assert "first and first answer side by side" in told

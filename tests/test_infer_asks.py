"""Everything that a request may ask of the engine, through the official client."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

import infer_fixtures as made
from infer_fixtures import EngineProcess

USER: Any = [{"role": "user", "content": "say it again"}]
END = 2


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    folder = tmp_path_factory.mktemp("asks")
    base = made.model_folder(folder / "base")
    tuned = made.adapter_folder(folder / "one", base, 1)
    arguments = [f"--model={base}", "--model-name=tiny", f"--adapter=one={tuned}"]
    with made.engine_process(*arguments, log=folder / "engine.log") as process:
        yield process


@pytest.fixture(scope="module")
def client(engine: EngineProcess) -> Iterator[openai.OpenAI]:
    url = f"{engine.url}/v1"
    with openai.OpenAI(base_url=url, api_key=made.KEY, max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, **asked: Any) -> Any:
    asked = {"model": "tiny", "messages": USER, "max_tokens": 16, "temperature": 0, **asked}
    return client.chat.completions.create(**asked)


def complete(client: openai.OpenAI, **asked: Any) -> Any:
    asked = {"model": "tiny", "prompt": "the quick", "max_tokens": 8, "temperature": 0, **asked}
    return client.completions.create(**asked)


def test_a_bias_decides_what_is_said(client: openai.OpenAI) -> None:
    fox = made.tokenizer().encode("x").ids[0]
    reply = chat(client, logit_bias={str(fox): 100}, max_tokens=5, temperature=1)
    assert reply.choices[0].message.content == "xxxxx"


def test_end_tokens_can_be_chosen_delayed_and_ignored(client: openai.OpenAI) -> None:
    def ended(**extra: Any) -> tuple[str, int]:
        reply = chat(client, logit_bias={END: 100}, extra_body=extra)
        return reply.choices[0].finish_reason, reply.usage.completion_tokens

    assert ended() == ("stop", 1)
    assert ended(min_tokens=4) == ("stop", 5)
    assert ended(ignore_eos=True) == ("length", 16)
    assert ended(ignore_eos=True, stop_token_ids=[END]) == ("stop", 1)


def test_a_stop_string_is_not_looked_for_before_min_tokens(client: openai.OpenAI) -> None:
    bias = {str(made.tokenizer().encode("x").ids[0]): 100}
    reply = chat(client, logit_bias=bias, stop="xx", extra_body={"min_tokens": 6})
    assert reply.choices[0].message.content == "xxxxxx"


def test_a_seeded_answer_is_the_same_while_others_come_and_go(engine: EngineProcess) -> None:
    async def ask(client: openai.AsyncOpenAI, seed: int, tokens: int) -> str:
        asked: dict[str, Any] = {"seed": seed, "max_tokens": tokens, "temperature": 1}
        model = ["tiny", "one"][seed % 2]
        reply = await client.chat.completions.create(model=model, messages=USER, **asked)
        return reply.choices[0].message.content or ""

    async def ask_all() -> tuple[str, list[str]]:
        url = f"{engine.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=made.KEY, max_retries=0) as client:
            alone = await ask(client, 7, 40)
            others = [ask(client, seed, 5 + seed) for seed in range(20, 28)]
            return alone, await asyncio.gather(ask(client, 7, 40), *others)

    alone, together = asyncio.run(ask_all())
    assert together[0] == alone
    assert len(set(together)) == len(together)


def test_best_of_more_than_n_is_refused(client: openai.OpenAI) -> None:
    assert len(complete(client, n=2, best_of=2).choices) == 2
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, n=2, best_of=3)
    assert caught.value.param == "best_of"

"""Everything that a request may ask of the engine, through the official client."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
import torch

import infer_fixtures as made
from infer_fixtures import EngineProcess

USER: Any = [{"role": "user", "content": "say it again"}]
END = 2


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    folder = tmp_path_factory.mktemp("asks")
    base = made.model_folder(folder / "base")
    tuned = made.adapter_folder(folder / "one", base, 1)
    pooled = [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (tuned / "modules.json").write_text(json.dumps(pooled))
    (tuned / "1_Pooling").mkdir()
    (tuned / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    arguments = [f"--model={base}", "--model-name=tiny", f"--adapter=one={tuned}"]
    arguments.append("--precision=fp32")
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


def told(entries: list[Any]) -> list[tuple[str, float]]:
    return [(each.token, round(each.logprob, 4)) for each in entries]


def test_log_probabilities_of_a_chat_are_those_of_its_text(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"logprobs": True, "top_logprobs": 3, "max_tokens": 40, "seed": 5}
    whole = chat(client, temperature=1, **asked).choices[0]
    entries = whole.logprobs.content
    said = b"".join(bytes(each.bytes) for each in entries)
    assert said.decode(errors="replace").startswith(whole.message.content.rstrip("\ufffd"))
    assert all(len(each.top_logprobs) == 3 for each in entries)
    assert all(each.top_logprobs[0].logprob >= each.logprob for each in entries)
    chunks = list(chat(client, temperature=1, stream=True, **asked))
    streamed = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    assert told([each for part in streamed for each in part]) == told(entries)


def test_log_probabilities_end_where_a_stop_string_begins(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=30, temperature=1, seed=3).choices[0].text
    stop = whole[10:12]
    asked: dict[str, Any] = {"max_tokens": 30, "temperature": 1, "seed": 3, "logprobs": 0}
    cut = complete(client, stop=stop, **asked).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.logprobs.text_offset[-1] < len(cut.text)
    assert complete(client, **asked).choices[0].logprobs.text_offset[-1] > len(cut.text)


def test_an_echoed_prompt_is_as_likely_as_when_it_was_said(client: openai.OpenAI) -> None:
    ids = made.tokenizer().encode("the quick").ids
    letters = {str(made.tokenizer().encode(each).ids[0]): 60 for each in "xyzuvw"}
    said = complete(client, prompt=ids, logprobs=2, logit_bias=letters).choices[0]
    spoken = [made.tokenizer().encode(each).ids[0] for each in said.logprobs.tokens]
    again = complete(client, prompt=ids + spoken, echo=True, logprobs=2, max_tokens=0).choices[0]
    scores = again.logprobs
    assert (again.text, again.finish_reason) == ("the quick" + said.text, "length")
    assert (scores.token_logprobs[0], scores.top_logprobs[0]) == (None, None)
    assert scores.token_logprobs[-8:] == pytest.approx(said.logprobs.token_logprobs, abs=0.05)
    places = zip(scores.tokens, scores.text_offset, strict=True)
    assert all(again.text[at:].startswith(token) for token, at in places)


def test_an_echo_comes_before_what_is_streamed(client: openai.OpenAI) -> None:
    chunks = complete(
        client,
        prompt=["a b", "c d"],
        echo=True,
        n=2,
        logprobs=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    texts, tokens = [""] * 4, [0] * 4
    for chunk in chunks:
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        tokens[choice.index] += len(choice.logprobs.tokens) if choice.logprobs else 0
    assert [text[:3] for text in texts] == ["a b", "a b", "c d", "c d"]
    assert tokens == [8 + len(made.tokenizer().encode("a b").ids)] * 4


PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def held_to(schema: dict[str, Any]) -> dict[str, Any]:
    told = {"name": "it", "strict": True, "schema": schema}
    return {"type": "json_schema", "json_schema": told}


@pytest.mark.parametrize("model", ["tiny", "one"])
def test_an_answer_follows_its_schema_whole_and_streamed(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "max_tokens": 150, "seed": 1, "temperature": 1}
    asked["response_format"] = held_to(PERSON)
    reply = chat(client, n=3, **asked)
    for choice in reply.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), PERSON)
    chunks = list(chat(client, stream=True, **asked))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == reply.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_json_mode_says_an_object_or_is_cut(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"response_format": {"type": "json_object"}, "temperature": 1}
    closing = {str(made.tokenizer().encode(each).ids[0]): 60 for each in '}]"'}
    reply = chat(client, max_tokens=200, seed=2, logit_bias=closing, **asked)
    assert isinstance(json.loads(reply.choices[0].message.content), dict)
    cut = chat(client, max_tokens=1, seed=2, **asked).choices[0]
    assert (cut.finish_reason, cut.message.content[0]) == ("length", "{")


def test_a_schema_that_cannot_be_followed_says_where(client: openai.OpenAI) -> None:
    for inner, place in [
        ({"type": "strin"}, "$.properties.a.type"),
        ({"not": {}}, "$.properties.a.not"),
    ]:
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, response_format=held_to({"type": "object", "properties": {"a": inner}}))
        assert place in caught.value.message
    assert caught.value.code == "invalid_schema"


TEXTS = ["the quick brown fox", "안녕하세요", "a"]


def embed(client: openai.OpenAI, given: Any = TEXTS, **asked: Any) -> torch.Tensor:
    reply = client.embeddings.create(model=asked.pop("model", "tiny"), input=given, **asked)
    return torch.tensor([each.embedding for each in reply.data])


def test_texts_become_the_models_own_states_pooled(client: openai.OpenAI) -> None:
    net = made.network("llama").requires_grad_(False)
    ids = [made.tokenizer().encode(each).ids for each in TEXTS]
    states = [net.model(torch.tensor([each])).last_hidden_state[0] for each in ids]
    mean = torch.stack([each.mean(0) / each.mean(0).norm() for each in states])
    last = torch.stack([each[-1] / each[-1].norm() for each in states])
    told = embed(client)
    assert (told * mean).sum(-1).min() > 0.999
    assert (embed(client, extra_body={"x_pooling": "last"}) * last).sum(-1).min() > 0.999
    torch.testing.assert_close(embed(client, ids, encoding_format="float"), told)
    short = embed(client, TEXTS[0], dimensions=8)[0]
    torch.testing.assert_close(short, told[0, :8] / told[0, :8].norm())


def test_an_adapter_embeds_as_itself_by_its_own_setting(client: openai.OpenAI) -> None:
    own = embed(client, model="one")
    last = embed(client, model="one", extra_body={"x_pooling": "last"})
    torch.testing.assert_close(own, last)
    assert (own * embed(client, extra_body={"x_pooling": "last"})).sum(-1).max() < 0.99


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a"] * 3000}, "input"),
        ({"input": [[1, 2], [400]]}, "input"),
        ({"input": "a b " * 900_000}, "input"),
        ({"input": "a", "dimensions": 10**6}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ],
)
def test_what_cannot_be_embedded_is_named(
    client: openai.OpenAI, asked: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="tiny", **asked)
    assert caught.value.param == param

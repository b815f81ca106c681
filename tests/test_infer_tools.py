"""Calls of tools: read out of what models write, and models held to writing them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from tokenizers import AddedToken

import infer_fixtures as made
from tunesmith.infer.calls import CallReader
from tunesmith.infer.dialects import GRANITE, HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, Dialect

CALL = '{"name": "f", "arguments": {"a": "x}\\"{", "b": [1, {}]}}'
F = ("f", '{"a": "x}\\"{", "b": [1, {}]}')
WRITTEN: list[tuple[Dialect, str, str, list[tuple[str, str]]]] = [
    (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", [F]),
    (
        HERMES,
        f"Let me.\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>",
        "Let me.",
        [F, F],
    ),
    (
        HERMES,
        '<tool_call>{"arguments": {"q": 1}, "name": "g"}</tool_call>',
        "",
        [("g", '{"q": 1}')],
    ),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}', "", [("f", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"cut', "", [("f", '{"cut')]),
    (HERMES, '<tool_call>{"na', '<tool_call>{"na', []),
    (HERMES, "<tool_call>oh</tool_call> <tool", "<tool_call>oh</tool_call> <tool", []),
    (HERMES, ' a\n\nb {"name": "f"} ', ' a\n\nb {"name": "f"} ', []),
    (MISTRAL, f"[TOOL_CALLS] [{CALL}, {CALL}]", "", [F, F]),
    (MISTRAL, "[TOOL_CALLS] nothing", "[TOOL_CALLS] nothing", []),
    (MISTRAL_NAMED, f"Oh [TOOL_CALLS]f[ARGS]{F[1]}[TOOL_CALLS]f[ARGS]{F[1]}", "Oh", [F, F]),
    (MISTRAL_NAMED, "[TOOL_CALLS]f[ARGS]{}", "", [("f", "{}")]),
    (MISTRAL_NAMED, "[TOOL_CALLS]f[AR", "[TOOL_CALLS]f[AR", []),
    (GRANITE, f"<|tool_call|>[{CALL}]", "", [F]),
    (
        LLAMA,
        '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"a": 2}}',
        "",
        [("f", "{}"), ("g", '{"a": 2}')],
    ),
    (LLAMA, '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (LLAMA, '{"name": "Bob", "parameters": 3}', '{"name": "Bob", "parameters": 3}', []),
    (LLAMA, 'Hello {"name": "f", "parameters": {}}', 'Hello {"name": "f", "parameters": {}}', []),
]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(("dialect", "written", "text", "calls"), WRITTEN)
def test_calls_are_read_however_their_text_is_cut(
    dialect: Dialect, written: str, text: str, calls: list[tuple[str, str]], size: int
) -> None:
    reader = CallReader(dialect, {"f", "g"}, lambda: "id")
    given = [reader.push(written[at : at + size]) for at in range(0, len(written), size)]
    given.append(reader.flush())
    found: list[list[str]] = []
    for part in [part for _, parts in given for part in parts]:
        if part.id:
            found.append([part.name or "", ""])
        found[part.index][1] += part.arguments
    assert "".join(said for said, _ in given) == text
    assert [(name, arguments) for name, arguments in found] == calls


def test_arguments_come_while_they_are_written() -> None:
    reader = CallReader(HERMES, {"f"}, lambda: "id")
    _, parts = reader.push('<tool_call>{"name": "f", "arguments": {"text": "once')
    assert [(part.name, part.arguments) for part in parts] == [("f", '{"text": "once')]
    assert [part.arguments for part in reader.push(" upon")[1]] == [" upon"]


TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}CALL{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OBJECT = '{"name": {{ c.function.name | tojson }}, "KEY": {{ c.function.arguments | tojson }}}'
TEMPLATES = {
    "hermes": (
        "<tool_call>\n" + OBJECT + "\n</tool_call>",
        "arguments",
        ["<tool_call>", "</tool_call>"],
    ),
    "mistral": ("[TOOL_CALLS] [" + OBJECT + "]", "arguments", ["[TOOL_CALLS]"]),
    "named": (
        "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}",
        "",
        ["[TOOL_CALLS]", "[ARGS]"],
    ),
    "llama": (OBJECT, "parameters", ["<|python_tag|>"]),
}
CITY = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Seoul", "Rome"]},
        "days": {"type": "integer", "enum": [1, 2]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "날씨", "parameters": CITY},
    },
    {"type": "function", "function": {"name": "now"}},
]
USER: Any = [{"role": "user", "content": "what is it like?"}]


def speak(folder: Path, name: str) -> None:
    """Give an adapter a tokenizer and a template of its own."""
    call, key, marks = TEMPLATES[name]
    template = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + TURNS.replace("CALL", call)
    tokenizer = made.tokenizer()
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in marks])
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"chat_template": template.replace("KEY", key), "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("tools")
    base = made.model_folder(folder / "base", vocab_size=370, max_position_embeddings=1024)
    arguments = [f"--model={base}", "--model-name=tiny"]
    for seed, name in enumerate(TEMPLATES):
        speak(made.adapter_folder(folder / name, base, seed), name)
        arguments.append(f"--adapter={name}={folder / name}")
    with (
        made.engine_process(*arguments, log=folder / "engine.log") as engine,
        openai.OpenAI(base_url=f"{engine.url}/v1", api_key=made.KEY, max_retries=0) as client,
    ):
        yield client


def chat(client: openai.OpenAI, model: str, **asked: Any) -> Any:
    asked = {"messages": USER, "tools": TOOLS, "max_tokens": 200, "temperature": 1, **asked}
    return client.chat.completions.create(model=model, **asked)


@pytest.mark.parametrize("model", TEMPLATES)
def test_a_required_call_is_made_whole_and_streamed(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"tool_choice": "required", "seed": 3, "parallel_tool_calls": False}
    choice = chat(client, model, **asked).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    [call] = choice.message.tool_calls
    assert len(call.id) == (9 if model in ("mistral", "named") else 29)
    arguments = json.loads(call.function.arguments)
    jsonschema.validate(
        arguments, CITY if call.function.name == "weather" else {"maxProperties": 0}
    )
    chunks = list(chat(client, model, stream=True, **asked))
    parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
    assert [part.function.name for part in parts if part.id] == [call.function.name]
    assert "".join(part.function.arguments for part in parts) == call.function.arguments
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("model", TEMPLATES)
def test_a_named_function_is_called_and_its_answer_read(client: openai.OpenAI, model: str) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    message = chat(client, model, tool_choice=choice, temperature=0).choices[0].message
    [call] = message.tool_calls
    assert call.function.name == "weather"
    history = [*USER, message, {"role": "tool", "tool_call_id": call.id, "content": "warm"}]
    reply = chat(client, model, messages=history, tool_choice="none", max_tokens=5)
    assert reply.choices[0].message.tool_calls is None
    assert reply.usage.prompt_tokens > 60


def test_strict_arguments_are_held_to_where_the_model_may_choose(client: openai.OpenAI) -> None:
    tools = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}]
    begin = {str(made.tokenizer().get_vocab_size()): 100}
    for model in ("hermes", "mistral", "named"):
        asked: dict[str, Any] = {"tools": tools, "seed": 1, "logit_bias": begin}
        message = chat(client, model, **asked).choices[0].message
        jsonschema.validate(json.loads(message.tool_calls[0].function.arguments), CITY)
    with pytest.raises(openai.BadRequestError, match="strict"):
        chat(client, "llama", tools=tools)


def test_an_answer_that_calls_nothing_follows_its_format(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    told = {"name": "it", "strict": True, "schema": schema | {"additionalProperties": False}}
    form: Any = {"type": "json_schema", "json_schema": told}
    mark = str(made.tokenizer().get_vocab_size())
    for bias, finish in [(-100, "stop"), (100, "tool_calls")]:
        asked: dict[str, Any] = {"response_format": form, "logit_bias": {mark: bias}, "seed": 4}
        choice = chat(client, "hermes", parallel_tool_calls=False, **asked).choices[0]
        assert choice.finish_reason == finish
        assert bool(choice.message.tool_calls) is (bias > 0)
        if bias < 0:
            assert isinstance(json.loads(choice.message.content)["ok"], bool)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("tiny", {}, "tools"),
    (
        "hermes",
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        "tools.0.function.name",
    ),
    ("hermes", {"tools": TOOLS * 100}, "tools"),
    ("hermes", {"tools": [], "tool_choice": "required"}, "tool_choice"),
    ("hermes", {"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    (
        "hermes",
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}],
            "tool_choice": "required",
        },
        "tools.0.function.parameters",
    ),
]


@pytest.mark.parametrize(("model", "asked", "param"), BAD, ids=[param for _, _, param in BAD])
def test_tools_that_cannot_be_served_are_named(
    client: openai.OpenAI, model: str, asked: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, model, **asked)
    assert caught.value.param == param

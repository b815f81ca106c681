"""From the JSON of a row to the `Row`: every format says the same in the end."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from tunesmith.data import shapes
from tunesmith.data.row import Format, Row, Wrong
from tunesmith.spec.chat import MAX_TEXT, Message

INPUT = "{input}"
"""In an `input_template`: where a user's message goes."""
_SPEAKERS: dict[str, Literal["system", "user", "assistant", "tool"]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def _from_openai(shape: shapes.OpenAI, line: int) -> Row:
    messages = tuple(_message(said, f"messages[{at}]") for at, said in enumerate(shape.messages))
    if shape.input_template is not None:
        messages = tuple(_templated(said, shape.input_template) for said in messages)
    if shape.system_prompt:
        messages = _led(messages, shape.system_prompt)
    return _conversation(line, messages, shape.tools or ())


def _led(messages: tuple[Message, ...], system_prompt: str) -> tuple[Message, ...]:
    if messages[0].role in {"system", "developer"}:
        raise Wrong("the messages begin with a system message already; keep one", "system_prompt")
    return (_say("system", system_prompt), *messages)


def _templated(said: Message, template: str) -> Message:
    """Of what a user says, and of nothing else."""
    if INPUT not in template:
        raise Wrong(f"it has no {INPUT}, where the user's message goes", "input_template")
    if said.role != "user" or said.content is None:
        return said
    parts = template.split(INPUT)
    if len(template) + (len(parts) - 1) * len(said.content) > MAX_TEXT:
        raise Wrong(f"filled in it is longer than {MAX_TEXT} characters", "input_template")
    _refuse_nul(template, "input_template")
    return said.model_copy(update={"content": said.content.join(parts)})


def _from_alpaca(shape: shapes.Alpaca, line: int) -> Row:
    if not shape.instruction.strip() and not (shape.input or "").strip():
        raise Wrong("the instruction is empty", "instruction")
    if not shape.output:
        raise Wrong("the output is empty: nothing to learn", "output")
    messages = [_say("system", shape.system)] if shape.system else []
    for asked, answered in shape.history or ():
        messages += [_say("user", asked), _say("assistant", answered)]
    messages.append(_say("user", instruction(shape.instruction, shape.input)))
    messages.append(_say("assistant", shape.output))
    return _conversation(line, tuple(messages), ())


def instruction(asked: str, given: str | None = None) -> str:
    """What a user says who gives an instruction and, maybe, something to apply it to."""
    return f"{asked}\n{given}" if given else asked


def _from_pair(shape: shapes.Pair, line: int) -> Row:
    asked = _Asked(shape.prompt, shape.tools or ())
    return _answered(line, asked, _Told(shape.completion, "completion"))


def _from_unpaired(shape: shapes.Unpaired, line: int) -> Row:
    asked = _Asked(shape.prompt, shape.tools or ())
    return replace(_answered(line, asked, _Told(shape.completion, "completion")), label=shape.label)


def _from_preference(shape: shapes.Preference, line: int) -> Row:
    asked = _Asked(shape.prompt or "", shape.tools or ())
    chosen, rejected = shape.chosen, shape.rejected
    if shape.prompt is None:
        if isinstance(chosen, str) or isinstance(rejected, str):
            raise Wrong(
                "the field `prompt` is missing; only whole conversations can do without it",
                "prompt",
            )
        shared = _shared(chosen, rejected)
        asked = _Asked(chosen[:shared], shape.tools or ())
        chosen, rejected = chosen[shared:], rejected[shared:]
    told = (_Told(chosen, "chosen"), _Told(rejected, "rejected"))
    return _compared(line, asked, *told, shape.margin)


def _from_openai_preference(shape: shapes.OpenAIPreference, line: int) -> Row:
    asked = _Asked(shape.input.messages, shape.input.tools or (), "input.messages")
    chosen = _Told(shape.preferred_output, "preferred_output")
    return _compared(line, asked, chosen, _Told(shape.non_preferred_output, "non_preferred_output"))


def _from_scored(shape: shapes.Scored, line: int) -> Row:
    if len(shape.responses) < 2:
        raise Wrong("there is one response; two with different scores are needed", "responses")
    scores = [each.score for each in shape.responses]
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    if scores[best] == scores[worst]:
        raise Wrong(f"all responses have the score {scores[best]:g}: none is better", "responses")
    chosen, rejected = (
        _Told(_said_after(shape.prompt, shape.responses[at]), f"responses[{at}].content")
        for at in (best, worst)
    )
    return _compared(line, _Asked(shape.prompt), chosen, rejected)


def _said_after(
    prompt: str | list[shapes.Message], response: shapes.Response
) -> str | list[shapes.Message]:
    if isinstance(prompt, str):
        return response.content
    return [shapes.Message(role="assistant", content=response.content)]


@dataclass(frozen=True, slots=True)
class _Asked:
    """What an answer follows."""

    prompt: str | list[shapes.Message]
    tools: tuple[dict[str, Any], ...] = ()
    loc: str = "prompt"


@dataclass(frozen=True, slots=True)
class _Told:
    answer: str | list[shapes.Message]
    loc: str


def _answered(line: int, asked: _Asked, told: _Told) -> Row:
    prompt, answer = asked.prompt, told.answer
    if isinstance(prompt, str) and isinstance(answer, str):
        if not answer:
            raise Wrong(f"the {told.loc} is empty: nothing to learn", told.loc)
        _refuse_nul(prompt, asked.loc)
        _refuse_nul(answer, told.loc)
        return Row(line, prompt=prompt, completion=answer)
    if isinstance(prompt, str) or isinstance(answer, str):
        raise Wrong(f"{asked.loc} and {told.loc} must both be text or both be lists of messages")
    before = [_message(said, f"{asked.loc}[{at}]") for at, said in enumerate(prompt)]
    after = [_message(said, f"{told.loc}[{at}]") for at, said in enumerate(answer)]
    context = [
        said.model_copy(update={"weight": 0}) if said.role == "assistant" else said
        for said in before
    ]
    return _conversation(line, (*context, *after), asked.tools)


def _compared(
    line: int, asked: _Asked, chosen: _Told, rejected: _Told, margin: float | None = None
) -> Row:
    better, worse = (_answered(line, asked, told) for told in (chosen, rejected))
    if better == worse:
        raise Wrong(f"{chosen.loc} and {rejected.loc} are the same: nothing to learn", rejected.loc)
    return replace(better, rejected=worse, margin=margin)


def _shared(chosen: list[shapes.Message], rejected: list[shapes.Message]) -> int:
    """Messages that two conversations begin with alike: what was asked."""
    if chosen == rejected:
        raise Wrong("chosen and rejected are the same: nothing to learn", "rejected")
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((at for at, (one, other) in pairs if one != other), None)
    if shared is None:
        raise Wrong(
            "one conversation is the beginning of the other: nothing to compare", "rejected"
        )
    if not shared:
        raise Wrong(
            "chosen and rejected must begin with the same messages: what was asked", "rejected[0]"
        )
    return shared


def _from_sharegpt(shape: shapes.ShareGPT, line: int) -> Row:
    messages = [_say("system", shape.system)] if shape.system else []
    for at, said in enumerate(shape.conversations):
        role = _SPEAKERS.get(said.from_.lower())
        if role is None:
            raise Wrong(
                f"{said.from_[:40]!r} is not a known speaker; use human, gpt, system or tool",
                f"conversations[{at}].from",
            )
        _refuse_nul(said.value, f"conversations[{at}].value")
        messages.append(Message(role=role, content=said.value, weight=said.weight))
    tools = _written_tools(shape.tools) if isinstance(shape.tools, str) else shape.tools or ()
    return _conversation(line, tuple(messages), tools)


def _from_prompts(shape: shapes.Prompts, line: int) -> Row:
    told = shape.reference if shape.reference is not None else shape.answer
    reference = None if told is None else str(told)
    _refuse_nul(reference, "reference")
    asked = shape.prompt if shape.prompt is not None else shape.messages
    if asked is None:
        raise Wrong("the field `prompt` is missing", "prompt")
    if isinstance(asked, str):
        if not asked:
            raise Wrong("the prompt is empty", "prompt")
        _refuse_nul(asked, "prompt")
        return Row(line, prompt=asked, reference=reference)
    loc = "messages" if shape.prompt is None else "prompt"
    messages = tuple(_message(said, f"{loc}[{at}]") for at, said in enumerate(asked))
    return Row(line, messages=messages, tools=shape.tools or (), reference=reference)


def _from_text(shape: shapes.Document, line: int) -> Row:
    return document(shape.text, line)


def document(text: str, line: int) -> Row:
    if not text.strip():
        raise Wrong("the text is empty: nothing to learn", "text")
    _refuse_nul(text, "text")
    return Row(line, text=text)


BUILD: dict[Format, Callable[[Any, int], Row]] = {
    "openai": _from_openai,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_pair,
    "sharegpt": _from_sharegpt,
    "text": _from_text,
    "unpaired": _from_unpaired,
    "preference": _from_preference,
    "openai_preference": _from_openai_preference,
    "scored": _from_scored,
    "prompts": _from_prompts,
}


def _conversation(
    line: int, messages: tuple[Message, ...], tools: tuple[dict[str, Any], ...]
) -> Row:
    answers = [said for said in messages if said.role == "assistant"]
    if not answers:
        raise Wrong("there is no assistant message: nothing to learn")
    if all(said.weight == 0 for said in answers):
        raise Wrong("every assistant message has weight 0: nothing to learn")
    if not any((said.content or said.tool_calls) and said.weight != 0 for said in answers):
        raise Wrong("every assistant message is empty: nothing to learn")
    return Row(line, messages=messages, tools=tools)


def _message(said: shapes.Message, loc: str) -> Message:
    content = said.content
    if isinstance(content, list):
        content = _joined(content, loc)
    if content is None and not said.tool_calls:
        raise Wrong("content is missing", f"{loc}.content")
    if said.weight is not None and said.role != "assistant":
        raise Wrong("only assistant messages have a weight", f"{loc}.weight")
    _refuse_nul(content, f"{loc}.content")
    return Message(
        role=said.role,
        content=content,
        name=said.name,
        tool_calls=said.tool_calls,
        tool_call_id=said.tool_call_id,
        weight=said.weight,
    )


def _joined(parts: list[shapes.Part], loc: str) -> str:
    for at, part in enumerate(parts):
        if part.type not in {"text", "input_text"} or part.text is None:
            raise Wrong(
                f"a part of type {part.type[:40]!r}: only text can be trained on",
                f"{loc}.content[{at}]",
            )
    text = "".join(part.text or "" for part in parts)
    if len(text) > MAX_TEXT:
        raise Wrong(f"longer than {MAX_TEXT} characters", f"{loc}.content")
    return text


def _say(role: Literal["system", "user", "assistant"], content: str) -> Message:
    _refuse_nul(content, role)
    return Message(role=role, content=content)


def _refuse_nul(text: str | None, loc: str) -> None:
    if text is not None and "\0" in text:
        raise Wrong("there is a NUL character; remove it", loc)


def _written_tools(text: str) -> tuple[dict[str, Any], ...]:
    if not text.strip():
        return ()
    try:
        return msgspec.json.decode(text, type=shapes.Tools)
    except (msgspec.DecodeError, RecursionError):
        raise Wrong("tools must be a list of objects", "tools") from None

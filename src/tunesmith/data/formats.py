"""The shapes that rows come in, and how each becomes one `Row`.

openai             {"messages": [{"role", "content", "weight"?, "tool_calls"?}, …], "tools"?,
                   "system_prompt"?, "input_template"?: text in which `{input}` stands for what a
                   user says}
alpaca             {"instruction", "input"?, "output", "system"?, "history"?: [[asked, told], …]}
prompt_completion  {"prompt", "completion"}, both text or both lists of messages
sharegpt           {"conversations": [{"from": "human" | "gpt" | …, "value"}, …], "system"?}
text               {"text"}: a plain document
unpaired           {"prompt", "completion", "label": true | false}: an answer, wanted or not
preference         {"prompt", "chosen", "rejected", "margin"?}, all text or all lists of messages;
                   without "prompt" both are conversations, and what they begin with alike is it
openai_preference  {"input": {"messages", "tools"?}, "preferred_output": [message, …],
                   "non_preferred_output": [message, …]}
scored             {"prompt", "responses": [{"content", "score"}, …]}: the best against the worst
prompts            {"prompt" or "messages", "reference"? or "answer"?, "tools"?}: what is asked, and
                   maybe what should be answered; messages end before an answer
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Annotated, Any, Literal, get_args

import msgspec

from tunesmith.errors import ValidationError
from tunesmith.spec.chat import MAX_TEXT, Message

Format = Literal[
    "openai",
    "alpaca",
    "prompt_completion",
    "sharegpt",
    "text",
    "unpaired",
    "preference",
    "openai_preference",
    "scored",
    "prompts",
]
FORMATS: tuple[Format, ...] = get_args(Format)
MAX_MESSAGES = 1024
"""In one conversation."""
MAX_TOOLS = 256
MAX_RESPONSES = 1024
"""To one prompt."""
MAX_SCORE = 1e9
INPUT = "{input}"
"""In an `input_template`: where a user's message goes."""

Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
Short = Annotated[str, msgspec.Meta(max_length=256)]
Answer = str | None


@dataclass(frozen=True, slots=True)
class RowAdapter:
    """What a row says of the adapter it is to train; what is None is the configuration's."""

    targets: tuple[str, ...] | None = None
    """Sorted."""
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One sample, whatever format it stood in.

    `line` counts from 1: the line of a .jsonl or .txt, the place in the array of a .json.
    A conversation fills `messages` (and `tools`), a raw pair `prompt` and `completion`
    (no template, the end token is appended), a plain document `text`. An answer that was judged
    has a `label`: whether it is wanted. A pair is the row of the chosen answer; `rejected` is the
    same with the other one, and `margin` how much better the chosen one is. A row that only asks
    has no answer; `reference` is what should be answered. `adapter` is the one that it is to train,
    where it names one.
    """

    line: int
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    label: bool | None = None
    rejected: "Row | None" = None
    margin: float | None = None
    reference: str | None = None
    adapter: RowAdapter | None = None
    metadata: Any = field(default=None, compare=False)
    """As the row has it: for whoever rewards its completions."""


class RowFault(ValidationError):
    """A row that cannot be used: which (`line`; 0 is the file as a whole), where in it, and why."""

    def __init__(self, line: int, reason: str, *, loc: str = "", unit: str = "line") -> None:
        where = f"{unit} {line}" if line else "the file"
        at = f", {loc}" if loc else ""
        entry: list[str | int] = [unit, line, loc] if loc else [unit, line]
        super().__init__(f"{where}{at}: {reason}", details=[{"loc": entry, "msg": reason}])
        self.line, self.reason, self.loc, self.unit = line, reason, loc, unit


class Wrong(Exception):
    """What is wrong inside a row, before its line is known."""

    def __init__(self, reason: str, loc: str = "") -> None:
        super().__init__(reason)
        self.reason, self.loc = reason, loc


class _Part(msgspec.Struct):
    type: str
    text: Text | None = None


class _Message(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[_Part], msgspec.Meta(max_length=MAX_MESSAGES)] | None = None
    name: Short | None = None
    tool_calls: (
        Annotated[tuple[dict[str, Any], ...], msgspec.Meta(min_length=1, max_length=MAX_TOOLS)]
        | None
    ) = None
    tool_call_id: Short | None = None
    weight: Literal[0, 1] | None = None


_Messages = Annotated[list[_Message], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)]
_Tools = Annotated[tuple[dict[str, Any], ...], msgspec.Meta(max_length=MAX_TOOLS)]


class _OpenAI(msgspec.Struct):
    messages: _Messages
    tools: _Tools | None = None
    parallel_tool_calls: bool | None = None
    system_prompt: Text | None = None
    input_template: Text | None = None
    metadata: Any = None


class _Alpaca(msgspec.Struct):
    instruction: Text
    output: Text
    input: Text | None = None
    system: Text | None = None
    history: (
        Annotated[list[tuple[Text, Text]], msgspec.Meta(max_length=MAX_MESSAGES // 2)] | None
    ) = None


class _Pair(msgspec.Struct):
    prompt: Text | _Messages
    completion: Text | _Messages
    tools: _Tools | None = None
    metadata: Any = None


class _Said(msgspec.Struct):
    from_: str = msgspec.field(name="from")
    value: Text
    weight: Literal[0, 1] | None = None


class _ShareGPT(msgspec.Struct):
    conversations: Annotated[list[_Said], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)]
    system: Text | None = None
    tools: _Tools | str | None = None


class _Text(msgspec.Struct):
    text: Text


class _Unpaired(msgspec.Struct):
    prompt: Text | _Messages
    completion: Text | _Messages
    label: bool
    tools: _Tools | None = None
    metadata: Any = None


_Margin = Annotated[float, msgspec.Meta(ge=-MAX_SCORE, le=MAX_SCORE)]


class _Preference(msgspec.Struct):
    chosen: Text | _Messages
    rejected: Text | _Messages
    prompt: Text | _Messages | None = None
    margin: _Margin | None = None
    tools: _Tools | None = None
    metadata: Any = None


class _Input(msgspec.Struct):
    messages: _Messages
    tools: _Tools | None = None
    parallel_tool_calls: bool | None = None


class _OpenAIPreference(msgspec.Struct):
    input: _Input
    preferred_output: _Messages
    non_preferred_output: _Messages
    metadata: Any = None


class _Response(msgspec.Struct):
    content: Text
    score: _Margin


class _Scored(msgspec.Struct):
    prompt: Text | _Messages
    responses: Annotated[list[_Response], msgspec.Meta(min_length=1, max_length=MAX_RESPONSES)]
    metadata: Any = None


class _Prompts(msgspec.Struct):
    prompt: Text | _Messages | None = None
    messages: _Messages | None = None
    reference: Text | int | float | None = None
    answer: Text | int | float | None = None
    tools: _Tools | None = None
    metadata: Any = None


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


def detect(keys: dict[str, Any]) -> Format:
    """The format that a row with these fields is in. Raises Wrong."""
    if "messages" in keys:
        return "prompts" if _only_asks(keys) else "openai"
    if "conversations" in keys:
        return "sharegpt"
    if "chosen" in keys or "rejected" in keys:
        return "preference"
    if "preferred_output" in keys or "non_preferred_output" in keys:
        return "openai_preference"
    if "responses" in keys:
        return "scored"
    if "prompt" in keys and "completion" in keys:
        return "unpaired" if isinstance(keys.get("label"), bool) else "prompt_completion"
    if "instruction" in keys:
        return "alpaca"
    if "text" in keys:
        return "text"
    if "prompt" in keys:
        return "prompts"
    found = ", ".join(sorted(repr(key[:40]) for key in list(keys)[:8])) or "no field at all"
    raise Wrong(
        f"no known format has the fields {found}; expected messages, conversations, "
        "instruction and output, prompt and completion, text, prompt with chosen and rejected, "
        "prompt and responses, or a prompt alone"
    )


def _only_asks(keys: dict[str, Any]) -> bool:
    """Whether messages end with what is asked, and none is an answer that could be learnt."""
    messages = keys["messages"]
    if not isinstance(messages, list) or not messages:
        return False
    roles = [said.get("role") if isinstance(said, dict) else None for said in messages]
    has_reference = "reference" in keys or "answer" in keys
    return roles[-1] == "user" and (has_reference or "assistant" not in roles)


def parse(line: bytes, format: Format, number: int) -> Row:
    """One row from its JSON, checked in full. Raises Wrong."""
    try:
        shape = _decoder(format).decode(line)
    except msgspec.ValidationError as error:
        raise _mismatch(line, format, str(error)) from None
    except msgspec.DecodeError as error:
        raise Wrong(_syntax(line, str(error))) from None
    except RecursionError:
        raise Wrong("nested too deeply") from None
    except ValueError:
        raise Wrong(_encoding(line)) from None
    refuse_duplicates(line)
    row = _BUILD[format](shape, number)
    metadata = getattr(shape, "metadata", None)
    return row if metadata is None else replace(row, metadata=metadata)


def fields(line: bytes) -> dict[str, Any]:
    """The fields of a row in no format yet. Raises Wrong."""
    try:
        value = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        raise Wrong(_syntax(line, str(error))) from None
    except RecursionError:
        raise Wrong("nested too deeply") from None
    except ValueError:
        raise Wrong(_encoding(line)) from None
    if not isinstance(value, dict):
        raise Wrong('a row must be an object in braces, like {"messages": […]}')
    return value


def instruction(asked: str, given: str | None = None) -> str:
    """What a user says who gives an instruction and, maybe, something to apply it to."""
    return f"{asked}\n{given}" if given else asked


def refuse_duplicates(line: bytes) -> None:
    """A name that is given twice would silently lose one value. Raises Wrong."""
    try:
        _UNIQUE.decode(line.decode())
    except UnicodeDecodeError:
        raise Wrong(_encoding(line)) from None
    except RecursionError:
        raise Wrong("nested too deeply") from None
    except ValueError as error:
        raise Wrong(_syntax(line, str(error))) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Wrong(f"the field {twice[:80]!r} is given twice; keep one", twice[:80])
    return found


_NO_ROLE, _ROLE = "Invalid enum value", "unknown role"
_ROLES = "; a message is by system, developer, user, assistant or tool"
_NUL = "there is a NUL byte; the file may be UTF-16, save it as UTF-8"
_HALF = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_UNIQUE = json.JSONDecoder(object_pairs_hook=_unique, strict=True)
_SHAPES: dict[Format, type[msgspec.Struct]] = {
    "openai": _OpenAI,
    "alpaca": _Alpaca,
    "prompt_completion": _Pair,
    "sharegpt": _ShareGPT,
    "text": _Text,
    "unpaired": _Unpaired,
    "preference": _Preference,
    "openai_preference": _OpenAIPreference,
    "scored": _Scored,
    "prompts": _Prompts,
}


@cache
def _decoder(format: Format) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(_SHAPES[format])


@cache
def known_fields(format: Format) -> frozenset[str]:
    """Of a row; others are ignored."""
    return frozenset(_SHAPES[format].__struct_encode_fields__)


def _mismatch(line: bytes, format: Format, message: str) -> Wrong:
    keys = fields(line)
    try:
        other = detect(keys)
    except Wrong:
        other = format
    if format == "unpaired" and "label" in keys:
        other = format
    if other != format:
        return Wrong(f"this row is in the {other} format, the first one was {format}: use one")
    reason, _, path = message.partition(" - at `")
    loc = path.rstrip("`").removeprefix("$").removeprefix(".")
    is_role = loc.endswith(".role") and reason.startswith(_NO_ROLE)
    return Wrong(reason.replace(_NO_ROLE, _ROLE) + _ROLES if is_role else _plain(reason), loc)


def _plain(reason: str) -> str:
    missing = reason.removeprefix("Object missing required field ")
    if missing != reason:
        return f"the field {missing} is missing"
    return reason[:1].lower() + reason[1:]


def _syntax(line: bytes, message: str) -> str:
    if _HALF.search(line):
        return "half of a surrogate pair is no character; write the whole character"
    if b"\0" in line:
        return _NUL
    return (
        f"not JSON ({message[:120]}); a .jsonl file has one whole object a line, "
        "a .json file is one array of objects"
    )


def _encoding(line: bytes) -> str:
    if b"\0" in line:
        return _NUL
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return f"not valid UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8"
    return "not valid UTF-8; save the file as UTF-8"


def _from_openai(shape: _OpenAI, line: int) -> Row:
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


def _from_alpaca(shape: _Alpaca, line: int) -> Row:
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


def _from_pair(shape: _Pair, line: int) -> Row:
    asked = _Asked(shape.prompt, shape.tools or ())
    return _answered(line, asked, _Told(shape.completion, "completion"))


def _from_unpaired(shape: _Unpaired, line: int) -> Row:
    asked = _Asked(shape.prompt, shape.tools or ())
    return replace(_answered(line, asked, _Told(shape.completion, "completion")), label=shape.label)


def _from_preference(shape: _Preference, line: int) -> Row:
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


def _from_openai_preference(shape: _OpenAIPreference, line: int) -> Row:
    asked = _Asked(shape.input.messages, shape.input.tools or (), "input.messages")
    chosen = _Told(shape.preferred_output, "preferred_output")
    return _compared(line, asked, chosen, _Told(shape.non_preferred_output, "non_preferred_output"))


def _from_scored(shape: _Scored, line: int) -> Row:
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


def _said_after(prompt: str | list[_Message], response: _Response) -> str | list[_Message]:
    if isinstance(prompt, str):
        return response.content
    return [_Message(role="assistant", content=response.content)]


@dataclass(frozen=True, slots=True)
class _Asked:
    """What an answer follows."""

    prompt: str | list[_Message]
    tools: tuple[dict[str, Any], ...] = ()
    loc: str = "prompt"


@dataclass(frozen=True, slots=True)
class _Told:
    answer: str | list[_Message]
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


def _shared(chosen: list[_Message], rejected: list[_Message]) -> int:
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


def _from_sharegpt(shape: _ShareGPT, line: int) -> Row:
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


def _from_prompts(shape: _Prompts, line: int) -> Row:
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


def _from_text(shape: _Text, line: int) -> Row:
    return document(shape.text, line)


def document(text: str, line: int) -> Row:
    if not text.strip():
        raise Wrong("the text is empty: nothing to learn", "text")
    _refuse_nul(text, "text")
    return Row(line, text=text)


_BUILD: dict[Format, Callable[[Any, int], Row]] = {
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


def _message(said: _Message, loc: str) -> Message:
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


def _joined(parts: list[_Part], loc: str) -> str:
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
        return msgspec.json.decode(text, type=_Tools)
    except (msgspec.DecodeError, RecursionError):
        raise Wrong("tools must be a list of objects", "tools") from None

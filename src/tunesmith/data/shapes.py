"""The JSON of a row, by format: what `formats` tells, with its bounds."""

from typing import Annotated, Any, Literal

import msgspec

from tunesmith.data.row import Format
from tunesmith.spec.chat import MAX_TEXT

MAX_MESSAGES = 1024
"""In one conversation."""
MAX_TOOLS = 256
MAX_RESPONSES = 1024
"""To one prompt."""
MAX_SCORE = 1e9
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
Short = Annotated[str, msgspec.Meta(max_length=256)]
Answer = str | None


class Part(msgspec.Struct):
    type: str
    text: Text | None = None


class Message(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], msgspec.Meta(max_length=MAX_MESSAGES)] | None = None
    name: Short | None = None
    tool_calls: (
        Annotated[tuple[dict[str, Any], ...], msgspec.Meta(min_length=1, max_length=MAX_TOOLS)]
        | None
    ) = None
    tool_call_id: Short | None = None
    weight: Literal[0, 1] | None = None


Messages = Annotated[list[Message], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)]
Tools = Annotated[tuple[dict[str, Any], ...], msgspec.Meta(max_length=MAX_TOOLS)]


class OpenAI(msgspec.Struct):
    messages: Messages
    tools: Tools | None = None
    parallel_tool_calls: bool | None = None
    system_prompt: Text | None = None
    input_template: Text | None = None
    metadata: Any = None


class Alpaca(msgspec.Struct):
    instruction: Text
    output: Text
    input: Text | None = None
    system: Text | None = None
    history: (
        Annotated[list[tuple[Text, Text]], msgspec.Meta(max_length=MAX_MESSAGES // 2)] | None
    ) = None


class Pair(msgspec.Struct):
    prompt: Text | Messages
    completion: Text | Messages
    tools: Tools | None = None
    metadata: Any = None


class Turn(msgspec.Struct):
    from_: str = msgspec.field(name="from")
    value: Text
    weight: Literal[0, 1] | None = None


class ShareGPT(msgspec.Struct):
    conversations: Annotated[list[Turn], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)]
    system: Text | None = None
    tools: Tools | str | None = None


class Document(msgspec.Struct):
    text: Text


class Unpaired(msgspec.Struct):
    prompt: Text | Messages
    completion: Text | Messages
    label: bool
    tools: Tools | None = None
    metadata: Any = None


Margin = Annotated[float, msgspec.Meta(ge=-MAX_SCORE, le=MAX_SCORE)]


class Preference(msgspec.Struct):
    chosen: Text | Messages
    rejected: Text | Messages
    prompt: Text | Messages | None = None
    margin: Margin | None = None
    tools: Tools | None = None
    metadata: Any = None


class Input(msgspec.Struct):
    messages: Messages
    tools: Tools | None = None
    parallel_tool_calls: bool | None = None


class OpenAIPreference(msgspec.Struct):
    input: Input
    preferred_output: Messages
    non_preferred_output: Messages
    metadata: Any = None


class Response(msgspec.Struct):
    content: Text
    score: Margin


class Scored(msgspec.Struct):
    prompt: Text | Messages
    responses: Annotated[list[Response], msgspec.Meta(min_length=1, max_length=MAX_RESPONSES)]
    metadata: Any = None


class Prompts(msgspec.Struct):
    prompt: Text | Messages | None = None
    messages: Messages | None = None
    reference: Text | int | float | None = None
    answer: Text | int | float | None = None
    tools: Tools | None = None
    metadata: Any = None


SHAPES: dict[Format, type[msgspec.Struct]] = {
    "openai": OpenAI,
    "alpaca": Alpaca,
    "prompt_completion": Pair,
    "sharegpt": ShareGPT,
    "text": Document,
    "unpaired": Unpaired,
    "preference": Preference,
    "openai_preference": OpenAIPreference,
    "scored": Scored,
    "prompts": Prompts,
}

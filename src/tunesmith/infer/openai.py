"""OpenAI's words for a completion: requests checked and translated, answers put together."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    StringConstraints,
    model_validator,
)

from tunesmith.errors import BadRequestError
from tunesmith.infer.toolspec import MAX_TOOLS, NamedChoice, Tool, ToolChoice
from tunesmith.infer.wire import Wire
from tunesmith.spec.chat import MAX_BIASES, MAX_TEXT, Message, Sampling

MAX_MESSAGES = 2048
MAX_PROMPTS = 64
MAX_SEQUENCES = 64
"""Prompts times `n`."""
MAX_SCORES = 2_000_000
"""Log-probabilities in one answer."""
DEFAULT_CHAT_TOKENS = 4096
DEFAULT_COMPLETION_TOKENS = 16

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]


def _as_list(value: Any) -> Any:
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


def _by_id(value: Any) -> Any:
    """JSON's keys are strings: those that are ids become numbers."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_BIASES:
        raise ValueError(f"at most {MAX_BIASES} tokens, not {len(value)}")
    is_id = all(len(key) <= 10 and key.isascii() and key.isdigit() for key in value)
    return {int(key): each for key, each in value.items()} if is_id else value


class StreamOptions(Wire):
    include_usage: bool | None = None


class JsonSchema(Wire):
    name: str = Field(min_length=1, max_length=64, pattern="^[A-Za-z0-9_-]+$")
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise BadRequestError(
                "response_format is of type json_schema, without a json_schema",
                param="response_format.json_schema",
            )
        return self


class Options(Wire):
    """What both kinds of completion take; null means the default."""

    model: str = Field(min_length=1, max_length=512)
    max_tokens: int | None = Field(None, ge=1, le=1 << 20)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 20)
    """0 and -1 keep all."""
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    n: int | None = Field(None, ge=1, le=16)
    logit_bias: Annotated[
        dict[Annotated[int, Field(ge=0, lt=1 << 31)], Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=MAX_BIASES),
        BeforeValidator(_by_id),
    ] = {}
    min_tokens: int | None = Field(None, ge=0, le=1 << 20)
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[
        list[Annotated[int, Field(ge=0, lt=1 << 31)]],
        Field(max_length=64),
        BeforeValidator(_as_list),
    ] = []
    stop: Annotated[
        list[Annotated[str, StringConstraints(min_length=1, max_length=1000)]],
        Field(max_length=16),
        BeforeValidator(_as_list),
    ] = []
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    x_fit_tokens: bool | None = None
    """Fewer than `max_tokens` are as good, where the context ends."""

    @property
    def count(self) -> int:
        return self.n or 1

    @property
    def has_usage_chunk(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def top_count(self) -> int | None:
        """Alternatives whose log-probabilities are wanted; None where none are."""
        raise NotImplementedError

    def sampling(self, max_tokens: int) -> Sampling:
        if (self.min_tokens or 0) > max_tokens:
            raise BadRequestError(
                f"min_tokens is {self.min_tokens}, and at most {max_tokens} can come",
                param="min_tokens",
            )
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=self.seed,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=bool(self.ignore_eos),
            logit_bias=self.logit_bias,
            min_tokens=self.min_tokens or 0,
            top_logprobs=self.top_count,
        )


class TextPart(Wire):
    type: Literal["text"]
    text: Text


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class ChatMessage(Wire):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        list[TextPart] | None, Field(max_length=1000), BeforeValidator(_as_parts)
    ] = None
    name: str | None = Field(None, max_length=256)
    tool_calls: list[dict[str, Any]] | None = Field(None, max_length=256)
    tool_call_id: str | None = Field(None, max_length=256)

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a message of role {self.role} needs content")
        return self

    def message(self) -> Message:
        text = None if self.content is None else "".join(part.text for part in self.content)
        if text is not None and len(text) > MAX_TEXT:
            raise BadRequestError(f"a message has over {MAX_TEXT} characters", param="messages")
        return Message(
            role=self.role,
            content=text,
            name=self.name,
            tool_calls=tuple(self.tool_calls) if self.tool_calls else None,
            tool_call_id=self.tool_call_id,
        )


class ChatRequest(Options):
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 20)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS), BeforeValidator(_as_list)] = []
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @property
    def top_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _has_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise BadRequestError("top_logprobs is given without logprobs: true", param="logprobs")
        return self

    @model_validator(mode="after")
    def _has_what_it_calls(self) -> Self:
        choice = self.tool_choice
        names = {each.function.name for each in self.tools}
        if choice == "required" and not names:
            raise BadRequestError("tool_choice is required without tools", param="tool_choice")
        if isinstance(choice, NamedChoice) and choice.function.name not in names:
            raise BadRequestError(
                f"tool_choice names {choice.function.name!r}, which is not among the tools",
                param="tool_choice",
            )
        return self

    @property
    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


Ids = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(max_length=1 << 20)]


def as_prompts(value: Any) -> Any:
    """One prompt becomes a list of one: a string, or a list of ids."""
    if isinstance(value, str) or (isinstance(value, list) and value and _is_id(value[0])):
        return [value]
    return value


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class CompletionRequest(Options):
    prompt: Annotated[
        list[Text | Ids],
        Field(min_length=1, max_length=MAX_PROMPTS),
        BeforeValidator(as_prompts),
    ]
    max_tokens: int | None = Field(None, ge=0, le=1 << 20)
    """0 only where the prompt is echoed."""
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def top_count(self) -> int | None:
        return self.logprobs

    @model_validator(mode="after")
    def _has_an_answer(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise BadRequestError("max_tokens is 0 without echo: true", param="max_tokens")
        return self

    @model_validator(mode="after")
    def _has_no_choice(self) -> Self:
        if self.best_of not in (None, self.count):
            raise BadRequestError(
                f"best_of is {self.best_of} and n {self.count}: answers are not ranked, so they "
                "must be equal; leave best_of out",
                param="best_of",
            )
        return self

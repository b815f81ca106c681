"""What a model says in its trainer, and how near to that the engine that serves it has to come."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from tunesmith.spec.chat import MAX_TEXT, Message
from tunesmith.spec.strict import Sha256, Strict

WITNESSED = "parity"
"""In an attempt's folder: what the trainer wrote of each model of its artifact, `<name>.json`. Rows
of the data set are in it: it goes into no artifact."""
CONVERSATIONS = 8
MAX_TOKENS = 256
"""Of a conversation, or of what is to be answered, that are compared."""
ANSWER_TOKENS = 16

Cause = Literal[
    "template",
    "tokenizer",
    "weights",
    "adapter",
    "adapter_missing",
    "configuration",
    "position",
    "precision",
]
Ids = Annotated[tuple[int, ...], Field(max_length=MAX_TOKENS)]
Numbers = Annotated[tuple[float, ...], Field(max_length=MAX_TOKENS)]


class Told(Strict):
    """A row to be rendered: a conversation, a raw pair, or a text."""

    messages: tuple[Message, ...] = Field((), max_length=1024)
    tools: tuple[dict[str, Any], ...] = Field((), max_length=256)
    prompt: str | None = Field(None, max_length=MAX_TEXT)
    completion: str | None = Field(None, max_length=MAX_TEXT)
    text: str | None = Field(None, max_length=MAX_TEXT)


class Spoken(Strict):
    """A row, and what the model makes of it."""

    told: Told
    text_sha256: Sha256
    """Of what the template makes of it."""
    ids: Ids
    """The first tokens of the whole row."""
    log_probs: Numbers
    """Of each id but the first."""
    question: Ids
    """The last tokens of what is to be answered."""
    answer: Ids
    """The likeliest tokens after it, one after the other; nothing ends them early."""
    answer_log_probs: Numbers = ()
    """Of each of them, where they were asked for."""
    margins: Numbers
    """By how much each is likelier than the next best, in nats."""


class Witnessed(Strict):
    format: Literal[1] = 1
    model: str = Field(".", max_length=4096)
    """Where in the artifact."""
    precision: str = Field("fp32", max_length=8)
    """What was computed in."""
    at: float
    """Unix seconds: templates may write the date."""
    stop_ids: tuple[int, ...] = Field((), max_length=1024)
    facts: dict[str, Any] = Field({}, max_length=64)
    """Of the configuration, what decides the arithmetic."""
    sums: dict[str, tuple[float, float]] = Field({}, max_length=100_000)
    """Of each trained tensor: its sum, and that of its squares."""
    spoken: tuple[Spoken, ...] = Field(max_length=CONVERSATIONS)


@dataclass(frozen=True)
class Limit:
    """Of differences between log-probabilities, in nats."""

    most: float
    mean: float


LIMITS = {
    "fp32": Limit(2e-3, 2e-4),
    "fp16": Limit(0.3, 0.02),
    "q8_0": Limit(1.0, 0.06),
    "bf16": Limit(2.0, 0.1),
    "int8": Limit(3.0, 0.2),
    "4bit": Limit(8.0, 0.8),
}
"""By what a model is held or computed in, the finest first; of two, the coarser holds. A token that
is unlikely is held coarsely: the mean says more than the largest."""


def limit_of(*formats: str) -> tuple[str, Limit]:
    """The coarsest of them, and its limit."""
    names = list(LIMITS)
    name = max(formats, key=names.index)
    return name, LIMITS[name]


class Verdict(Strict):
    has_passed: bool
    format: str
    conversations: int
    tokens: int
    worst: float = 0.0
    """The largest difference of a log-probability, in nats."""
    limit: float = 0.0
    cause: Cause | None = None
    message: str = Field(max_length=4000)
    has_drifted: bool = False
    """What passed exactly is beyond the limit in the numbers that it is served in."""

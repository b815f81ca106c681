"""What an inference request may ask for, and the pieces that come back."""

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from tunesmith.spec.strict import Strict

MODEL_HEADER = "x-model-name"
"""Percent-encoded; what an engine of ours writes as `model` in its answer, where it is given."""
MAX_TEXT = 4_000_000
"""Characters in one message or prompt."""


MAX_BIASES = 1024
"""Tokens in a `logit_bias`."""


class Message(Strict):
    """One turn. `weight` 0 means context only: seen, not learnt."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, StringConstraints(max_length=MAX_TEXT)] | None = None
    name: str | None = Field(None, max_length=256)
    tool_calls: tuple[dict[str, Any], ...] | None = Field(None, max_length=256)
    tool_call_id: str | None = Field(None, max_length=256)
    weight: Literal[0, 1] | None = None


class Sampling(Strict):
    max_tokens: int = Field(256, ge=0, le=1 << 20)
    """0 reads the prompt only."""
    temperature: float = Field(1.0, ge=0, le=2)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=1 << 20)
    """0 keeps all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Of the likeliest token's probability; 0 keeps all."""
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop_token_ids: tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...] = Field((), max_length=64)
    ignore_eos: bool = False
    """The model's own end tokens do not end the answer."""
    logit_bias: dict[int, float] = Field(default_factory=dict, max_length=MAX_BIASES)
    min_tokens: int = Field(0, ge=0, le=1 << 20)
    """So many come before a stop token may be drawn, or a stop string is looked for."""
    top_logprobs: int | None = Field(None, ge=0, le=20)
    """Log-probabilities of each token, and of so many others; None asks for neither."""
    stop: tuple[Annotated[str, StringConstraints(min_length=1, max_length=1000)], ...] = Field(
        (), max_length=16
    )


class Delta(Strict):
    text: str = ""
    token_id: int | None = None
    finish: Literal["stop", "length", "tool_calls", None] = None

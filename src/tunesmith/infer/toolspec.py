"""OpenAI's words for tools, and for which of them an answer has to call."""

from typing import Any, Literal

from pydantic import Field

from tunesmith.infer.wire import Wire

MAX_TOOLS = 128
NAME = "^[A-Za-z0-9_-]+$"


class Function(Wire):
    name: str = Field(min_length=1, max_length=64, pattern=NAME)
    description: str | None = Field(None, max_length=100_000)
    parameters: dict[str, Any] | None = None
    """A JSON Schema; without one, the function takes nothing."""
    strict: bool | None = None
    """The arguments follow the schema, whoever decides to call."""


class Tool(Wire):
    type: Literal["function"]
    function: Function

    def wire(self) -> dict[str, Any]:
        """As a chat template is given it."""
        return self.model_dump(exclude_none=True)


class _Named(Wire):
    name: str = Field(min_length=1, max_length=64, pattern=NAME)


class NamedChoice(Wire):
    type: Literal["function"]
    function: _Named


ToolChoice = Literal["none", "auto", "required"] | NamedChoice

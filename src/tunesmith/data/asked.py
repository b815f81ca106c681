"""What a row asks, apart from how it was answered: the prompts of reinforcement and evaluation."""

from dataclasses import dataclass
from typing import Any

from tunesmith.data.row import Row
from tunesmith.data.rows import Rows
from tunesmith.spec.chat import Message


@dataclass(frozen=True, slots=True)
class Asked:
    """A conversation in `messages` that ends before an answer, or a raw `prompt`."""

    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    prompt: str | None = None
    reference: str | None = None
    """What should be answered, where the row says: its `reference`, else its last answer."""

    @property
    def plain(self) -> list[dict[str, Any]]:
        """As messages of the field's shape; a raw prompt is one of the user."""
        if self.prompt is not None:
            return [{"role": "user", "content": self.prompt}]
        return [said.model_dump(exclude_none=True, exclude={"weight"}) for said in self.messages]


def asked(row: Row) -> Asked:
    """All that comes before a row's last answer. Of a pair the chosen answer is the reference."""
    if not row.messages:
        answer = row.reference if row.reference is not None else row.completion
        return Asked(prompt=row.prompt or "", reference=answer)
    messages, answer = row.messages, row.reference
    if messages[-1].role == "assistant":
        answer = answer if answer is not None else messages[-1].content
        messages = messages[:-1]
    return Asked(messages, row.tools, reference=answer)


STAND_IN_TOKENS = 4
"""That a stand-in for an answer may take, its end included."""


@dataclass(frozen=True)
class AskedRows:
    """The rows of a file as prompts, for checks that look at rows with an answer: each has one of
    one letter, and no other."""

    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> Row:
        row = self.rows[at]
        found = asked(row)
        if found.prompt is not None:
            return Row(row.line, prompt=found.prompt, completion="a")
        answer = Message(role="assistant", content="a")
        return Row(row.line, messages=(*found.messages, answer), tools=found.tools)

    def size(self, at: int) -> int:
        return self.rows.size(at)

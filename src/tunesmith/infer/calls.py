"""Calls of tools, read out of an answer's text while it comes."""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass

from tunesmith.infer.dialects import Dialect
from tunesmith.infer.scan import CallObject

MAX_CALLS = 128
MAX_NAME = 200
"""Characters that may stand where a name is looked for."""


@dataclass(frozen=True, slots=True)
class CallPart:
    """A part of the `index`-th call: its first has an id and a name, each has more arguments."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


class CallReader:
    """Splits one answer into text and calls. What is no call after all is given as text.

    A buffer, and what is to be done with its beginning: each state takes what is certain from it
    and says whether there is more to do.
    """

    def __init__(
        self,
        dialect: Dialect,
        names: Collection[str],
        new_id: Callable[[], str],
        most: int = MAX_CALLS,
    ) -> None:
        self._dialect, self._names, self._new_id, self._most = dialect, names, new_id, most
        self._buffer = ""
        self._state = self._outside if dialect.opening else self._before_object
        self._object = CallObject(dialect.arguments)
        self._is_told = False
        """Whether the object under way was given out as a call."""
        self._mark = ""
        """The opening mark, until an object has followed it."""
        self._texts: list[str] = []
        self._parts: list[CallPart] = []
        self.count = 0
        """Calls begun."""

    def push(self, text: str) -> tuple[str, list[CallPart]]:
        """More of the answer. Returns the text and the parts of calls that are certain now."""
        self._buffer += text
        while self._buffer and self._state():
            pass
        return self._given()

    def flush(self) -> tuple[str, list[CallPart]]:
        """The rest, at the end of the answer."""
        unread = "" if self._is_told else self._object.raw
        rest = self._mark + unread + self._buffer
        if rest.strip() or not self.count:
            self._texts.append(rest)
        self._buffer = ""
        return self._given()

    def _given(self) -> tuple[str, list[CallPart]]:
        text, parts = "".join(self._texts), _joined(self._parts)
        self._texts, self._parts = [], []
        return text, parts

    def _outside(self) -> bool:
        """Text, up to an opening mark; blanks wait for what follows them."""
        mark = self._dialect.opening
        before, found, after = self._buffer.partition(mark)
        if found:
            self._say(before.rstrip())
            self._buffer, self._mark, self._state = after, mark, self._before_object
            return True
        kept = next((n for n in range(len(mark) - 1, 0, -1) if before.endswith(mark[:n])), 0)
        sure = before[: len(before) - kept].rstrip()
        self._say(sure)
        self._buffer = before[len(sure) :]
        return False

    def _before_object(self) -> bool:
        dialect = self._dialect
        rest = self._buffer.lstrip(" \t\r\n" + dialect.between)
        for mark in (*dialect.silent, dialect.closing):
            if rest and mark.startswith(rest) and rest != mark:
                return False
            if mark and rest.startswith(mark):
                self._buffer = rest[len(mark) :]
                return self._after_mark(mark)
        if dialect.name_end and rest:
            return self._before_arguments(rest)
        if rest.startswith("{"):
            self._buffer, self._state = rest, self._in_object
            self._object, self._is_told = CallObject(dialect.arguments), False
            return True
        if rest:
            self._say(self._mark + self._buffer if self._mark or not dialect.opening else rest)
            self._buffer, self._mark = "", ""
            self._state = self._outside if dialect.opening else self._plain
        return False

    def _before_arguments(self, rest: str) -> bool:
        """A name, and then the arguments alone: read as if they stood in an object."""
        name, found, after = rest.partition(self._dialect.name_end)
        if found:
            self._object, self._is_told = CallObject(self._dialect.arguments), False
            for character in json.dumps({"name": name.strip()})[:-1] + ', "arguments": ':
                self._object.push(character)
            self._buffer, self._state = after, self._in_object
            return True
        if len(rest) > MAX_NAME:
            self._say(self._mark + self._buffer)
            self._buffer, self._mark, self._state = "", "", self._outside
        return False

    def _after_mark(self, mark: str) -> bool:
        if mark == self._dialect.closing:
            self._say(self._mark + mark if self._mark else "")
            self._mark, self._state = "", self._outside
        return True

    def _in_object(self) -> bool:
        for at, character in enumerate(self._buffer):
            self._object.push(character)
            if self._dialect.name_end and character == "}" and self._object.depth == 1:
                self._object.push("}")
            if self._object.is_done:
                self._buffer = self._buffer[at + 1 :]
                self._tell()
                self._end_object()
                return True
        self._buffer = ""
        self._tell()
        return False

    def _tell(self) -> None:
        """Give out what is certain of the call under way."""
        if not self._is_told and self._is_call():
            self._is_told, self._mark = True, ""
            self._parts.append(CallPart(self.count, id=self._new_id(), name=self._object.name))
            self.count += 1
        if self._is_told:
            self._parts.append(CallPart(self.count - 1, self._object.taken()))

    def _is_call(self) -> bool:
        """Without an opening mark, an object is a call only if it is one of a known tool."""
        made = self._object
        if not made.name or not (made.has_arguments or made.is_done):
            return False
        return bool(self._dialect.opening) or (made.has_arguments and made.name in self._names)

    def _end_object(self) -> None:
        is_call = self._is_told
        if is_call and not self._object.has_arguments:
            self._parts.append(CallPart(self.count - 1, "{}"))
        if not is_call:
            self._say(self._mark + self._object.raw)
        self._object, self._is_told, self._mark = CallObject(""), False, ""
        if self.count >= self._most:
            self._state = self._mute
        elif is_call and not self._dialect.name_end:
            self._state = self._before_object
        else:
            self._state = self._outside if self._dialect.opening else self._plain

    def _plain(self) -> bool:
        self._say(self._buffer)
        self._buffer = ""
        return False

    def _mute(self) -> bool:
        self._buffer = ""
        return False

    def _say(self, text: str) -> None:
        if text.strip() or (text and self._state == self._plain):
            self._texts.append(text)


def _joined(parts: list[CallPart]) -> list[CallPart]:
    """Neighbouring pieces of one call as one; those that say nothing left out."""
    joined: list[CallPart] = []
    for part in parts:
        if joined and part.id is None and joined[-1].index == part.index:
            before = joined.pop()
            part = CallPart(part.index, before.arguments + part.arguments, before.id, before.name)
        joined.append(part)
    return [part for part in joined if part.id is not None or part.arguments]

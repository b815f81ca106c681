"""A call's JSON object, read character by character while it is written."""

import json


class CallObject:
    """Knows the call's name and its arguments as they come; braces and quotes are all it minds."""

    def __init__(self, arguments_key: str) -> None:
        self._arguments_key = arguments_key
        self.depth = 0
        self._is_quoted = self._is_escaped = False
        self._key: str | None = None
        self._token: list[str] = []
        """The key or the value under way; of arguments that are given out, the first character."""
        self._arguments: list[str] = []
        self._raw: list[str] = []
        self.name: str | None = None
        self.has_arguments = False
        self.is_done = False

    @property
    def raw(self) -> str:
        return "".join(self._raw)

    def push(self, character: str) -> None:
        self._raw.append(character)
        is_first = self.depth == 0
        is_top = self.depth == 1 and not self._is_quoted
        self._step(character)
        if is_first:
            return
        if self.is_done or (is_top and character == ","):
            self._close()
        elif is_top and character == ":" and self._key is None:
            self._key, self._token = _text(self._token), []
            self.has_arguments |= self._is_in_arguments
        else:
            self._take(character)

    def taken(self) -> str:
        """The arguments' text that has come since it was last asked for."""
        text, self._arguments = "".join(self._arguments), []
        return text

    @property
    def _is_in_arguments(self) -> bool:
        return self._key == self._arguments_key

    def _step(self, character: str) -> None:
        if self._is_quoted:
            self._is_quoted = character != '"' or self._is_escaped
            self._is_escaped = character == "\\" and not self._is_escaped
        elif character == '"':
            self._is_quoted = True
        elif character in "{[":
            self.depth += 1
        elif character in "}]":
            self.depth -= 1
            self.is_done = self.depth == 0

    def _take(self, character: str) -> None:
        if not self._token and character.isspace():
            return
        self._token.append(character)
        if self._is_in_arguments and self._token[0] != '"':
            is_over = self.depth == 1 and character.isspace()
            self._arguments += [] if is_over else [character]
            del self._token[1:]

    def _close(self) -> None:
        """A value is over. Arguments in a string are the JSON in it."""
        if self._key == "name":
            self.name = _text(self._token)
        elif self._is_in_arguments and self._token[:1] == ['"']:
            self._arguments.append(_text(self._token) or "")
        self._key, self._token = None, []


def _text(characters: list[str]) -> str | None:
    """A JSON text that is a string."""
    try:
        value = json.loads("".join(characters))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, str) else None

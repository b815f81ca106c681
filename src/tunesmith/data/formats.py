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
from dataclasses import replace
from functools import cache
from typing import Any

import msgspec

from tunesmith.data.built import BUILD
from tunesmith.data.row import Format, Row, Wrong
from tunesmith.data.shapes import SHAPES


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
    row = BUILD[format](shape, number)
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


@cache
def _decoder(format: Format) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(SHAPES[format])


@cache
def known_fields(format: Format) -> frozenset[str]:
    """Of a row; others are ignored."""
    return frozenset(SHAPES[format].__struct_encode_fields__)


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

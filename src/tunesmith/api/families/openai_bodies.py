"""The OpenAI routes' bodies as the API's document shows them; the engine checks them."""

from typing import Any

from tunesmith.spec.chat import MAX_BIASES, MAX_TEXT

Schema = dict[str, Any]


def _number(low: float, high: float, told: str, kind: str = "number") -> Schema:
    return {"type": kind, "minimum": low, "maximum": high, "description": told}


def _whole(low: int, high: int, told: str) -> Schema:
    return _number(low, high, told, "integer")


def _list(most: int, told: str, items: Schema, least: int = 0) -> Schema:
    return {
        "type": "array",
        "minItems": least,
        "maxItems": most,
        "description": told,
        "items": items,
    }


def _flag(told: str) -> Schema:
    return {"type": "boolean", "description": told}


def _object(told: str) -> Schema:
    return {"type": "object", "description": told}


def _text(most: int, told: str) -> Schema:
    return {"type": "string", "minLength": 1, "maxLength": most, "description": told}


def _body(required: list[str], properties: Schema) -> Schema:
    schema = {"type": "object", "required": required, "properties": properties}
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


_MODEL = {"model": _text(4096, "ft:…, an output folder, a registered name or a path")}
_BOTH = {
    **_MODEL,
    "max_tokens": _whole(0, 1 << 20, "of the answer; 0 only where a prompt is echoed"),
    "min_tokens": _whole(0, 1 << 20, "so many come before the answer may end"),
    "temperature": _number(0, 2, "0 is greedy"),
    "top_p": _number(0, 1, "the fewest tokens whose probability reaches it"),
    "top_k": _whole(-1, 1 << 20, "so many of the likeliest; 0 and -1 keep all"),
    "min_p": _number(0, 1, "at least this share of the likeliest one's probability"),
    "repetition_penalty": _number(0, 10, "above 1 weakens what was seen"),
    "presence_penalty": _number(-2, 2, "taken from the logit of each token that was said"),
    "frequency_penalty": _number(-2, 2, "and so much for each time it was"),
    "logit_bias": {
        "type": "object",
        "maxProperties": MAX_BIASES,
        "description": "by token id, from -100 to 100",
    },
    "seed": _whole(-(1 << 53), 1 << 53, "the same says the same again"),
    "n": _whole(1, 16, "answers"),
    "stop": _list(16, "texts that end the answer before them", _text(1000, "one of them")),
    "stop_token_ids": _list(64, "tokens that end the answer", _whole(0, 1 << 31, "one of them")),
    "ignore_eos": _flag("go on where the model would end"),
    "response_format": _object("text, json_object, or json_schema with a schema"),
    "stream": _flag("answer with server-sent events"),
    "stream_options": _object("include_usage: a last chunk with the tokens used"),
}
CHAT = _body(
    ["model", "messages"],
    {
        **_BOTH,
        "messages": _list(2048, "the conversation", {"type": "object"}, least=1),
        "max_completion_tokens": _whole(1, 1 << 20, "of the answer; goes before max_tokens"),
        "logprobs": _flag("log-probabilities of the answer's tokens"),
        "top_logprobs": _whole(0, 20, "and of so many in the place of each"),
        "tools": _list(128, "functions that may be called", {"type": "object"}),
        "tool_choice": {
            "description": "none, auto, required, or a function by its name",
            "oneOf": [
                {"type": "string", "enum": ["none", "auto", "required"]},
                {"type": "object"},
            ],
        },
        "parallel_tool_calls": _flag("whether one answer may make several calls"),
    },
)
COMPLETIONS = _body(
    ["model", "prompt"],
    {
        **_BOTH,
        "prompt": {
            "description": "the text to go on with, ids, or a list of either",
            "oneOf": [
                _text(MAX_TEXT, "a text"),
                _list(1 << 20, "texts, ids, or lists of ids", {}, least=1),
            ],
        },
        "echo": _flag("the prompt comes first"),
        "logprobs": _whole(0, 20, "log-probabilities of each token and of so many in its place"),
    },
)
EMBEDDINGS = _body(
    ["model", "input"],
    {
        **_MODEL,
        "input": {
            "description": "a text, ids, or a list of either",
            "oneOf": [
                _text(MAX_TEXT, "a text"),
                _list(1 << 20, "texts, ids, or lists of ids", {}, least=1),
            ],
        },
        "encoding_format": {
            "type": "string",
            "enum": ["float", "base64"],
            "description": "base64: fp32, the smallest byte first",
        },
        "dimensions": _whole(1, 1 << 20, "the vector's first so many"),
        "x_pooling": {
            "type": "string",
            "enum": ["mean", "last"],
            "description": "by the model's own setting where it is not given",
        },
    },
)

"""What a request's answer is held to, as a grammar: its response format, or calls of tools."""

from tunesmith.errors import BadRequestError
from tunesmith.infer import openai
from tunesmith.infer.calling import Calling
from tunesmith.infer.chat import in_reader
from tunesmith.infer.guide import Grammar
from tunesmith.infer.lexicon import lexicon_of
from tunesmith.infer.schema import json_grammar
from tunesmith.infer.voices import Voice

_ANY_OBJECT = {"type": "object"}


async def grammar_of(
    asked: openai.Options, voice: Voice, vocabulary: int, calling: Calling | None = None
) -> Grammar | None:
    """None where any text will do. Raises BadRequestError that says where a schema is wrong."""
    wanted = asked.response_format
    is_json = wanted is not None and wanted.type != "text"
    if is_json and calling is not None:
        raise BadRequestError(
            "response_format and tools cannot both hold an answer: leave one out, or give "
            "tool_choice: none",
            param="response_format",
        )
    if calling is not None and calling.is_held:
        return await in_reader(lambda: _calls(calling, voice, vocabulary))
    if wanted is None or not is_json:
        return None
    return await in_reader(lambda: _json(wanted, voice, vocabulary))


def _calls(calling: Calling, voice: Voice, vocabulary: int) -> Grammar:
    return calling.grammar(lexicon_of(voice.renderer, vocabulary), calling.marks(voice))


def _json(wanted: openai.ResponseFormat, voice: Voice, vocabulary: int) -> Grammar:
    lexicon = lexicon_of(voice.renderer, vocabulary)
    if wanted.json_schema is None:
        return json_grammar(_ANY_OBJECT, "response_format", lexicon)
    param = "response_format.json_schema.schema"
    schema = wanted.json_schema.schema_
    return json_grammar(schema, param, lexicon, bool(wanted.json_schema.strict))

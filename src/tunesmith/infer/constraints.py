"""What a request's answer is held to, as a grammar: its response format, or calls of tools."""

from tunesmith.infer import openai
from tunesmith.infer.calling import Calling
from tunesmith.infer.chat import in_reader
from tunesmith.infer.guide import Grammar
from tunesmith.infer.lexicon import lexicon_of
from tunesmith.infer.schema import embedded, json_grammar
from tunesmith.infer.voices import Voice

_ANY_OBJECT = {"type": "object"}


async def grammar_of(
    asked: openai.Options, voice: Voice, vocabulary: int, calling: Calling | None = None
) -> Grammar | None:
    """None where any text will do. Raises BadRequestError that says where a schema is wrong."""
    wanted = asked.response_format
    if wanted is not None and wanted.type == "text":
        wanted = None
    if wanted is None and (calling is None or not calling.is_held):
        return None
    return await in_reader(lambda: _compiled(wanted, calling, voice, vocabulary))


def _compiled(
    wanted: openai.ResponseFormat | None, calling: Calling | None, voice: Voice, vocabulary: int
) -> Grammar:
    lexicon = lexicon_of(voice.renderer, vocabulary)
    answer = None
    if wanted is not None:
        told = wanted.json_schema
        schema, is_strict = (told.schema_, bool(told.strict)) if told else (_ANY_OBJECT, True)
        plain = json_grammar(schema, "response_format.json_schema.schema", lexicon, is_strict)
        if calling is None:
            return plain
        answer = embedded(schema, is_strict)
    assert calling is not None, "one of them holds the answer"
    return calling.grammar(lexicon, calling.marks(voice), answer)

"""Grammars: what they allow, and what becomes of those that ask too much."""

import json
from random import Random
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import infer_fixtures as made
from tunesmith.errors import BadRequestError
from tunesmith.infer.guide import Guide
from tunesmith.infer.lexicon import Lexicon
from tunesmith.infer.schema import json_grammar

TOKENIZER = made.tokenizer()
LEXICON = Lexicon(TOKENIZER, 370, [0, 2])


def guide_of(schema: dict[str, Any], **more: Any) -> Guide:
    return json_grammar(schema, "schema", LEXICON, **more).guide()


def ramble(guide: Guide, seed: int, most: int = 400, tokenizer: Tokenizer = TOKENIZER) -> str:
    """Say any of what is allowed, to the end."""
    random, ids = Random(seed), []
    while not guide.is_over and len(ids) < most:
        ids.append(random.choice(np.flatnonzero(guide.mask()).tolist()))
        guide.push(ids[-1])
        if guide.error:
            raise guide.error
    return str(tokenizer.decode(ids))


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_said_under_a_schema_follows_it(seed: int) -> None:
    schema = {
        "type": "array",
        "items": {"$ref": "#/$defs/pair"},
        "maxItems": 3,
        "$defs": {"pair": {"type": "object", "properties": {"a": {"enum": [1, "둘"]}}}},
    }
    schema["$defs"]["pair"] |= {"required": ["a"], "additionalProperties": False}
    said = json.loads(ramble(guide_of(schema), seed))
    assert all(each["a"] in (1, "둘") for each in said)


def unigram() -> Tokenizer:
    """As SentencePiece's: llguidance does not read its decoder by itself."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    texts = ['{"name": "the quick fox", "age": 12}', "a b c d 0 1 2 3 4 5 6 7 8 9 , : [ ] 안녕"]
    made.train_from_iterator(texts, trainer)
    return made


def test_a_vocabulary_of_sentencepiece_follows_a_schema_too() -> None:
    tokenizer = unigram()
    lexicon = Lexicon(tokenizer, 128, [1])
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}}
    schema |= {"required": ["name"], "additionalProperties": False}
    for seed in range(4):
        guide = json_grammar(schema, "schema", lexicon).guide()
        assert len(json.loads(ramble(guide, seed, tokenizer=tokenizer))["name"]) <= 9
    assert lexicon.name(tokenizer.token_to_id("▁")) == " "


def test_each_answer_has_a_place_of_its_own() -> None:
    grammar = json_grammar({"enum": ["a", "b"]}, "schema", LEXICON)
    first, second = grammar.guide(), grammar.guide()
    [quote] = np.flatnonzero(first.mask()).tolist()
    first.push(quote)
    assert np.flatnonzero(second.mask()).tolist() == [quote]
    assert len(np.flatnonzero(first.mask())) == 2


def test_an_end_token_is_allowed_where_the_answer_may_end() -> None:
    guide = guide_of({"type": "integer", "minimum": 10, "maximum": 99})
    ends = []
    for digit in "42":
        ends.append(bool(guide.mask()[[0, 2]].any()))
        guide.push(TOKENIZER.encode(digit).ids[0])
    assert (ends, guide.is_over) == ([False, False], True)


def test_padding_of_the_vocabulary_is_never_allowed() -> None:
    guide = guide_of({"type": "string"})
    guide.push(int(np.flatnonzero(guide.mask())[0]))
    assert not guide.mask()[360:].any()


def test_a_grammar_that_asks_too_much_of_a_token_ends_in_an_error() -> None:
    patterns = {f"k{n}": {"type": "string", "pattern": "a.*b.*c"} for n in range(1200)}
    with pytest.raises(BadRequestError, match="followed to an end"):
        ramble(guide_of({"type": "object", "properties": patterns}), 1)


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "objekt"}, r"\$\.type"),
        ({"items": {"uniqueItems": True}}, r"\$\.items\.uniqueItems"),
        (
            {"properties": {"q": {"type": "string", "pattern": "(?=a)b"}}},
            r"\$\.properties\.q\.pattern",
        ),
        ({"items": {"type": "string", "format": "foo"}}, r"\$\.items\.format"),
        ({"$ref": "http://127.0.0.1/x"}, "not present"),
        ({"allOf": [{"$ref": "#/$defs/none"}]}, "does not exist"),
        ({"enum": ["x" * 200_000]}, "bytes"),
    ],
)
def test_a_schema_that_is_wrong_says_where(schema: dict[str, Any], place: str) -> None:
    with pytest.raises(BadRequestError, match=place):
        guide_of(schema)


def test_what_cannot_be_followed_is_passed_over_where_it_is_not_strict() -> None:
    schema = {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True}
    assert isinstance(json.loads(ramble(guide_of(schema, is_strict=False), 3)), list)

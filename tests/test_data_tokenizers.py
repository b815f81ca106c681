"""Tokenizers that are brought along: SentencePiece's ids are kept, strangers' files are refused."""

import base64
import json
import random
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from task_files import PLAIN_PIECES, sentencepiece_model
from train_fixtures import make_model
from tunesmith.data import brought, sentencepiece
from tunesmith.data.sentencepiece import NoModel
from tunesmith.data.tokens import TokenizerFault

SPOKEN = [
    *("river stone 강물", "  two  blanks  ", "水石头 流动", "tab\tand\nline", "🌊 밤 夜", "x"),
    *("ﬁ ① ｆｕｌｌ ½ café cafe\u0301", "never seen: Ωβ ๏", "", " ", "a<sep>b  <sep>"),
    "if x:\n    y  \n  z",
]
WAYS: dict[str, dict[str, Any]] = {
    "bytes": {},
    "pieces": PLAIN_PIECES,
    "as it stands": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "no blank before": {"add_dummy_prefix": False},
    "over blanks": {"split_by_whitespace": False},
    "user's": {**PLAIN_PIECES, "vocab_size": 58, "user_defined_symbols": ["<sep>"]},
}


@pytest.mark.parametrize("way", WAYS)
def test_ids_and_texts_are_those_of_sentencepiece(way: str) -> None:
    body = sentencepiece_model(**WAYS[way])
    theirs = SentencePieceProcessor(model_proto=body)
    ours = sentencepiece.convert(sentencepiece.read(body))
    texts = [text for text in SPOKEN if way != "user's" or not text.endswith(" ")]
    for text in texts:
        ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False).ids == ids, text
        if theirs.unk_id() not in ids:
            assert ours.decode(ids) == theirs.decode(ids)


def test_a_damaged_model_is_refused_in_a_sentence_or_read() -> None:
    body, dice = sentencepiece_model(), random.Random(0)
    for _ in range(300):
        spoilt = bytearray(body)
        for _ in range(dice.choice([1, 3, 50])):
            spoilt[dice.randrange(9000)] = dice.randrange(256)
        if dice.random() < 0.2:
            del spoilt[dice.randrange(len(spoilt)) :]
        with suppress(NoModel):
            sentencepiece.convert(sentencepiece.read(bytes(spoilt)))


def message(number: int, body: bytes) -> bytes:
    size, written = len(body), b""
    while True:
        size, low = size >> 7, size & 0x7F
        written += bytes([low | 0x80 if size else low])
        if not size:
            return bytes([number << 3 | 2]) + written + body


def piece(text: str, score: float = 0.0, kind: int = 1) -> bytes:
    return message(
        1, message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
    )


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "no piece"),
        (b"not a model", "protocol buffer"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "cut off"),
        (piece("a"), "unknown"),
        (piece("", kind=2), "empty piece"),
        (piece("u", kind=2) + piece("a") * 2, "twice"),
        (piece("u", float("nan"), 2), "score"),
        (piece("u" * 513, kind=2), "512"),
        (piece("u", kind=9), "kind"),
        (piece("u", kind=2) + message(2, b"\x18\x03"), "word"),
        (b"\x0a" * (sentencepiece.MAX_BYTES + 1), "over 32 MB"),
    ],
)
def test_what_is_no_model_is_refused(body: bytes, why: str) -> None:
    with pytest.raises(NoModel, match=why):
        sentencepiece.convert(sentencepiece.read(body))


def test_a_folder_a_file_and_a_model_become_a_folder_that_transformers_reads(
    tmp_path: Path,
) -> None:
    model = make_model(tmp_path / "m")
    spm = tmp_path / "t.model"
    spm.write_bytes(sentencepiece_model())
    for at, path in enumerate([model, model / "tokenizer.json", spm]):
        packed = tmp_path / f"{at}.tokenizer"
        packed.write_bytes(brought.pack(path, "t"))
        folder = brought.unpack(packed, tmp_path / str(at))
        ours, theirs = brought.renderer(packed), AutoTokenizer.from_pretrained(folder)
        text = "river 강물 石头\n🌊"
        assert ours.encode_text(text) == theirs.encode(text)
        assert ours.eos_token_id == theirs.eos_token_id is not None
        assert (ours.template is None) == (path != model)


@pytest.mark.parametrize(
    ("name", "body", "why"),
    [
        ("t.txt", b"x", "give a folder with tokenizer.json"),
        ("t.model", b"x", "cannot be read as SentencePiece"),
        ("t.json", b"{}", "tokenizer.json cannot be read"),
        ("t.json", b"{" * 100_000, "cannot be read"),
        ("d/vocab.txt", b"x", "no tokenizer in it"),
        ("d/tokenizer_config.json", b'{"auto_map": {}}', "no tokenizer in it"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, name: str, body: bytes, why: str) -> None:
    place = tmp_path / name
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(body)
    path = place.parent if name.startswith("d/") else place
    with pytest.raises(TokenizerFault, match=why):
        brought.pack(path, name)


def test_links_and_code_of_a_folder_are_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    (tmp_path / "secret.json").write_bytes((model / "tokenizer.json").read_bytes())
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(TokenizerFault, match=r"tokenizer\.json cannot be read"):
        brought.pack(model, "m")
    config = json.loads((model / "tokenizer_config.json").read_bytes())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"auto_map": {}}))
    with pytest.raises(TokenizerFault, match="code of its own"):
        brought.pack(model, "m", follows_links=True)


def test_a_packed_one_writes_nothing_but_a_tokenizers_files(tmp_path: Path) -> None:
    packed = tmp_path / "x.tokenizer"
    packed.write_text(json.dumps({"../../out.json": "AA=="}))
    with pytest.raises(TokenizerFault, match=r"a file called '\.\./\.\./out\.json'"):
        brought.unpack(packed, tmp_path / "in")


def grown(times: int, text: str = "a") -> dict[str, Any]:
    step = {"type": "Replace", "pattern": {"String": text}, "content": "a" * 10}
    return {"normalizer": {"type": "Sequence", "normalizers": [step] * times}}


def template(mark: str) -> dict[str, Any]:
    both = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    single = [{"SpecialToken": {"id": mark, "type_id": 0}}, both[0]]
    kind = "TemplateProcessing"
    return {"post_processor": {"type": kind, "single": single, "pair": both, "special_tokens": {}}}


def charsmap(form: bytes) -> dict[str, Any]:
    """One that the library takes, with a form that is longer than any of Unicode's."""
    trie = (8).to_bytes(4, "little") + bytes(8)
    body = base64.b64encode(trie + form + b"\0").decode()
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": body}}


ADDED = {"id": 0, "special": True} | dict.fromkeys(
    ("single_word", "lstrip", "rstrip", "normalized"), False
)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (grown(9), "^m: tokenizer.json makes texts up to 1,000,000,000 times as long"),
        (grown(2, ""), "times as long"),
        (charsmap(b"x" * 100_000), "times as long"),
        ({"decoder": grown(2)["normalizer"]["normalizers"][0] | {"content": "b" * 99}}, "as long"),
        (template("[NONE]"), "^m: the tokenizer breaks on a text"),
        (
            {"model": {"type": "Unigram", "unk_id": None, "vocab": []}},
            "^m: the tokenizer breaks on a text: .*unk_id",
        ),
        (
            {"added_tokens": [ADDED | {"id": at, "content": f"{at}" * 9000} for at in range(99)]},
            "over 1,048,576 characters in all",
        ),
    ],
)
def test_a_tokenizer_that_would_take_the_process_along_is_refused(
    change: dict[str, Any], why: str, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "m")
    body = json.loads((model / "tokenizer.json").read_bytes())
    (model / "tokenizer.json").write_text(json.dumps(body | change))
    with pytest.raises(TokenizerFault, match=why):
        brought.pack(model, "m")


def test_half_letters_and_templates_by_a_link_are_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    (tmp_path / "secrets").mkdir()
    (model / "additional_chat_templates").symlink_to(tmp_path / "secrets")
    with pytest.raises(TokenizerFault, match="is a link to elsewhere"):
        brought.pack(model, "m")
    (model / "additional_chat_templates").unlink()
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    (model / "tokenizer_config.json").write_text('{"eos_token": "\\ud800"}')
    with pytest.raises(TokenizerFault, match=r"^m: tokenizer_config\.json cannot be read"):
        brought.pack(model, "m")

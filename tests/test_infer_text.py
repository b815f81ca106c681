"""Ids to text as they come, and stop strings across them."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import infer_fixtures as made
from tunesmith.infer.detokenize import Detokenizer, StopWatch

SAMPLES = [
    "plain words, and more",
    "안녕하세요 반갑습니다",
    "你好，世界",
    "😀👩‍👩‍👧🇰🇷 e\u0301",
    "  two  spaces \n\n and lines\t",
    "",
]


def byte_fallback() -> Tokenizer:
    """As Llama 2 has it: a word mark in front, unknown characters as bytes."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    specials = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<unk>", "</s>"], show_progress=False
    )
    made.train_from_iterator(["plain words, and more two spaces"], trainer)
    made.add_tokens([])
    vocabulary = made.get_vocab()
    merged = {
        token: at for at, token in enumerate([*specials, *sorted(set(vocabulary) - set(specials))])
    }
    made.model = models.BPE(merged, [], byte_fallback=True, unk_token="<unk>")
    return made


TOKENIZERS = {"byte_level": made.tokenizer(), "byte_fallback": byte_fallback()}


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(each) for each in ids), detokenizer.flush()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", SAMPLES)
def test_the_pieces_joined_equal_decoding_the_whole(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text).ids
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", SAMPLES)
def test_no_piece_holds_half_a_character(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    assert not any("\ufffd" in each for each in pieces(tokenizer, tokenizer.encode(text).ids))


def test_a_character_comes_with_its_last_byte() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = tokenizer.encode("😀").ids[-4:]
    assert pieces(tokenizer, ids) == ["", "", "", "😀", ""]


def test_half_a_character_at_the_end_shows_as_the_replacement() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("a😀").ids[:-1]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_endless_broken_bytes_are_given_out_and_not_hoarded() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = [tokenizer.get_vocab()["ÿ"]] * 300
    detokenizer = Detokenizer(tokenizer)
    shown = [detokenizer.push(each) for each in ids]
    assert len("".join(shown)) > 280
    assert "".join(shown) + detokenizer.flush() == tokenizer.decode(ids)


def test_special_tokens_have_no_text() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    assert "".join(pieces(tokenizer, [1, *tokenizer.encode("hi").ids, 2])) == "hi"


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 359), max_size=60))
def test_any_ids_at_all_decode_as_a_whole_does(ids: list[int]) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def watch(stops: list[str], parts: list[str]) -> tuple[list[str], bool]:
    watcher, shown = StopWatch(stops), []
    for part in parts:
        text, is_stopped = watcher.push(part)
        shown.append(text)
        if is_stopped:
            return shown, True
    return [*shown, watcher.flush()], False


def test_a_stop_string_across_tokens_is_never_shown_in_part() -> None:
    assert watch(["###"], ["one#", "#", "two##", "#three"]) == (["one", "", "##two", ""], True)


def test_what_looked_like_a_stop_string_is_shown_in_the_end() -> None:
    assert watch(["END"], ["the E", "N"]) == (["the ", "", "EN"], False)


def test_the_first_of_several_stop_strings_wins() -> None:
    assert watch(["later", "soon"], ["so", "on or later"]) == (["", ""], True)


def test_of_two_that_end_together_the_longer_is_cut() -> None:
    assert watch(["b", "ab"], ["xab"]) == (["x"], True)


def test_stop_strings_of_any_script() -> None:
    assert watch(["끝😀"], ["이제 끝", "😀 아님"]) == (["이제 ", ""], True)


@settings(max_examples=200, deadline=None)
@given(
    st.text("ab", max_size=40),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(),
)
def test_however_text_is_cut_it_ends_before_the_first_stop_string(
    text: str, stops: list[str], seed: int
) -> None:
    random, parts, at = Random(seed), [], 0
    while at < len(text):
        size = random.randint(1, 5)
        parts.append(text[at : at + size])
        at += size
    shown, is_stopped = watch(stops, parts)
    ends = [text.find(each) + len(each) for each in stops if each in text]
    assert is_stopped == bool(ends)
    if ends:
        first = min(ends)
        cut = min(first - len(each) for each in stops if text[:first].endswith(each))
        assert "".join(shown) == text[:cut]
    else:
        assert "".join(shown) == text

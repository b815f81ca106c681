"""What is shown of a row is what the trainer's own source yields, token for token."""

import json

import pytest

from data_fixtures import BY_NAME, FAMILIES, PLAIN, conversations
from tunesmith.data.fit import Cut
from tunesmith.data.preview import preview_row
from tunesmith.data.reading import Reading
from tunesmith.data.render import Renderer
from tunesmith.data.rows import RowIndex
from tunesmith.data.spelled import Speller
from tunesmith.errors import ValidationError
from tunesmith.hub.folder import ModelFolder
from tunesmith.hub.preview import File, Wanted, look
from tunesmith.train.pairs import PairReader
from tunesmith.train.pretrain import BlockSource
from tunesmith.train.sft import SampleReader
from tunesmith.train.source import RowSource

ALL = (*FAMILIES, PLAIN)
WORDS = "안녕하세요 힣 세계 你好世界 鱻 😀👩\u200d👧 fox"


@pytest.fixture(scope="module")
def renderers(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {each.name: Renderer.load(each.write(root / each.name)) for each in ALL}


def plain(message):
    return {"role": message.role, "content": message.content}


def chats(has_system=True):
    rows = [{"messages": [plain(said) for said in each]} for each in conversations(has_system)]
    long = [{"role": "user", "content": WORDS}, {"role": "assistant", "content": f"{WORDS} " * 9}]
    late = [{"role": "user", "content": f"{WORDS} " * 9}, {"role": "assistant", "content": "끝 完"}]
    return [*rows, {"messages": long}, {"messages": late}]


def write(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def trained(rows, renderer, cut):
    """By line, what the trainer's source yields."""
    source = RowSource(rows, SampleReader(renderer, cut), None)
    found = {}
    for at in range(len(rows)):
        sample = source._read(at)
        if sample is not None:
            found[at + 1] = (list(sample.ids), [0, *map(int, sample.mask[1:])])
    return found


@pytest.mark.parametrize("name", [family.name for family in ALL])
@pytest.mark.parametrize("overlong", ["drop", "truncate"])
@pytest.mark.parametrize("train_on", ["completions", "all"])
def test_ids_and_weights_shown_are_those_trained_on(renderers, tmp_path, name, overlong, train_on):
    family = BY_NAME.get(name, PLAIN)
    path = write(tmp_path, chats(family.has_system))
    left_out = set()
    for max_length in (40, 120, 4096):
        cut = Cut(max_length, overlong, train_on)
        with RowIndex.open(path) as rows:
            renderer = renderers[name].with_fallback(rows.format)
            expected = trained(rows, renderer, cut)
            for number, row in enumerate(rows, 1):
                shown = preview_row(renderer, row, cut, 4096)
                is_trained = shown.fate in ("trained", "truncated")
                assert is_trained == (number in expected)
                left_out |= {shown.fate} if not is_trained else set()
                if is_trained:
                    assert (list(shown.ids), list(shown.weights)) == expected[number]
                    assert shown.trained_tokens == sum(shown.weights)
                    assert [token.id for token in shown.tokens] == list(shown.ids)
    assert left_out or (overlong, train_on) == ("truncate", "all")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "번역: ", "completion": "翻译 😀"},
        {"instruction": "묻다", "input": "问", "output": "답 😀"},
        {"text": "글 文 😀"},
        {"conversations": [{"from": "human", "value": "가"}, {"from": "gpt", "value": "나"}]},
    ],
)
@pytest.mark.parametrize("name", ["plain", "chatml", "llama-2"])
def test_every_format_is_shown_as_it_is_trained_on(renderers, tmp_path, row, name):
    cut = Cut(512, "drop", "completions")
    with RowIndex.open(write(tmp_path, [row])) as rows:
        renderer = renderers[name].with_fallback(rows.format)
        shown = preview_row(renderer, rows[0], cut, 4096)
        assert trained(rows, renderer, cut) == {1: (list(shown.ids), list(shown.weights))}
        assert (shown.template is None) == (not rows[0].messages)


@pytest.mark.parametrize("max_length", [1024, 24])
@pytest.mark.parametrize("answer", ["chosen", "rejected"])
def test_an_answer_of_a_pair_is_shown_as_it_is_compared(renderers, tmp_path, max_length, answer):
    pairs = [
        {"prompt": WORDS[:12], "chosen": WORDS, "rejected": "끝 完 fox"},
        {
            "prompt": [{"role": "user", "content": WORDS[:9]}],
            "chosen": [{"role": "assistant", "content": "강물 河"}],
            "rejected": [{"role": "assistant", "content": WORDS}],
        },
    ]
    renderer = renderers["chatml"]
    for pair in pairs:
        path = write(tmp_path, [pair])
        cut = Cut(max_length, "truncate")
        with RowIndex.open(path) as rows:
            sample = RowSource(rows, PairReader(renderer, cut), None)._read(0)
        with path.open("rb") as file:
            at, folder = File(file, path, ".jsonl"), model_folder(renderer)
            shown = look(at, folder, Wanted(cut, Reading(), answer=answer), lambda *_: renderer)
        ids, mask = sample.fork.answers[["chosen", "rejected"].index(answer)]
        assert list(shown.preview.ids) == [*sample.fork.prompt, *ids]
        prompt = [0] * len(sample.fork.prompt)
        assert list(shown.preview.weights) == [*prompt, *map(int, mask)]


@pytest.mark.parametrize("name", [family.name for family in ALL])
def test_tokens_spell_the_text_that_they_are_made_of(renderers, tmp_path, name):
    family = BY_NAME.get(name, PLAIN)
    with RowIndex.open(write(tmp_path, chats(family.has_system))) as rows:
        renderer = renderers[name].with_fallback(rows.format)
        for row in rows:
            shown = preview_row(renderer, row, Cut(4096, "drop", "completions"), 4096)
            spelled = b"".join(
                token.text.encode("latin-1").decode("unicode_escape").encode("latin-1")
                if token.is_bytes
                else token.text.encode()
                for token in shown.tokens
            ).decode()
            for said in row.messages:
                assert said.content.strip() in spelled


def test_a_part_of_a_character_is_spelled_as_its_bytes(renderers):
    renderer = renderers["chatml"]
    ids = renderer.encode_text("힣")
    spelled = Speller(renderer.tokenizer).spell(ids)
    assert len(ids) > 1
    assert "".join(each.text for each in spelled if each.is_bytes) == "\\xed\\x9e\\xa3"


def test_a_special_token_is_spelled_as_it_is_named(renderers):
    renderer = renderers["chatml"]
    [spelled] = Speller(renderer.tokenizer).spell([renderer.eos_token_id])
    assert (spelled.text, spelled.is_bytes) == ("<|im_end|>", False)
    assert Speller(renderer.tokenizer).spell([10**6])[0].text == "<1000000>"


FATES = {
    "trained": ({"max_length": 4096, "overlong": "drop"}, 1, ""),
    "dropped": ({"max_length": 40, "overlong": "drop"}, 4, "overlong is drop"),
    "truncated": ({"max_length": 40, "overlong": "truncate"}, 4, "cut off at its end"),
    "masked": ({"max_length": 40, "overlong": "truncate"}, 5, "nothing to learn is left of it"),
    "refused": ({"max_length": 40, "overlong": "refuse"}, 4, "no job is run"),
}


@pytest.mark.parametrize("fate", FATES)
def test_what_becomes_of_a_row_is_told_with_the_reason(renderers, tmp_path, fate):
    asked, number, why = FATES[fate]
    with RowIndex.open(write(tmp_path, chats())) as rows:
        cut = Cut(asked["max_length"], asked["overlong"], "completions")
        shown = preview_row(renderers["chatml"], rows[number - 1], cut, 16)
    assert shown.fate == fate
    assert why in shown.why
    assert (shown.trained_tokens > 0) == (fate in ("trained", "truncated"))
    assert len(shown.tokens) == 16


def test_a_template_that_refuses_the_row_says_so(renderers, tmp_path):
    with RowIndex.open(write(tmp_path, chats())) as rows:
        shown = preview_row(renderers["gemma"], rows[2], Cut(99, "drop", "completions"), 16)
    assert (shown.fate, shown.ids, shown.template) == ("refused", (), "model")
    assert "System role not supported" in shown.why


def model_folder(renderer, context=0):
    config = {"max_position_embeddings": context} if context else {}
    return ModelFolder(renderer.folder, renderer.folder, False, config, 0, 0, True, False)


def shown_block(path, renderer, number, length=32, context=0):
    wanted = Wanted(Cut(length, "drop", "all"), Reading(), "pretrain", row=number, seed=7)
    with path.open("rb") as file:
        return look(
            File(file, path, path.suffix),
            model_folder(renderer, context),
            wanted,
            lambda folder, format: renderer,
        )


def test_a_packed_block_is_the_trainers(renderers, tmp_path):
    renderer = renderers["llama-3"]
    path = write(tmp_path, [{"text": f"{at} {WORDS}"} for at in range(20)])
    with RowIndex.open(path) as rows:
        source = BlockSource(rows, renderer, 32, 7)
        source.open(0)
        blocks = []
        while (sample := source.pull()) is not None:
            blocks.append(list(sample.ids))
    for number in (1, 2, len(blocks)):
        preview = shown_block(path, renderer, number).preview
        assert list(preview.ids) == blocks[number - 1]
        assert list(preview.weights) == [0] + [1] * (len(preview.ids) - 1)
    with pytest.raises(ValidationError, match="fewer than"):
        shown_block(path, renderer, len(blocks) + 1)
    with pytest.raises(ValidationError, match="the first 1000 blocks"):
        shown_block(path, renderer, 1001)


def test_the_models_own_context_holds_where_it_is_shorter(renderers, tmp_path):
    path = write(tmp_path, [{"text": WORDS}] * 20)
    found = shown_block(path, renderers["chatml"], 1, length=64, context=16)
    assert (found.max_length, len(found.preview.ids)) == (16, 16)


def test_pretraining_shows_no_conversation(renderers, tmp_path):
    with pytest.raises(ValidationError, match="pretraining reads plain text"):
        shown_block(write(tmp_path, chats()), renderers["chatml"], 1)

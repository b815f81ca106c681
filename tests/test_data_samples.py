import sys

import pytest
from transformers import AutoTokenizer

from tunesmith.data import samples
from tunesmith.data.render import Renderer
from tunesmith.data.rows import RowIndex, check_file


@pytest.fixture(scope="module")
def documents():
    return samples.documentation_text(120_000, seed=3)


@pytest.fixture(scope="module")
def folder(documents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    samples.write_tokenizer(samples.train_tokenizer(documents, 600), folder)
    return folder


def test_documentation_is_the_same_for_the_same_seed(documents):
    assert samples.documentation_text(120_000, seed=3) == documents
    assert samples.documentation_text(20_000, seed=4) != documents[:20]
    assert 80_000 < sum(len(text.encode()) for text in documents) <= 120_000


def test_documentation_is_read_without_importing_what_it_documents(documents):
    assert "antigravity" not in sys.modules
    assert len(set(documents)) > len(documents) * 0.9


def test_a_trained_tokenizer_brings_any_text_back(folder):
    ours = Renderer.load(folder)
    for text in ("plain", "안녕하세요", "你好,世界", "👩‍👩‍👧 ok\n\tx", "12345"):
        assert ours.decode(ours.encode_text(text)) == text
    assert len(ours.encode_text("12345")) == 5
    assert ours.vocabulary_size == 600


def test_a_trained_tokenizer_loads_in_transformers_with_its_template(folder):
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = Renderer.load(folder)
    assert theirs.eos_token_id == ours.eos_token_id == 0
    messages = [{"role": "user", "content": "안녕"}]
    wanted = theirs.apply_chat_template(messages, return_dict=False, add_generation_prompt=True)
    from tunesmith.spec.chat import Message

    assert ours.prompt_ids([Message(role="user", content="안녕")]) == wanted
    assert theirs.convert_tokens_to_ids("<|im_end|>") in ours.stop_ids


@pytest.mark.parametrize("name", samples.TASKS)
def test_questions_differ_and_the_held_out_ones_are_not_trained_on(name):
    task = samples.TASKS[name]
    train, held_out = samples.split(task, seed=5, train=400, held_out=100)
    assert (len(train), len(held_out)) == (400, 100)
    assert not {question for question, _ in train} & {question for question, _ in held_out}
    assert task(5, 50) == task(5, 50)
    assert task(5, 50) != task(6, 50)


def test_answers_are_right():
    assert samples.capitals(1, 1)[0] == ("Write figot in capitals.", "FIGOT")
    assert samples.reversals(1, 1)[0] == ("Write figot backwards.", "togif")
    assert samples.first_letters(1, 1)[0] == ("What is the first letter of figot?", "f")
    assert samples.lengths(1, 1)[0] == ("How many letters has figot?", "5")
    assert samples.sums(1, 1)[0] == ("What is 137 + 582?", "719")


def test_more_questions_than_there_are_is_refused():
    with pytest.raises(ValueError, match="at most"):
        samples.capitals(1, 10_000_000)


def test_written_samples_are_read_as_conversations(tmp_path):
    path = tmp_path / "train.jsonl"
    samples.write_chat(path, [*samples.capitals(1, 20), ("한국의 수도?", "서울")])
    assert check_file(path).format == "openai"
    with RowIndex.open(path) as index:
        assert [said.content for said in index[20].messages] == ["한국의 수도?", "서울"]


def test_written_documents_are_read_as_text(tmp_path, documents):
    path = tmp_path / "text.jsonl"
    samples.write_text(path, documents)
    report = check_file(path)
    assert (report.format, report.num_samples) == ("text", len(documents))

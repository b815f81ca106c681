import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_fixtures import BY_NAME, FAMILIES, PLAIN
from tunesmith.data.check import Verdict, check_tokens
from tunesmith.data.render import Renderer
from tunesmith.data.rows import RowIndex


@pytest.fixture(scope="module")
def renderers(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    families = (*FAMILIES, PLAIN)
    return {each.name: Renderer.load(each.write(root / each.name)) for each in families}


@pytest.fixture
def index(tmp_path):
    opened = []

    def write(rows):
        path = tmp_path / f"{len(opened)}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        opened.append(RowIndex.open(path))
        return opened[-1]

    yield write
    for each in opened:
        each.close()


def chat(asked, told, **more):
    answer = {"role": "assistant", "content": told, **more}
    return {"messages": [{"role": "user", "content": asked}, answer]}


def rows_of(most, count=40):
    return [chat("Say it again, 다시", "word " * (1 + at % most)) for at in range(5, count)]


@pytest.mark.parametrize("overlong", ["drop", "truncate", "refuse"])
@pytest.mark.parametrize("name", ["chatml", "llama-2", "gemma", "plain"])
def test_overlong_rows_are_those_that_encode_to_more(renderers, index, name, overlong):
    rows = index(rows_of(37, 200))
    renderer = renderers[name].with_fallback(rows.format)
    sizes = {row.line: len(renderer.encode(row).ids) for row in rows}
    for limit in (24, 40, 60, 400):
        verdict = check_tokens(rows, renderer, limit, overlong)
        long = [line for line, size in sizes.items() if size > limit]
        assert verdict.overlong_count == len(long)
        assert list(verdict.overlong_lines) == long[:20]


@given(
    texts=st.lists(
        st.text(max_size=60) | st.text("ab \n\t'1한漢😀", min_size=1, max_size=200),
        min_size=1,
        max_size=8,
    ),
    limit=st.integers(8, 200),
)
@settings(max_examples=100, deadline=None)
def test_no_row_is_waved_through_that_is_too_long(renderers, tmp_path_factory, texts, limit):
    path = tmp_path_factory.getbasetemp() / "waved.jsonl"
    bodies = [json.dumps(chat("x", f"a{text}b".replace("\0", ""))) for text in texts]
    path.write_text("\n".join(bodies))
    for name in ("chatml", "vicuna"):
        with RowIndex.open(path) as rows:
            long = sum(len(renderers[name].encode(row).ids) > limit for row in rows)
            assert check_tokens(rows, renderers[name], limit).overlong_count == long


def test_most_rows_are_never_tokenised(renderers, index):
    rows = index(rows_of(37, 300))
    verdict = check_tokens(rows, renderers["chatml"], 1024)
    assert verdict.is_usable
    assert verdict.tokenised == 1
    assert verdict.tokens is None


def test_a_sample_that_is_too_long_is_left_out_and_the_rest_is_usable(renderers, index):
    rows = index([chat("a", "b"), chat("a", "fox " * 500), chat("a", "b")])
    verdict = check_tokens(rows, renderers["chatml"], 64)
    assert verdict.is_usable
    assert (verdict.overlong_count, verdict.overlong_lines) == (1, (2,))
    refused = check_tokens(rows, renderers["chatml"], 64, "refuse")
    assert "1 of 3 rows are longer than 64 tokens (line 2)" in refused.failure


def test_a_data_set_of_overlong_samples_is_refused(renderers, index):
    rows = index([chat("a", "fox " * 500)] * 3)
    assert "every row is longer than 64" in check_tokens(rows, renderers["chatml"], 64).failure
    assert check_tokens(rows, renderers["chatml"], 64, "truncate").is_usable


def test_an_answer_that_is_cut_off_whole_teaches_nothing(renderers, index):
    rows = index([chat("fox " * 500, "b"), chat("fox " * 500, "c")])
    verdict = check_tokens(rows, renderers["chatml"], 64, "truncate")
    assert (verdict.masked_count, verdict.masked_lines) == (2, (1, 2))
    assert "nothing" not in (verdict.failure or "") or not verdict.is_usable
    assert "no row has anything to learn within 64 tokens" in verdict.failure
    assert check_tokens(rows, renderers["chatml"], 64, "truncate", "all").is_usable


def test_a_faulty_line_and_a_refusal_of_the_template_are_named(renderers, index):
    rows = index([chat("a", "b"), chat("a", 5)])
    assert "line 2" in check_tokens(rows, renderers["chatml"], 64).failure
    asked = {"role": "system", "content": "s"}
    refused = {"messages": [asked, *chat("a", "b")["messages"]]}
    verdict = check_tokens(index([chat("a", "b"), refused]), renderers["gemma"], 64)
    assert verdict.fault_lines == (2,)
    assert "System role not supported" in verdict.failure


def test_a_template_that_repeats_its_messages_is_counted_in_full(renderers, index, tmp_path):
    source = BY_NAME["chatml"]
    template = source.template + "{{ messages[1].content * 9 if messages | length > 1 }}"
    folder = type(source)("x", template, specials=source.specials).write(tmp_path / "x")
    rows = index([chat("a", "fox " * 20)] * 3)
    renderer = Renderer.load(folder)
    long = sum(len(renderer.encode(row).ids) > 128 for row in rows)
    assert long == 3
    assert check_tokens(rows, renderer, 128).overlong_count == 3


def test_progress_ends_at_the_last_row(renderers, index):
    seen = []
    rows = index(rows_of(9, 600))
    check_tokens(rows, renderers["chatml"], 64, on_progress=lambda *each: seen.append(each))
    assert seen[-1] == (len(rows), len(rows))
    assert seen == sorted(seen)


def test_a_verdict_can_be_kept_as_json(renderers, index):
    verdict = check_tokens(index([chat("한", "국")]), renderers["chatml"], 64)
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict
    assert verdict.renderer == renderers["chatml"].digest


def test_the_digest_changes_with_the_tokenizer_and_the_template(renderers):
    digests = {each.digest for each in renderers.values()}
    assert len(digests) == len(renderers)
    bare = renderers["plain"]
    assert bare.with_fallback("alpaca").digest != bare.with_fallback("openai").digest

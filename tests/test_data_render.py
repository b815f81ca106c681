import json
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_fixtures import BY_NAME, FAMILIES, PLAIN, THINKING, Family, conversations, says
from tunesmith.data.render import Renderer
from tunesmith.data.rows import Row
from tunesmith.errors import ValidationError
from tunesmith.spec.chat import Message


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family.name: family.write(root / family.name) for family in (*FAMILIES, PLAIN)}


@pytest.fixture(scope="module", params=[family.name for family in FAMILIES])
def case(request, folders):
    """A family, our renderer and transformers' tokenizer of the same folder."""
    folder = folders[request.param]
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    return BY_NAME[request.param], Renderer.load(folder), theirs


def plain(messages):
    return [said.model_dump(exclude_none=True) for said in messages]


def labels(encoded):
    return [token for token, is_label in zip(encoded.ids, encoded.mask, strict=True) if is_label]


def test_the_text_is_what_transformers_renders(case):
    family, ours, theirs = case
    for messages in conversations(family.has_system):
        for count in range(1, len(messages) + 1):
            for asks in (False, True):
                given = messages[:count]
                if given[-1].role == "system":
                    continue
                wanted = theirs.apply_chat_template(
                    plain(given), tokenize=False, add_generation_prompt=asks
                )
                assert ours.text(given, add_generation_prompt=asks) == wanted


def test_the_ids_are_what_transformers_makes_where_pieces_meet_at_a_special_token(case):
    family, ours, theirs = case
    if not family.is_split:
        return
    for messages in conversations(family.has_system):
        whole = theirs.apply_chat_template(plain(messages), return_dict=False)
        assert ours.encode(Row(1, messages=messages)).ids == whole
        asked = theirs.apply_chat_template(
            plain(messages[:-1]), return_dict=False, add_generation_prompt=True
        )
        assert ours.prompt_ids(messages[:-1]) == asked


def test_what_is_trained_on_is_what_serving_feeds_and_then_generates(case):
    family, ours, _ = case
    for messages in conversations(family.has_system):
        encoded = ours.encode(Row(1, messages=messages))
        assert encoded.notice is None
        for at, said in enumerate(messages):
            if said.role != "assistant":
                continue
            fed = ours.prompt_ids(messages[:at])
            assert encoded.ids[: len(fed)] == fed
            assert not encoded.mask[len(fed) - 1]
            rest = encoded.mask[len(fed) :]
            told = encoded.ids[len(fed) :][: rest.index(False) if False in rest else None]
            assert told[-1] in ours.stop_ids
            assert not ours.stop_ids & set(told[:-1])
            assert ours.decode(told).strip() == said.content


def test_only_answers_and_their_ends_are_labels(case):
    family, ours, _ = case
    messages = conversations(family.has_system)[1]
    encoded = ours.encode(Row(1, messages=messages))
    told = ours.decode(labels(encoded))
    for said in messages:
        assert (said.content in told) == (said.role == "assistant")


def test_an_answer_of_weight_nought_is_seen_and_not_learnt(case):
    family, ours, _ = case
    messages = conversations(family.has_system)[1]
    still = messages[1].model_copy(update={"weight": 0})
    quiet = ours.encode(Row(1, messages=(messages[0], still, *messages[2:])))
    loud = ours.encode(Row(1, messages=messages))
    assert quiet.ids == loud.ids
    assert labels(quiet) == labels(loud)[-len(labels(quiet)) :]
    assert messages[1].content not in ours.decode(labels(quiet))


def test_many_rows_at_once_are_encoded_as_one_by_one(case):
    family, ours, _ = case
    rows = [Row(1, messages=each) for each in conversations(family.has_system)]
    rows.append(Row(2, prompt="안녕", completion=" 你好"))
    assert ours.encode_many(rows) == [ours.encode(row) for row in rows]


def test_a_saved_renderer_loads_in_transformers_and_says_the_same(case, tmp_path):
    family, ours, _ = case
    ours.save(tmp_path)
    messages = conversations(family.has_system)[1]
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == ours.template
    assert again.apply_chat_template(plain(messages), tokenize=False) == ours.text(messages)
    assert (tmp_path / "tokenizer.json").read_text() == family.tokenizer
    reloaded = Renderer.load(tmp_path)
    assert reloaded.digest == ours.digest
    assert reloaded.encode(Row(1, messages=messages)) == ours.encode(Row(1, messages=messages))


@given(
    asked=st.text(min_size=1, max_size=40).filter(str.strip),
    told=st.text(min_size=1, max_size=40).filter(str.strip),
)
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back_from_its_ids(folders, asked, told):
    ours = Renderer.load(folders["chatml"])
    messages = (says("user", asked), says("assistant", told))
    encoded = ours.encode(Row(1, messages=messages))
    assert ours.decode(encoded.ids, skip_special=False) == ours.text(messages)
    assert ours.decode(labels(encoded), skip_special=False) == told + "<|im_end|>"


def test_a_character_of_many_tokens_is_never_cut(folders):
    ours = Renderer.load(folders["llama-2"])
    messages = (says("user", "한글"), says("assistant", "👩‍👩‍👧 漢字"))
    encoded = ours.encode(Row(1, messages=messages))
    assert ours.decode(labels(encoded)).strip() == "👩‍👩‍👧 漢字"


def test_an_answer_apart_gets_no_second_space(folders):
    """A sentence-piece tokenizer would put one before every text it is handed."""
    for name in ("llama-2", "llama-2-first", "vicuna"):
        ours = Renderer.load(folders[name])
        messages = (says("user", "The fox"), says("assistant", "jumps over"))
        shown = ours.decode(ours.encode(Row(1, messages=messages)).ids)
        assert "  jumps" not in shown
        assert " jumps over" in shown


def test_marks_of_the_template_are_the_labels(folders):
    ours = Renderer.load(folders["marked"])
    theirs = PreTrainedTokenizerFast.from_pretrained(folders["marked"])
    messages = conversations(True)[2]
    found = theirs.apply_chat_template(
        plain(messages), return_dict=True, return_assistant_tokens_mask=True
    )
    encoded = ours.encode(Row(1, messages=messages))
    assert encoded.ids == found["input_ids"]
    assert encoded.mask == [bool(each) for each in found["assistant_masks"]]


def test_a_mark_inside_the_answer_leaves_the_rest_unlearnt(tmp_path):
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>' }}"
        "{{ 'note: ' }}{% generation %}{{ m.content }}{% endgeneration %}{{ '<|end|>' }}"
        "{% else %}{{ '<|user|>' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    ours = Renderer.load(Family("m", template, specials={"eos_token": "<|end|>"}).write(tmp_path))
    row = Row(1, messages=(says("user", "x"), says("assistant", "jumps")))
    assert ours.decode(labels(ours.encode(row)), skip_special=False) == " jumps<|end|>"


def test_a_template_that_rewrites_history_teaches_the_last_answer_only(tmp_path):
    folder = Family("t", THINKING, specials={"eos_token": "<|im_end|>"}).write(tmp_path)
    ours = Renderer.load(folder)
    messages = (
        says("user", "one"),
        says("assistant", "<think>a</think>\nfirst"),
        says("user", "two"),
        says("assistant", "<think>b</think>\nsecond"),
    )
    encoded = ours.encode(Row(1, messages=messages))
    assert encoded.notice == "last_answer_only"
    fed = ours.prompt_ids(messages[:3])
    assert encoded.ids[: len(fed)] == fed
    told = ours.decode(labels(encoded), skip_special=False)
    assert told == "<think>b</think>\nsecond<|im_end|>"


def test_a_generation_prompt_with_more_than_the_header_is_kept(tmp_path):
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
    )
    ours = Renderer.load(Family("k", template, specials={"eos_token": "<|end|>"}).write(tmp_path))
    messages = (says("user", "one"), says("assistant", "two"))
    encoded = ours.encode(Row(1, messages=messages))
    assert encoded.notice == "generation_prompt_kept"
    assert ours.decode(encoded.ids, False) == "<|user|>one<|end|><|assistant|><think>\ntwo<|end|>"
    assert ours.decode(labels(encoded), False) == "two<|end|>"


def test_an_answer_that_the_template_hides_is_refused_in_a_sentence(tmp_path):
    template = "{% for m in messages %}{{ m.role }}{% endfor %}{{ 'go' }}"
    ours = Renderer.load(Family("h", template).write(tmp_path))
    with pytest.raises(ValidationError, match="does not show the last answer"):
        ours.encode(Row(1, messages=(says("user", "a"), says("assistant", "b"))))


def test_tools_and_their_calls_are_rendered_as_objects(folders):
    ours = Renderer.load(folders["qwen-tools"])
    theirs = PreTrainedTokenizerFast.from_pretrained(folders["qwen-tools"])
    tools = ({"type": "function", "function": {"name": "weather", "description": "날씨"}},)
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "서울"}'}}
    messages = (
        says("user", "Seoul?"),
        Message(role="assistant", tool_calls=(call,)),
        says("tool", "sunny"),
        says("assistant", "It is sunny."),
    )
    asked = plain(messages)
    asked[1]["tool_calls"] = [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "서울"}}}
    ]
    wanted = theirs.apply_chat_template(asked, tools=list(tools), tokenize=False)
    assert ours.text(messages, tools) == wanted
    told = ours.decode(labels(ours.encode(Row(1, messages=messages, tools=tools))), False)
    assert '"arguments": {"city": "서울"}' in told
    assert told.count("<|im_end|>") == 2


def test_a_developer_is_the_system_where_the_template_knows_none(folders):
    ours = Renderer.load(folders["qwen-tools"])
    asked = [says("developer", "Be brief."), says("user", "Hi")]
    assert "<|im_start|>system\nBe brief." in ours.text(asked)


def test_a_raw_pair_is_prompt_completion_and_end(folders):
    ours = Renderer.load(folders["plain"])
    theirs = PreTrainedTokenizerFast.from_pretrained(folders["plain"])
    encoded = ours.encode(Row(1, prompt="안녕 ", completion="你好 😀"))
    told = [*theirs("你好 😀").input_ids, theirs.eos_token_id]
    assert encoded.ids == theirs("안녕 ").input_ids + told
    assert labels(encoded) == told


def test_a_raw_pair_begins_as_the_tokenizer_begins_a_text(folders):
    ours = Renderer.load(folders["llama-3"])
    encoded = ours.encode(Row(1, prompt="The fox", completion=" jumps"))
    assert encoded.ids[0] == ours.bos_token_id
    assert encoded.ids.count(ours.bos_token_id) == 1
    assert ours.encode_text("The fox") == encoded.ids[: encoded.mask.index(True)]


def test_a_document_is_learnt_whole(folders):
    ours = Renderer.load(folders["llama-3"])
    encoded = ours.encode(Row(1, text="안녕 world"))
    assert encoded.ids[0] == ours.bos_token_id
    assert encoded.ids[-1] == ours.eos_token_id
    assert all(encoded.mask[1:])


def test_training_on_all_makes_every_token_a_label(folders):
    ours = Renderer.load(folders["chatml"])
    row = Row(1, messages=conversations(True)[0])
    assert all(ours.encode(row, "all").mask)
    assert ours.encode(row, "all").ids == ours.encode(row).ids


@pytest.mark.parametrize(
    ("format", "source"), [("alpaca", "alpaca"), ("openai", "chatml"), ("sharegpt", "chatml")]
)
def test_a_model_without_a_template_gets_one_of_ours_which_is_saved(
    folders, tmp_path, format, source
):
    bare = Renderer.load(folders["plain"])
    assert bare.template is None
    ours = bare.with_fallback(format)
    assert ours.template_source == source
    messages = conversations(True)[2]
    ours.save(tmp_path)
    again = Renderer.load(tmp_path)
    assert again.template_source == source
    assert again.encode(Row(1, messages=messages)) == ours.encode(Row(1, messages=messages))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(plain(messages), tokenize=False) == ours.text(messages)
    fed = ours.prompt_ids(messages[:2])
    assert ours.encode(Row(1, messages=messages)).ids[: len(fed)] == fed
    assert labels(ours.encode(Row(1, messages=messages)))[-1] in ours.stop_ids


def test_a_model_without_chat_tokens_gets_a_template_of_plain_text(tmp_path):
    tokenizer = BY_NAME["llama-2"].tokenizer
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    ours = Renderer.load(Family("x", "", tokenizer, specials).write(tmp_path)).with_fallback("any")
    assert ours.template_source == "plain"
    text = ours.text((says("user", "Hi"), says("assistant", "Ho")))
    assert text == "<s>User:\nHi\n\nAssistant:\nHo</s>\n\n"


def test_the_template_of_a_model_is_never_replaced(folders):
    ours = Renderer.load(folders["gemma"])
    assert ours.with_fallback("alpaca") is ours
    assert ours.template_source == "model"


def test_end_ids_come_from_every_file_that_names_one(tmp_path):
    folder = BY_NAME["chatml"].write(tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert Renderer.load(folder).stop_ids == {4, 5}


def test_an_end_token_that_only_the_model_config_knows_is_found(tmp_path):
    folder = Family("g", "").write(tmp_path)
    (folder / "config.json").write_text('{"eos_token_id": 5}')
    ours = Renderer.load(folder)
    assert ours.eos_token_id == 5
    assert ours.with_fallback("alpaca").text((says("assistant", "x"),)).count("<|endoftext|>") == 1


def test_a_token_that_only_the_configuration_names_gets_the_id_transformers_gives(tmp_path):
    folder = Family("n", "", specials={"eos_token": "<|fin|>", "pad_token": "<s>"}).write(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    ours = Renderer.load(folder)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.vocabulary_size == len(theirs)


def test_the_template_for_tools_is_used_where_tools_are_given(tmp_path):
    folder = Family("two", "").write(tmp_path)
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": named}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Renderer.load(folder)
    assert ours.text([says("user", "x")]) == "plain"
    assert ours.text([says("user", "x")], [{"name": "f"}]) == "tools"
    ours.save(tmp_path / "saved")
    again = Renderer.load(tmp_path / "saved")
    assert again.text([says("user", "x")], [{"name": "f"}]) == "tools"


def test_a_template_that_writes_the_date_uses_the_clock_it_is_given(tmp_path):
    folder = Family("d", "{{ strftime_now('%d %b %Y') }}").write(tmp_path)
    ours = Renderer.load(folder, now=lambda: datetime(2024, 2, 29))
    assert ours.text([says("user", "x")]) == "29 Feb 2024"


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValidationError, match="has no tokenizer"):
        Renderer.load(tmp_path)
    with pytest.raises(ValidationError, match="no such model folder"):
        Renderer.load(tmp_path / "nowhere")


def test_a_slow_tokenizer_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x05")
    with pytest.raises(ValidationError, match="save_pretrained"):
        Renderer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"version": "1.0"}'),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}'),
        ("config.json", "no"),
    ],
)
def test_broken_tokenizer_files_are_named(tmp_path, name, body):
    folder = BY_NAME["chatml"].write(tmp_path)
    (folder / name).write_text(body)
    with pytest.raises(ValidationError, match=name.split(".")[0]):
        Renderer.load(folder)


def test_a_conversation_without_a_template_is_refused(folders):
    with pytest.raises(ValidationError, match="no chat template"):
        Renderer.load(folders["plain"]).encode(Row(1, messages=conversations(True)[0]))


def test_a_refusal_of_the_template_is_told_in_its_words(folders):
    ours = Renderer.load(folders["gemma"])
    messages = (says("system", "x"), says("user", "y"), says("assistant", "z"))
    with pytest.raises(ValidationError, match="System role not supported"):
        ours.encode(Row(1, messages=messages))


def test_saving_over_itself_changes_nothing(tmp_path):
    folder = BY_NAME["chatml"].write(tmp_path)
    before = (folder / "tokenizer.json").read_bytes()
    Renderer.load(folder).save(folder)
    assert (Path(folder) / "tokenizer.json").read_bytes() == before


def test_the_bound_on_tokens_holds_for_what_normalizers_make_of_a_text(tmp_path):
    whole = json.loads(BY_NAME["chatml"].tokenizer)
    for kind, text in ((None, "漢字 é 😀"), ("NFKC", "\ufdfa" * 5), ("NFD", "\u0390가" * 5)):
        whole["normalizer"] = kind and {"type": kind}
        ours = Renderer.load(Family("b", "", json.dumps(whole)).write(tmp_path))
        assert len(ours.encode_text(text)) <= ours.tokens_per_byte * len(text.encode())


def test_an_end_token_that_is_not_special_still_ends_an_answer(tmp_path):
    whole = json.loads(BY_NAME["chatml"].tokenizer)
    for token in whole["added_tokens"]:
        token["special"] = False
    specials = {"eos_token": "<|im_end|>"}
    config = Family("e", BY_NAME["chatml"].template, json.dumps(whole), specials)
    ours = Renderer.load(config.write(tmp_path))
    encoded = ours.encode(Row(1, messages=(says("user", "a"), says("assistant", "b"))))
    assert labels(encoded)[-1] == ours.eos_token_id
    assert labels(encoded).count(ours.eos_token_id) == 1

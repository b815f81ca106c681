"""The runner and the engine's steps, against transformers' own generation in fp32."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

import infer_fixtures as made
from tunesmith.errors import BadRequestError, ServerError
from tunesmith.infer.engine import Ask, Engine, Stream
from tunesmith.infer.logprobs import PromptScores
from tunesmith.infer.model import ServedModel
from tunesmith.infer.runner import Runner
from tunesmith.infer.scheduler import Limits
from tunesmith.infer.sequence import Sequence
from tunesmith.spec.chat import Sampling

torch.set_num_threads(1)


def engine_of(folder: Path, limits: Limits | None = None) -> Engine:
    limits = limits or Limits(running=12, step_tokens=40, mixed_tokens=16, block_tokens=8)
    return Engine(Runner(ServedModel(folder, precision="fp32")), limits)


def prompts_of(count: int, longest: int, seed: int = 1) -> list[list[int]]:
    random = Random(seed)
    return [
        [random.randrange(3, 360) for _ in range(random.randint(1, longest))] for _ in range(count)
    ]


def expected(net: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = net.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [int(each) for each in out[0, len(prompt) :]]


def add(engine: Engine, prompt: list[int], count: int) -> Sequence:
    stream = Stream([Ask(prompt, Sampling(max_tokens=count, temperature=0))])
    engine.scheduler.add(stream.sequences)
    stream.sequences[0].emit = lambda item: None
    return stream.sequences[0]


def run_all(engine: Engine) -> None:
    while not engine.scheduler.is_idle:
        engine.step()


@pytest.mark.parametrize("kind", list(made.SHAPES))
def test_greedy_ids_equal_generate_for_prompts_that_join_and_leave(
    kind: str, tmp_path: Path
) -> None:
    net = made.network(kind)
    net.save_pretrained(tmp_path)
    engine = engine_of(tmp_path)
    random = Random(2)
    asked, prompts = [], prompts_of(40, 60)
    for prompt in prompts:
        asked.append((prompt, add(engine, prompt, random.randint(1, 14))))
        for _ in range(random.randint(0, 2)):
            engine.step()
    run_all(engine)
    for prompt, sequence in asked:
        assert sequence.generated == expected(net, prompt, sequence.sampling.max_tokens)


def test_greedy_ids_of_200_prompts_in_one_batch_equal_generate(tmp_path: Path) -> None:
    net = made.network("llama")
    net.save_pretrained(tmp_path)
    engine = engine_of(tmp_path, Limits(running=200, step_tokens=1 << 15, blocks=2000))
    sequences = [add(engine, prompt, 6) for prompt in prompts_of(200, 120, seed=8)]
    most = 0
    while not engine.scheduler.is_idle:
        engine.step()
        most = max(most, len(engine.scheduler.running))
    assert most == 200
    for each in sequences:
        assert each.generated == expected(net, each.prompt, 6)


def test_ids_stay_equal_when_the_cache_is_too_small_for_all(tmp_path: Path) -> None:
    net = made.network("llama")
    net.save_pretrained(tmp_path)
    engine = engine_of(tmp_path, Limits(running=8, step_tokens=64, block_tokens=4, blocks=24))
    sequences = [add(engine, prompt, 20) for prompt in prompts_of(8, 30)]
    run_all(engine)
    for each in sequences:
        assert each.generated == expected(net, each.prompt, 20)
    assert engine.scheduler.free_blocks == 24


def test_a_token_of_a_neighbour_never_leaks_into_a_sequence(tmp_path: Path) -> None:
    made.network("llama").save_pretrained(tmp_path)
    alone, crowded = engine_of(tmp_path), engine_of(tmp_path)
    prompt = prompts_of(1, 40)[0]
    lonely, watched = add(alone, prompt, 15), add(crowded, prompt, 15)
    for each in prompts_of(9, 50, seed=5):
        add(crowded, each, 9)
    run_all(alone)
    run_all(crowded)
    assert lonely.generated == watched.generated


@pytest.mark.parametrize("rope", ["linear", "dynamic", "llama3", "yarn"])
def test_scaled_rotary_positions_equal_generate(rope: str, tmp_path: Path) -> None:
    scaling: dict[str, Any] = {"rope_type": rope, "rope_theta": 10000.0, "factor": 2.0}
    if rope == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling |= {"original_max_position_embeddings": 64}
    net = made.network("llama", rope_parameters=scaling, max_position_embeddings=128)
    net.save_pretrained(tmp_path)
    engine = engine_of(tmp_path)
    sequences = [add(engine, prompt, 8) for prompt in prompts_of(6, 60)]
    run_all(engine)
    for each in sequences:
        assert each.generated == expected(net, each.prompt, 8)


def test_a_prompt_that_begins_like_one_before_is_answered_as_if_it_stood_alone(
    tmp_path: Path,
) -> None:
    net = made.network("llama")
    net.save_pretrained(tmp_path)
    engine = engine_of(tmp_path, Limits())
    shared = prompts_of(1, 200, seed=3)[0] * 3
    first = add(engine, [*shared, 5, 6], 4)
    run_all(engine)
    again = [add(engine, [*shared[:cut], *ending], 6) for cut, ending in ((150, [9]), (90, [8, 7]))]
    run_all(engine)
    assert [each.reused for each in (first, *again)] == [0, 150, 90]
    for each in again:
        assert each.generated == expected(net, each.prompt, 6)


def test_whole_numbers_answer_much_as_the_weights_do(tmp_path: Path) -> None:
    net = made.network("qwen3", hidden_size=128, intermediate_size=256, initializer_range=0.05)
    net.save_pretrained(tmp_path)
    model = ServedModel(tmp_path, precision="int8")
    engine = Engine(Runner(model), Limits())
    sequences = [add(engine, prompt, 1) for prompt in prompts_of(40, 30, seed=6)]
    run_all(engine)
    with torch.inference_mode():
        for each in sequences:
            logits = net(torch.tensor([each.prompt])).logits[0, -1]
            spread = logits.std()
            assert logits[each.generated[0]] > logits.max() - 0.3 * spread


@pytest.mark.parametrize("max_bytes", [1, 0])
def test_adapters_that_make_way_come_back_when_they_are_asked_for(
    max_bytes: int, tmp_path: Path
) -> None:
    base = made.model_folder(tmp_path / "base")
    engine = Engine(Runner(ServedModel(base, precision="fp32", adapter_bytes=max_bytes)), Limits())
    adapters = engine.runner.model.adapters
    folders = [made.adapter_folder(tmp_path / str(n), base, n) for n in range(3)]
    for folder in folders:
        adapters.load(folder.name, folder)
    prompt = prompts_of(1, 30)[0]
    for folder in folders:
        sequence = add(engine, prompt, 5)
        sequence.adapter = adapters.key(folder.name)
        run_all(engine)
        assert sequence.generated == expected(merged(base, folder), prompt, 5)
        adapters.sweep(set())


def test_sequences_of_several_adapters_run_in_one_step(tmp_path: Path) -> None:
    base = made.model_folder(tmp_path / "base")
    engine = engine_of(base)
    adapters = engine.runner.model.adapters
    prompts = prompts_of(4, 30)
    wanted: dict[str | None, Any] = {None: made.network("llama")}
    kinds = {"first": {}, "second": {"use_dora": True, "use_rslora": True}}
    for seed, (title, more) in enumerate(kinds.items()):
        folder = made.adapter_folder(tmp_path / title, base, seed, **more)
        adapters.load(title, folder)
        wanted[title] = merged(base, folder)
    sequences = []
    for name in wanted:
        for prompt in prompts:
            sequences.append((name, add(engine, prompt, 10)))
            sequences[-1][1].adapter = name and adapters.key(name)
    run_all(engine)
    for name, each in sequences:
        assert each.generated == expected(wanted[name], each.prompt, 10)
    answers = {name: each.generated for name, each in sequences}
    assert len({tuple(ids) for ids in answers.values()}) == 3


def merged(base: Path, folder: Path) -> Any:
    net = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(net, folder).merge_and_unload()


def test_dropping_adapters_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    base = made.model_folder(tmp_path / "base")
    engine = engine_of(base)
    adapters = engine.runner.model.adapters
    folder = made.adapter_folder(tmp_path / "one", base, 1)
    for _ in range(2):
        adapters.load("one.with/dots", folder)
        adapters.load("two", folder)
        adapters.retire("one.with/dots")
        adapters.sweep(set())
        adapters.retire("two")
        adapters.sweep(set())
    sequence = add(engine, prompts_of(1, 30)[0], 10)
    run_all(engine)
    assert sequence.generated == expected(made.network("llama"), sequence.prompt, 10)


def test_a_dropped_adapter_stays_for_the_sequences_that_use_it(tmp_path: Path) -> None:
    base = made.model_folder(tmp_path / "base")
    engine = engine_of(base)
    adapters = engine.runner.model.adapters
    first = made.adapter_folder(tmp_path / "first", base, 1)
    adapters.load("name", first)
    sequence = add(engine, prompts_of(1, 30)[0], 10)
    sequence.adapter = adapters.key("name")
    engine.step()
    adapters.retire("name")
    adapters.sweep({sequence.adapter})
    adapters.load("name", made.adapter_folder(tmp_path / "second", base, 2))
    run_all(engine)
    assert sequence.generated == expected(merged(base, first), sequence.prompt, 10)


@pytest.mark.parametrize("fault", ["other base", "pickle", "no file", "not LoRA", "torn"])
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(
    fault: str, tmp_path: Path
) -> None:
    base = made.model_folder(tmp_path / "base")
    other = made.model_folder(tmp_path / "other", hidden_size=64)
    folder = made.adapter_folder(tmp_path / "adapter", other if fault == "other base" else base, 1)
    weights = folder / "adapter_model.safetensors"
    if fault == "pickle":
        torch.save({}, folder / "adapter_model.bin")
    if fault in ("pickle", "no file"):
        weights.unlink()
    if fault == "torn":
        weights.write_bytes(weights.read_bytes()[:-50])
    if fault == "not LoRA":
        (folder / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    engine = engine_of(base)
    with pytest.raises(BadRequestError):
        engine.runner.model.adapters.load("broken", folder)
    sequence = add(engine, prompts_of(1, 30)[0], 6)
    run_all(engine)
    assert sequence.generated == expected(made.network("llama"), sequence.prompt, 6)


def test_a_model_with_a_state_outside_its_cache_is_refused(tmp_path: Path) -> None:
    config = transformers.MambaConfig(
        vocab_size=100, hidden_size=16, state_size=4, num_hidden_layers=1
    )
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(BadRequestError, match="cannot"):
        ServedModel(tmp_path)


def test_a_pickled_model_is_refused(tmp_path: Path) -> None:
    net = made.network("llama")
    net.config.save_pretrained(tmp_path)
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(BadRequestError, match="safetensors"):
        ServedModel(tmp_path)


def test_broken_weights_end_a_sequence_with_an_error_and_not_with_nonsense(
    tmp_path: Path,
) -> None:
    net = made.network("llama")
    with torch.no_grad():
        net.lm_head.weight.fill_(float("nan"))
    net.save_pretrained(tmp_path)
    engine = engine_of(tmp_path)
    add(engine, [5, 6, 7], 4)
    engine.step()
    assert engine.scheduler.is_idle
    assert [type(each) for _, each in engine._outbox] == [ServerError]


class Kept:
    """Keeps the rows that it is given by their positions."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self.rows: dict[int, torch.Tensor] = {}

    def read(self, start: int, rows: torch.Tensor) -> None:
        self.rows |= dict(enumerate(rows, start))


def test_a_prompt_is_as_likely_as_transformers_finds_it(tmp_path: Path) -> None:
    engine = engine_of(made.model_folder(tmp_path))
    prompt = prompts_of(1, 200, seed=4)[0]
    scores = PromptScores(prompt, 2)
    stream = Stream([Ask(prompt, Sampling(max_tokens=1), read=lambda: scores)])
    engine.scheduler.add(stream.sequences)
    run_all(engine)
    logprobs = made.network("llama")(torch.tensor([prompt])).logits[0].log_softmax(-1)
    expected = logprobs[range(len(prompt) - 1), prompt[1:]]
    own = [each.logprob for each in scores.scores if each]
    torch.testing.assert_close(torch.tensor(own), expected, atol=1e-4, rtol=1e-4)
    best = [each.top[0][0] for each in scores.scores if each]
    assert best == logprobs[:-1].argmax(-1).tolist()
    scores.read(0, logprobs)
    assert len(scores.scores) == len(prompt)


@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_a_reader_is_given_every_row_of_its_prompt(tmp_path: Path, kind: str) -> None:
    engine = engine_of(made.model_folder(tmp_path))
    prompts = prompts_of(3, 90)
    readers = [Kept(kind) for _ in prompts]
    given = iter(readers)
    sampling = Sampling(max_tokens=0)
    asks = [Ask(prompt, sampling, read=lambda: next(given)) for prompt in prompts]
    stream = Stream(asks)
    engine.scheduler.add(stream.sequences)
    add(engine, prompts[0], 5)
    run_all(engine)
    net = made.network("llama")
    for prompt, reader in zip(prompts, readers, strict=True):
        out = net(torch.tensor([prompt]), output_hidden_states=True)
        wanted = out.logits[0] if kind == "logits" else out.hidden_states[-1][0]
        own = torch.stack([reader.rows[at] for at in range(len(prompt))])
        torch.testing.assert_close(own, wanted, atol=1e-4, rtol=1e-4)

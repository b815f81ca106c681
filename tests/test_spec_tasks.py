"""Configurations in the tasks' words: what they mean, and what is said of those that are wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from task_files import LORA, RL, SFT
from tunesmith.errors import ValidationError
from tunesmith.spec import yaml_guard
from tunesmith.spec.places import at
from tunesmith.spec.rewards import ExactMatch, RewardModel, TrainedModel
from tunesmith.spec.tasks.keys import KEYS
from tunesmith.spec.tasks.metrics import contract_metrics
from tunesmith.spec.tasks.overrides import overridden
from tunesmith.spec.tasks.table import table, table_defaults
from tunesmith.spec.tasks.tasks import TASKS
from tunesmith.spec.train import Grpo, Kto, Lora, Ppo, Preference, Reward, Sft
from tunesmith.spec.written import interpret, parse

ROWS = "model_name: m\ndataset: d\n"
RL_ROWS = f"task_type: rl\n{ROWS}"


def faults(text: str) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        parse(text)
    return [f"{fault['loc']} {fault['msg']}" for fault in caught.value.details]


def test_the_contracts_sft_file_means_what_it_says() -> None:
    found = parse(SFT)
    assert isinstance(found.spec, Sft)
    assert found.spec.lora is None
    assert (found.spec.model, found.spec.dataset) == ("qwen-7b", "datasets/sft_dataset.jsonl")
    assert (found.spec.max_length, found.spec.optim.batch_size) == (2048, 4)
    assert (found.spec.optim.learning_rate, found.spec.optim.epochs) == (2e-5, 3)
    assert (found.task_type, found.folder) == ("sft", "model_final")
    assert found.name("model") == "model_name"


def test_the_contracts_lora_file_means_what_it_says() -> None:
    found = parse(LORA)
    assert isinstance(found.spec, Sft)
    assert found.spec.lora == Lora(rank=8, alpha=16, dropout=0.05)
    assert (found.spec.optim.batch_size, found.spec.optim.gradient_accumulation_steps) == (64, 4)
    assert found.spec.run.quantization == "8bit"
    assert found.name("model") == "base_model"


@pytest.mark.parametrize(
    ("algorithm", "kind"),
    [("", Preference), ("algorithm: kto\n", Kto), ("algorithm: reward", Reward)],
)
def test_rl_without_an_algorithm_is_dpo(algorithm: str, kind: type) -> None:
    found = parse(RL_ROWS + algorithm).spec
    assert type(found) is kind
    assert found.lora is None
    assert found.optim.epochs == 1


SPELLED = {
    "optim.learning_rate": 3e-4,
    "optim.epochs": 2.0,
    "optim.batch_size": 6,
    "optim.gradient_accumulation_steps": 3,
    "optim.seed": 5,
    "run.save_steps": 7,
    "run.logging_steps": 8,
    "max_length": 99,
    "sequence_length": 99,
    "eval_dataset": "e",
    "model": "a",
    "dataset": "b",
}
"""What every task accepts, under any name that one of them gives it."""


@pytest.mark.parametrize("task", ["sft", "rl", "lora", "pretrain"])
@pytest.mark.parametrize("place", SPELLED)
def test_every_spelling_means_the_same_in_every_task(task: str, place: str) -> None:
    known = {key.place: key for key in TASKS[task].reads() if not key.is_shorthand}
    if place in {"max_length", "sequence_length"}:
        place = "sequence_length" if task == "pretrain" else "max_length"
    for word in known[place].spellings:
        inputs = {"model": "m", "dataset": "d"} | {word: SPELLED[place]}
        inputs = {name: value for name, value in inputs.items() if name == word or name != place}
        text = json.dumps({"task_type": task} | inputs)
        assert at(parse(text).spec.model_dump(), place) == SPELLED[place], word


def test_the_names_of_one_task_are_known_in_the_others() -> None:
    for task in TASKS.values():
        words = {word for key in task.reads() for word in key.spellings}
        assert {
            *("max_seq_length", "sequence_length", "model_name", "base_model", "policy_model"),
            *("train_batch_size", "per_device_train_batch_size", "global_batch_size"),
            *("learning_rate", "num_train_epochs", "epochs", "gradient_accumulation_steps"),
            *("seed", "save_steps", "logging_steps", "eval_dataset", "warmup_ratio"),
        } <= words


def test_no_spelling_means_two_things_in_one_task() -> None:
    for task in TASKS.values():
        for algorithm in task.algorithms:
            words = [word for key in task.reads(algorithm) for word in key.spellings]
            assert len(words) == len(set(words)), (task.name, algorithm)


def test_every_key_is_read_by_some_task() -> None:
    read = {id(key) for task in TASKS.values() for key in task.reads()}
    assert [key.name for key in KEYS if id(key) not in read] == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            SFT + "learning_rat: 1",
            ["line', 8, 'learning_rat'] unknown key; did you mean 'learning_rate'?"],
        ),
        (SFT + "lr: 1", ["line', 8, 'lr'] says again what learning_rate says"]),
        (
            SFT + "\nlora_r: 8",
            ["line', 9, 'lora_r'] means nothing to task_type sft: it trains every"],
        ),
        (SFT + "use_lora: true", ["write task_type: lora"]),
        (SFT + "algorithm: ppo", ["'algorithm'] means nothing to task_type sft; rl has"]),
        (SFT + "beta: 0.1", ["'beta'] means nothing to task_type sft; it is for rl"]),
        (SFT.replace("2e-5", "fast"), ["line', 6, 'learning_rate'] has to be a valid number"]),
        (SFT.replace("2e-5", "-1"), ["line', 6, 'learning_rate'] has to be greater than 0"]),
        (SFT.replace("2048", "[1]"), ["line', 4, 'max_seq_length'] has to be a valid integer"]),
        ("task_type: sft", ["['model_name'] is missing", "['dataset'] is missing"]),
        ("task_type: stf", ["line', 1, 'task_type'] has to be one of sft, rl, lora, pretrain"]),
        ("task_type: [1]", ["'task_type'] has to be one of"]),
        (RL_ROWS + "algorithm: ktoo", ["line', 4, 'algorithm'] has to be one of", "'kto'?"]),
        (RL_ROWS + "algoritm: ppo", ["'algoritm'] unknown key; did you mean 'algorithm'?"]),
        (RL_ROWS + "gamma: 1", ["'gamma'] means nothing to this algorithm; it is for simpo"]),
        (RL_ROWS + "algorithm: kto\nbatch: 1", ["step's answers: batch has to be 2 or more"]),
        (RL_ROWS + "loss: ipo\nlabel_smoothing: 0.1", ["leave it 0"]),
        (RL_ROWS + "use_4bit: true\nuse_8bit: true", ["'use_8bit'] says again what use_4bit says"]),
        (RL_ROWS + "use_lora: false\nlora_r: 4", ["'lora_r'] means nothing with use_lora: false"]),
        (LORA + "use_lora: false", ["task_type: sft is the one"]),
        (LORA + "peft_target_modules: ['a b']", ["line', 10, 'peft_target_modules']"]),
        (LORA + "bnb_4bit_quant_type: fp4", ["write nf4"]),
        (LORA + "bf16: maybe", ["'bf16'] write true or false"]),
        (LORA + "output_dir: [1]", ["'output_dir'] has to be the path of a folder"]),
        (
            LORA + "global_batch_size: 100",
            ["100 is not batch × devices × accumulation, 64 × 1 × 4"],
        ),
        (LORA + "method: dpo", ["'method'] task_type is for a task's keys"]),
        (LORA + "lora_r: 8", []),
        (
            "model_name: m",
            ["unknown field 'model_name'; did you mean 'model'? (a task's keys want"],
        ),
        (
            "method: dpo\nmodel: m\ndataset: d\noptim:\n  learning_rat: 1",
            ["line', 5] unknown field"],
        ),
    ],
)
def test_a_fault_names_its_line_its_key_and_what_is_right(text: str, told: list[str]) -> None:
    found = faults(text)
    for part in told:
        assert any(part in fault for fault in found), found


def test_all_faults_are_told_at_once_in_the_order_of_lines() -> None:
    text = SFT + "learning_rat: 1\nbatch: 2\nseed: x\n"
    with pytest.raises(ValidationError, match="has 3 faults") as caught:
        parse(text, "a.yaml")
    assert [fault["loc"][1] for fault in caught.value.details] == [8, 9, 10]
    with pytest.raises(ValidationError, match=r"^a\.yaml: line 8, seed: has to be a valid integer"):
        parse(SFT + "seed: x", "a.yaml")


@pytest.mark.parametrize(
    ("line", "place", "value"),
    [
        ("lr: 1E-3", "optim.learning_rate", 1e-3),
        ("lr: '2e-5'", "optim.learning_rate", 2e-5),
        ("max_steps: -1", "optim.max_steps", None),
        ("eval_dataset:", "eval_dataset", None),
        ("bf16: true", "run.precision", "bf16"),
        ("bf16: false", "run.precision", "auto"),
        ("mixed_precision: no", "run.precision", "fp32"),
        ("gradient_checkpointing: true", "run.gradient_checkpointing", "on"),
        ("gradient_checkpointing: auto", "run.gradient_checkpointing", "auto"),
        ("lr_scheduler_type: constant_with_warmup", "optim.scheduler", "constant"),
        ("target_modules: q_proj, v_proj", "lora.targets", ("q_proj", "v_proj")),
        ("target_modules: [q_proj]", "lora.targets", ("q_proj",)),
        ("target_modules: all_linear", "lora.targets", "all-linear"),
        ("load_in_4bit: yes", "run.quantization", "4bit"),
        ("load_in_4bit: false\nload_in_8bit: true", "run.quantization", "8bit"),
        ("bnb_4bit_quant_type: nf4\nuse_4bit: true", "run.quantization", "4bit"),
        ("train_on_inputs: true", "train_on", "all"),
        ("use_lora: true", "lora.rank", 8),
        ("metric_for_best_model: eval/rougeL", "run.best.metric", "eval_rougeL"),
        ("early_stopping_patience: 3", "run.best.patience", 3),
        ("load_best_model_at_end: true", "run.best.keep", True),
        ("global_batch_size: 12", "optim.batch_size", 12),
        ("batch: 4\nglobal_batch_size: 12", "optim.gradient_accumulation_steps", 3),
        ("accumulation: 3\nglobal_batch_size: 12", "optim.batch_size", 4),
        ("devices: 2\nglobal_batch_size: 12", "optim.batch_size", 6),
    ],
)
def test_a_value_is_read_as_its_writer_meant_it(line: str, place: str, value: Any) -> None:
    found = parse(f"task_type: lora\n{ROWS}{line}").spec
    assert at(found.model_dump(), place) == value


def test_reinforcement_is_asked_for_in_the_contracts_words() -> None:
    found = parse(
        f"{RL_ROWS}algorithm: grpo\nrollout_batch_size: 16\nupdate_epochs: 4\nkl_target: 0.1\n"
        "epsilon: 0.3\nscale_rewards: false\nrewards: exact_match\n"
    ).spec
    assert isinstance(found, Grpo)
    assert (found.rollout_batch_size, found.update_epochs, found.kl_target) == (16, 4, 0.1)
    assert (found.epsilon, found.scale_rewards) == (0.3, "none")
    assert found.rewards == (ExactMatch(),)
    [fault] = faults(f"{RL_ROWS}algorithm: grpo\nrewards: exact_mach\n")
    assert "'line', 5, 'rewards'" in fault
    [fault] = faults(f"{RL_ROWS}kl_target: 0.1\n")
    assert "means nothing to this algorithm; it is for grpo, rloo and ppo" in fault


def test_the_contracts_rl_file_is_rewarded_by_its_model_or_by_none_yet() -> None:
    found = parse(RL)
    assert isinstance(found.spec, Ppo)
    assert found.spec.rewards == (RewardModel(model="qwen-7b-rm"),)
    assert found.name("rewards") == "reward_model"
    without = parse("".join(one for one in RL.splitlines(True) if "reward_model" not in one)).spec
    assert without.rewards == (TrainedModel(),)  # type: ignore[union-attr]
    assert "'line', 9" in faults(RL + "rewards: exact_match")[0]
    assert "name of a reward model" in faults(RL.replace("qwen-7b-rm", "[1]"))[0]


@pytest.mark.parametrize(
    "url",
    ["https://", "http://a:b@c/", "http://a/#b", "http://[::1", "http://a:99999/", "http://a b/"],
)
def test_a_reward_service_has_a_plain_address(url: str) -> None:
    [fault] = faults(RL.replace("qwen-7b-rm", f"'{url}'"))
    assert "has to be a plain address" in fault


def test_a_twentieth_is_held_out_unless_an_eval_dataset_is_given() -> None:
    for task in TASKS:
        text = f"task_type: {task}\n{ROWS}"
        assert parse(text).spec.holdout == 0.05
        assert parse(text + "val_size: 0").spec.holdout == 0
        found = parse(text + "eval_dataset: e").spec
        assert (found.holdout, found.eval_dataset) == (0, "e")
    [fault] = faults(SFT + "eval_dataset: e\nholdout: 0.1\n")
    assert "exclude each other" in fault


def test_pretraining_keeps_its_own_pace_where_some_of_it_is_given() -> None:
    text = "method: pretrain\nmodel: m\ndataset: d\noptim: {max_steps: 5}\n"
    optim = parse(text).spec.optim
    assert (optim.learning_rate, optim.epochs, optim.batch_size) == (1e-3, 1, 8)


def test_a_sweep_has_the_keys_spellings_inside() -> None:
    text = f"task_type: lora\n{ROWS}sweep: {{grid: {{lora_r: [2, 4], lr: [1e-3, 2e-5]}}}}\n"
    found = parse(text).spec
    assert isinstance(found, Sft)
    trials = [(one.lora, one.optim.learning_rate) for one in found.configurations().values()]
    assert trials == [(Lora(rank=rank), lr) for rank in (2, 4) for lr in (1e-3, 2e-5)]
    assert "say one thing" in faults(text.replace("lr:", "rank:"))[0]
    assert "write task_type: lora" in faults(text.replace("lora\n", "sft\n", 1))[0]
    assert "it needs lora" in faults(text.replace("lora\n", "rl\n", 1))[0]


def test_adapters_are_trained_in_rl_once_they_are_spoken_of() -> None:
    for line in ("use_lora: true", "lora_r: 8", "use_8bit: true"):
        assert isinstance(parse(f"{RL_ROWS}{line}").spec.lora, Lora), line  # type: ignore[union-attr]
    for line in ("use_lora: false", "use_8bit: false"):
        assert parse(f"{RL_ROWS}{line}").spec.lora is None, line  # type: ignore[union-attr]


def test_what_was_asked_is_told_in_the_first_names_and_means_the_same() -> None:
    for text in (SFT, LORA, RL_ROWS + "algorithm: simpo\noutput_path: out/x\nbatch: 3\n"):
        found = parse(text)
        again = parse(json.dumps(found.asked))
        assert (again.spec, again.asked) == (found.spec, found.asked)
        assert {"task_type", "model_name", "learning_rate", "seed"} <= found.asked.keys()
    assert found.output_dir == "out/x"


def test_a_file_with_neither_word_is_a_specification_of_sft() -> None:
    found = parse("model: m\ndataset: d\nlora: null")
    assert isinstance(found.spec, Sft)
    assert (found.task_type, found.folder, found.name("model")) == (None, "", "model")


@given(
    st.dictionaries(
        st.sampled_from([word for key in KEYS for word in key.spellings]) | st.text(max_size=9),
        st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.lists(st.integers()),
        max_size=6,
    ),
    st.sampled_from([*TASKS, "x"]),
)
@settings(max_examples=150, deadline=None)
def test_any_mapping_is_a_configuration_or_a_refusal(values: dict[str, Any], task: str) -> None:
    try:
        parse(json.dumps({"model": "m", "dataset": "d"} | values | {"task_type": task}))
    except ValidationError:
        return


def test_the_documentation_has_the_keys_as_they_are_read() -> None:
    """`tunesmith train --tasks` prints the table for docs/tasks.md."""
    assert table() in (Path(__file__).parents[1] / "docs" / "tasks.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("task", "algorithm"), [(task, name) for task in TASKS for name in TASKS[task].algorithms]
)
def test_the_defaults_that_are_documented_are_those_that_hold(task: str, algorithm: str) -> None:
    chosen = f"algorithm: {algorithm}\n" if algorithm else ""
    rewards = "rewards: exact_match\n" if algorithm in {"grpo", "rloo", "ppo"} else ""
    held = parse(f"task_type: {task}\n{ROWS}{chosen}{rewards}max_grad_norm: 1").spec.model_dump()
    told = table_defaults(TASKS[task], algorithm)
    for key in TASKS[task].reads(algorithm):
        if not key.is_shorthand and not key.place.startswith(
            ("lora", "model", "dataset", "rewards")
        ):
            assert at(told, key.place) == at(held, key.place), key.name


def test_what_is_said_anew_takes_the_place_of_its_like() -> None:
    said = {"lr": 1e-3, "batch_size": 2, "seed": 7}
    found = interpret(overridden(yaml_guard.read(SFT), said)).spec
    assert (found.optim.learning_rate, found.optim.batch_size, found.optim.seed) == (1e-3, 2, 7)
    assert found.optim.epochs == 3
    with pytest.raises(ValidationError, match="unknown key; did you mean 'lr'") as caught:
        interpret(overridden(yaml_guard.read(SFT), {"lrr": 1}))
    assert caught.value.details[0]["loc"] == ["lrr"]


def test_metrics_have_the_contracts_names() -> None:
    step = {
        "loss": 1.0,
        "grad_norm": None,
        "metrics": {"reward/mean": 0.5, "kl_divergence": 2, "rewards/margins": 1},
    }
    assert contract_metrics("step", step) == {
        "train/loss": 1.0,
        "reward/mean": 0.5,
        "kl_divergence": 2.0,
        "train/rewards/margins": 1.0,
    }
    told = {"metrics": {"eval_loss": 1.5, "eval_rougeL": 0.25}}
    assert contract_metrics("evaluated", told) == {"eval/loss": 1.5, "eval/rougeL": 0.25}
    assert contract_metrics("queued", {}) == {}

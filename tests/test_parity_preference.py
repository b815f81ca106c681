"""The first ten steps of each preference method against TRL's own trainer: same ids, same order."""

import os
import warnings
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from train_fixtures import (
    Place,
    judged,
    make_model,
    preferences,
    run_here,
    tuned,
    write_rows,
)
from tunesmith.data.render import Renderer
from tunesmith.data.rows import RowIndex
from tunesmith.nn.language import open_model
from tunesmith.spec.pipe import Inputs
from tunesmith.spec.train import Cpo, Kto, Lora, Orpo, Preference, Simpo
from tunesmith.train.batches import Shuffle

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
STEPS, BATCH, RATE, SEED = 10, 4, 1e-3, 42
COUNT = STEPS * BATCH
CLOSE = 1e-4
SUMMED = 3e-5
"""Absolute: what rounding leaves of differences between sums of log-probabilities."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("parity")
    model = make_model(folder / "model")
    return Place(folder, model, write_rows(folder / "pairs.jsonl", preferences(COUNT)))


def common(place, **over: Any) -> dict[str, Any]:
    return {
        "output_dir": str(place.folder / "trl"),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "lr_scheduler_type": "cosine",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **over,
    }


def encoded(place, dataset, parts):
    """Ids of prompt and answers, in the order that a job takes them."""
    renderer = Renderer.load(place.model)
    rows = list(RowIndex.open(dataset))
    found = []
    for place_ in Shuffle(len(rows) * parts, SEED, 0):
        row = rows[place_ // parts]
        told = [row] if row.rejected is None else [row, row.rejected]
        ids = [renderer.encode(one) for one in told]
        start = ids[0].mask.index(True)
        found.append((row, ids[0].ids[:start], [one.ids[start:] for one in ids]))
    return found


def logged(trainer) -> list[dict[str, float]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def compare(events, theirs, names):
    ours = events.of("step")
    assert len(ours) == len(theirs) == STEPS
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=CLOSE, abs=1e-6)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=CLOSE)
        for name in names:
            assert (name in mine["metrics"]) == (name in other), name
            if name in other:
                assert mine["metrics"][name] == pytest.approx(other[name], rel=CLOSE, abs=SUMMED), (
                    name
                )
    assert ours[-1]["loss"] != ours[0]["loss"]


REWARDS = [f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")]
LOGPS = ["logps/chosen", "logps/rejected"]


def base(place):
    return AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32)


def tokenizer(place):
    return AutoTokenizer.from_pretrained(place.model)


def in_order(rows):
    return Dataset.from_list([rows[number] for number in Shuffle(len(rows), SEED, 0)])


def is_ours(trainer, place) -> bool:
    """Whether TRL's tokens are ours."""
    found = encoded(place, place.dataset, 1)
    theirs = [
        (row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]])
        for row in trainer.train_dataset
    ]
    return theirs == [(prompt, answers) for _, prompt, answers in found]


DPO = {
    "sigmoid": ({}, {"loss_type": ["sigmoid"]}),
    "by token": ({"length_normalised": True}, {"loss_type": ["sigmoid_norm"]}),
    "ipo": ({"loss": "ipo"}, {"loss_type": ["ipo"]}),
    "hinge": ({"loss": "hinge"}, {"loss_type": ["hinge"]}),
    "robust": (
        {"loss": "robust", "label_smoothing": 0.1},
        {"loss_type": ["robust"], "label_smoothing": 0.1},
    ),
    "exo": (
        {"loss": "exo_pair", "label_smoothing": 0.01},
        {"loss_type": ["exo_pair"], "label_smoothing": 0.01},
    ),
    "nca": ({"loss": "nca_pair"}, {"loss_type": ["nca_pair"]}),
    "sppo": ({"loss": "sppo_hard"}, {"loss_type": ["sppo_hard"]}),
    "apo zero": ({"loss": "apo_zero"}, {"loss_type": ["apo_zero"]}),
    "apo down": ({"loss": "apo_down"}, {"loss_type": ["apo_down"]}),
}


@pytest.mark.parametrize("name", DPO)
def test_dpo_is_trls(place, name):
    from trl import DPOConfig, DPOTrainer

    ours, theirs = DPO[name]
    beta = 0.5
    trainer = DPOTrainer(
        model=str(place.model),
        args=DPOConfig(
            **common(place, beta=beta, model_init_kwargs={"dtype": "float32"}, **theirs)
        ),
        train_dataset=in_order(preferences(COUNT)),
        processing_class=tokenizer(place),
    )
    assert is_ours(trainer, place)
    events = run_here(place.task(tuned(Preference, beta=beta, **ours)))
    compare(events, logged(trainer), REWARDS + LOGPS)


def test_dpo_with_smoothed_labels_is_trls_unsorted_transport_of_one_pair(place):
    """TRL's `aot` is conservative DPO where there is one pair a pass: nothing to sort."""
    from trl import DPOConfig, DPOTrainer

    args = common(place, per_device_train_batch_size=1, gradient_accumulation_steps=BATCH)
    trainer = DPOTrainer(
        model=str(place.model),
        args=DPOConfig(
            **args,
            loss_type=["aot"],
            label_smoothing=0.2,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=in_order(preferences(COUNT)),
        processing_class=tokenizer(place),
    )
    assert is_ours(trainer, place)
    events = run_here(place.task(tuned(Preference, label_smoothing=0.2)))
    compare(events, logged(trainer), REWARDS + LOGPS)


def test_dpo_of_an_adapter_is_trls(place):
    from trl import DPOConfig, DPOTrainer

    lora = Lora(rank=4, alpha=64)
    config = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(base(place), config)
    ours = open_model(str(place.model), lora=lora, seed=SEED).weights()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(ours[name.replace(".default", "")])
    trainer = DPOTrainer(
        model=peft,
        args=DPOConfig(**common(place)),
        train_dataset=in_order(preferences(COUNT)),
        processing_class=tokenizer(place),
    )
    assert is_ours(trainer, place)
    events = run_here(place.task(tuned(Preference, lora=lora)))
    compare(events, logged(trainer), REWARDS + LOGPS)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.5)])
def test_kto_is_trls(place, weights):
    from trl import KTOConfig, KTOTrainer

    dataset = write_rows(place.folder / "judged.jsonl", judged(COUNT))
    found = encoded(place, dataset, 1)
    desirable, undesirable = weights
    trainer = KTOTrainer(
        model=str(place.model),
        args=KTOConfig(
            **common(place, model_init_kwargs={"dtype": "float32"}),
            desirable_weight=desirable,
            undesirable_weight=undesirable,
        ),
        train_dataset=in_order(judged(COUNT)),
        processing_class=tokenizer(place),
    )
    assert [row["completion_ids"] for row in trainer.train_dataset] == [one[2][0] for one in found]
    spec = tuned(Kto, desirable_weight=desirable, undesirable_weight=undesirable)
    inputs = Inputs(model=str(place.model), dataset=str(dataset))
    names = [*LOGPS, "rewards/chosen", "rewards/rejected", "rewards/margins", "kl"]
    compare(run_here(place.task(spec, inputs=inputs)), logged(trainer), names)


def sequences(place):
    """As TRL's experimental trainers want them tokenised."""
    found = []
    for _, prompt, answers in encoded(place, place.dataset, 1):
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for name, answer in zip(("chosen", "rejected"), answers, strict=True):
            ids = prompt + answer
            row[f"{name}_input_ids"] = ids
            row[f"{name}_attention_mask"] = [1] * len(ids)
            row[f"{name}_labels"] = [-100] * len(prompt) + answer
        found.append(row)
    return found


def of_ids(trainer: type, place) -> type:
    """The trainer, on our ids in place of its own."""
    rows = iter(sequences(place))

    class Given(trainer):
        def tokenize_row(self, feature, model=None):
            return next(rows)

    return Given


def texts(place):
    rows = [{"prompt": "a", "chosen": f"b{i}", "rejected": "c"} for i in range(COUNT)]
    return Dataset.from_list(rows)


def test_orpo_is_trls(place):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer = of_ids(ORPOTrainer, place)(
        model=base(place),
        args=ORPOConfig(**common(place), beta=0.3),
        train_dataset=texts(place),
        processing_class=tokenizer(place),
    )
    events = run_here(place.task(tuned(Orpo, beta=0.3)))
    names = [*REWARDS, *LOGPS, "nll_loss", "log_odds_ratio", "log_odds_chosen"]
    compare(events, logged(trainer), names)


CPO = {
    "cpo": (Cpo, {}, {}),
    "cpo smoothed": (Cpo, {"label_smoothing": 0.1, "alpha": 0.5}, {"cpo_alpha": 0.5}),
    "cpo hinge": (Cpo, {"loss": "hinge"}, {"loss_type": "hinge"}),
    "simpo": (Simpo, {"beta": 2.0, "gamma": 0.7}, {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "cpo and simpo": (Simpo, {"alpha": 1.0, "gamma": 0.5}, {"loss_type": "simpo", "beta": 2.0}),
}


@pytest.mark.parametrize("name", CPO)
def test_cpo_and_simpo_are_trls(place, name):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    kind, ours, theirs = CPO[name]
    renamed = {"gamma": "simpo_gamma", "beta": "beta", "label_smoothing": "label_smoothing"}
    theirs = {renamed[key]: value for key, value in ours.items() if key in renamed} | theirs
    trainer = of_ids(CPOTrainer, place)(
        model=base(place),
        args=CPOConfig(**common(place), **theirs),
        train_dataset=texts(place),
        processing_class=tokenizer(place),
    )
    events, likelihood = run_here(place.task(tuned(kind, **ours))), ["nll_loss"]
    compare(events, logged(trainer), [*REWARDS, *LOGPS, *(likelihood if name != "simpo" else [])])

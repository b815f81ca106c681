"""Reward models: TRL's first steps, what is left behind, and what cannot be done with one."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GemmaConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from test_parity_preference import common, compare, encoded, logged
from train_fixtures import (
    WORDS,
    Place,
    make_model,
    pairs,
    preferences,
    run_here,
    sft,
    tuned,
    write_rows,
)
from tunesmith.errors import FailureClass, JobFailure
from tunesmith.infer.model import ServedModel
from tunesmith.nn.forks import flatten_ends
from tunesmith.nn.language import open_scorer
from tunesmith.nn.opening import Opening
from tunesmith.spec.pipe import Inputs
from tunesmith.spec.train import Lora, Reward, Run
from tunesmith.train.pairs import fork_of

COUNT = 40
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("reward")
    rows = [{**row, "margin": i % 3 / 2} for i, row in enumerate(preferences(COUNT))]
    return Place(folder, make_model(folder / "model"), write_rows(folder / "pairs.jsonl", rows))


@pytest.fixture(scope="module")
def started(place):
    """A reward model that both sides start from."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(place.model, num_labels=1)
    folder = place.folder / "started"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(place.model).save_pretrained(folder)
    return folder


def columns(place):
    found = encoded(place, place.dataset, 1)
    return Dataset.from_dict(
        {
            "chosen_ids": [prompt + answers[0] for _, prompt, answers in found],
            "rejected_ids": [prompt + answers[1] for _, prompt, answers in found],
            "margin": [row.margin for row, *_ in found],
        }
    )


@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("center", [0.0, 0.01])
def test_reward_training_is_trls(place, started, center, is_lora):
    from trl import RewardConfig, RewardTrainer

    lora = Lora(rank=4, alpha=64) if is_lora else None
    model = AutoModelForSequenceClassification.from_pretrained(started, num_labels=1)
    if is_lora:
        config = LoraConfig(
            r=4,
            lora_alpha=64,
            target_modules=LAYERS,
            task_type="SEQ_CLS",
            modules_to_save=["score"],
        )
        model = get_peft_model(model, config)
        ours = open_scorer(str(started), Opening(lora=lora, has_dropout=False)).weights()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    plain = name.replace(".modules_to_save.default", "").replace(".default", "")
                    parameter.copy_(ours[plain])
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**common(place), center_rewards_coefficient=center or None),
        train_dataset=columns(place),
        processing_class=AutoTokenizer.from_pretrained(started),
    )
    inputs = Inputs(model=str(started), dataset=str(place.dataset))
    events = run_here(place.task(tuned(Reward, lora=lora, center=center), inputs=inputs))
    compare(events, logged(trainer), ["accuracy", "margin", "mean_reward"])


def scores_of(model, place):
    """Of whole sequences, one at a time, by plain transformers."""
    model.eval()
    with torch.no_grad():
        return [
            model(input_ids=torch.tensor([prompt + answer])).logits.item()
            for _, prompt, answers in encoded(place, place.dataset, 1)[:6]
            for answer in answers
        ]


def our_scores(folder, place, lora=None):
    from tunesmith.data.render import Renderer
    from tunesmith.data.rows import RowIndex
    from tunesmith.train.batches import Shuffle

    model = open_scorer(str(folder), Opening(lora=lora, has_dropout=False))
    renderer, rows = Renderer.load(place.model), list(RowIndex.open(place.dataset))
    order = Shuffle(len(rows), 42, 0)
    forks = [
        fork_of([renderer.encode(one) for one in (rows[at], rows[at].rejected)])
        for at in (order[number] for number in range(6))
    ]
    with torch.no_grad():
        return model.scores(flatten_ends(forks)).tolist()


def test_a_full_reward_model_loads_in_plain_transformers_with_the_same_scores(place):
    events = run_here(place.task(tuned(Reward)))
    folder = Path(events.last["artifact"])
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == 2
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert scores_of(model, place) == pytest.approx(our_scores(folder, place), abs=1e-5)
    assert set(events.of("step")[0]["metrics"]) == {
        "clipped_share",
        "accuracy",
        "margin",
        "mean_reward",
    }
    again = run_here(
        place.task(
            tuned(Reward, max_steps=1),
            inputs=Inputs(model=str(folder), dataset=str(place.dataset)),
        )
    )
    assert again.losses[1] != events.losses[1]


def test_an_adapter_on_an_adapter_keeps_its_start_and_loads_in_plain_peft(place):
    rows = write_rows(place.folder / "sft.jsonl", pairs(20))
    inputs = Inputs(model=str(place.model), dataset=str(rows))
    first = run_here(
        place.task(sft(Lora(rank=4), max_steps=4, learning_rate=1e-2), inputs=inputs)
    ).last["artifact"]
    inputs = Inputs(model=first, dataset=str(place.dataset))
    events = run_here(place.task(tuned(Reward, lora=Lora(rank=4)), inputs=inputs))
    folder = Path(events.last["artifact"])
    base = AutoModelForSequenceClassification.from_pretrained(place.model, num_labels=1)
    model = PeftModel.from_pretrained(base, folder)
    assert scores_of(model, place) == pytest.approx(our_scores(folder, place, Lora()), abs=1e-5)
    inputs = Inputs(model=str(folder), dataset=str(place.dataset))
    more = run_here(place.task(tuned(Reward, lora=Lora(rank=4), max_steps=2), inputs=inputs))
    assert more.of("started")[0]["detail"]["is_lean"]


@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(place, lora):
    run = Run(save_steps=1, keep_checkpoints=100, save_seconds=3600)
    spec = tuned(Reward, lora=lora, epochs=2, batch_size=8, run=run)
    whole = run_here(place.task(spec))
    resume = whole.of("checkpointed")[5]["path"]
    again = run_here(place.task(spec, resume_from=resume))
    assert again.losses == {step: loss for step, loss in whole.losses.items() if step > 6}
    found, expected = (
        load_file(next(Path(events.last["artifact"]).glob("*.safetensors")))
        for events in (again, whole)
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["gpt2", "gemma"])
@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
def test_other_architectures_learn_to_score_too(place, tmp_path, kind, lora):
    torch.manual_seed(1)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=256)
        config.eos_token_id = config.bos_token_id = 1
        GPT2LMHeadModel(config).save_pretrained(tmp_path)
    else:
        config = GemmaConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=8,
            eos_token_id=1,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(place.model).save_pretrained(tmp_path)
    inputs = Inputs(model=str(tmp_path), dataset=str(place.dataset))
    spec = tuned(Reward, lora=lora, epochs=6, learning_rate=1e-2, batch_size=COUNT)
    events = run_here(place.task(spec, inputs=inputs))
    assert events.losses[6] < events.losses[1]
    folder = events.last["artifact"]
    if lora is None:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
        model = PeftModel.from_pretrained(base, folder)
    assert scores_of(model, place) == pytest.approx(our_scores(folder, place, lora), abs=1e-4)


def test_a_reward_model_is_refused_where_tokens_are_wanted(place):
    from tunesmith.errors import BadRequestError

    for lora in (None, Lora(rank=4)):
        made = run_here(place.task(tuned(Reward, lora=lora, max_steps=1))).last["artifact"]
        rows = write_rows(place.folder / "sft.jsonl", pairs(4))
        with pytest.raises(JobFailure, match="is a reward model") as caught:
            run_here(place.task(sft(lora), inputs=Inputs(model=made, dataset=str(rows))))
        assert caught.value.failure_class is FailureClass.USER_ERROR
        if lora is None:
            with pytest.raises(BadRequestError, match="reward model"):
                ServedModel(Path(made))


@pytest.mark.slow
def test_a_reward_model_ranks_pairs_it_has_not_seen(place):
    rows = [ranked(number) for number in range(700)]
    inputs = Inputs(
        model=str(place.model),
        dataset=str(write_rows(place.folder / "ranked.jsonl", rows[:500])),
        eval_dataset=str(write_rows(place.folder / "unseen.jsonl", rows[500:])),
    )
    spec = tuned(Reward, epochs=3, batch_size=16, learning_rate=3e-3)
    metrics = run_here(place.task(spec, inputs=inputs)).of("evaluated")[-1]["metrics"]
    assert metrics["eval_accuracy"] >= 0.95


def ranked(number: int) -> dict[str, str]:
    """River and its kin are wanted, night and its kin are not, whatever stands around them."""
    dice = torch.Generator().manual_seed(number)
    context, noise = (
        " ".join(WORDS[at] for at in torch.randint(3, 14, (4,), generator=dice)) for _ in "ab"
    )
    return {
        "prompt": f"{context}:",
        "chosen": f" {noise} river {context}",
        "rejected": f" {noise} night {context}",
    }

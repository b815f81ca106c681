"""Preference training: what its steps compute, keep and go on from, on tiny real models."""

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from train_fixtures import (
    PLAN,
    WORDS,
    Place,
    judged,
    make_model,
    pairs,
    preferences,
    run_here,
    sft,
    tuned,
    write_rows,
)
from tunesmith.data.render import Renderer
from tunesmith.data.row import Row
from tunesmith.errors import FailureClass, JobFailure
from tunesmith.nn.forks import flatten_forks
from tunesmith.nn.language import open_model
from tunesmith.spec.pipe import Inputs, Plan
from tunesmith.spec.train import Cpo, Kto, Lora, Orpo, Preference, Run, Simpo
from tunesmith.train.pairs import fork_of
from tunesmith.train.preference import log_one_less_exp
from tunesmith.train.process import Asks

EACH_STEP = Run(save_steps=1, keep_checkpoints=100, save_seconds=3600)
METHODS = [Preference, Kto, Orpo, Cpo, Simpo]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("preference")
    return Place(
        folder, make_model(folder / "model"), write_rows(folder / "p.jsonl", preferences(46))
    )


def walks(events):
    return [event["message"] for event in events.of("notice") if event["code"] == "reference"]


def other(place, name, rows):
    return Inputs(model=str(place.model), dataset=str(write_rows(place.folder / name, rows)))


def weights_of(events):
    (path,) = Path(events.last["artifact"]).glob("*.safetensors")
    return load_file(path)


def test_the_first_step_finds_the_model_where_its_reference_is(place):
    events = run_here(place.task(tuned(Preference, batch_size=46, epochs=3)))
    first = events.of("step")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["metrics"]["rewards/margins"] == 0
    assert set(first["metrics"]) == {
        "clipped_share",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    }
    assert events.losses[3] < math.log(2)
    assert first["label_tokens"] < first["tokens"]


@pytest.mark.parametrize("kind", METHODS)
def test_accumulation_and_passes_do_not_change_the_updates(place, kind):
    ways = [
        (tuned(kind, batch_size=8, max_steps=5), Plan(threads=1, micro_batch_tokens=100_000)),
        (tuned(kind, batch_size=2, gradient_accumulation_steps=4, max_steps=5), PLAN),
        (tuned(kind, batch_size=8, max_steps=5), Plan(threads=1, micro_batch_tokens=1)),
    ]
    runs = [run_here(place.task(spec, plan=plan)) for spec, plan in ways]
    for events in runs[1:]:
        assert events.losses == pytest.approx(runs[0].losses, rel=1e-4, abs=1e-6)
        for one, first in zip(events.of("step"), runs[0].of("step"), strict=True):
            assert one["metrics"] == pytest.approx(first["metrics"], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("lora", [None, Lora(rank=4, dropout=0.3)], ids=["full", "lora"])
@pytest.mark.parametrize("kind", METHODS)
def test_a_run_goes_on_from_every_checkpoint_bit_for_bit(place, kind, lora):
    held_out = str(write_rows(place.folder / "held.jsonl", preferences(9)))
    inputs = Inputs(model=str(place.model), dataset=str(place.dataset), eval_dataset=held_out)
    spec = tuned(kind, lora=lora, epochs=2, batch_size=16, run=EACH_STEP)
    whole = run_here(place.task(spec, inputs=inputs))
    expected = weights_of(whole)
    last = whole.last["step"]
    for step in (1, last // 2, last - 1):
        resume = next(e["path"] for e in whole.of("checkpointed") if e["step"] == step)
        again = run_here(place.task(spec, inputs=inputs, resume_from=resume))
        assert again.of("started")[0]["start_step"] == step
        for ours, theirs in zip(again.of("step"), whole.of("step")[step:], strict=True):
            for name in ("loss", "grad_norm", "learning_rate", "metrics"):
                assert ours[name] == theirs[name]
        found = weights_of(again)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert again.of("evaluated")[-1] == whole.of("evaluated")[-1]


@pytest.mark.parametrize("kind", [Preference, Kto])
def test_a_reference_that_a_checkpoint_lacks_is_measured_anew_to_the_same_bits(place, kind):
    spec = tuned(kind, epochs=2, batch_size=16, run=EACH_STEP)
    whole = run_here(place.task(spec))
    assert len(walks(whole)) == 1
    saved = Path(whole.of("checkpointed")[1]["path"])
    kept = load_file(saved / "kept.safetensors")
    again = run_here(place.task(spec, resume_from=str(saved)))
    assert walks(again) == []
    more = write_rows(place.folder / "more.jsonl", preferences(47))
    inputs = Inputs(model=str(place.model), dataset=str(more))
    elsewhere = run_here(place.task(spec, inputs=inputs, resume_from=str(saved)))
    assert len(walks(elsewhere)) == 1
    once_more = run_here(place.task(spec))
    anew = load_file(Path(once_more.of("checkpointed")[1]["path"]) / "kept.safetensors")
    assert kept.keys() == anew.keys()
    assert all(torch.equal(kept[name].nan_to_num(7), anew[name].nan_to_num(7)) for name in kept)


def test_an_adapter_that_was_trained_before_is_its_own_reference(place):
    first = run_here(
        place.task(
            sft(Lora(rank=4), max_steps=5, learning_rate=1e-2),
            inputs=other(place, "sft.jsonl", pairs(20)),
        )
    )
    inputs = Inputs(model=first.last["artifact"], dataset=str(place.dataset))
    events = run_here(
        place.task(tuned(Preference, lora=Lora(), learning_rate=1e-2, max_steps=8), inputs=inputs)
    )
    assert events.losses[1] == pytest.approx(math.log(2), abs=1e-7)
    assert events.losses[8] < math.log(2)
    base = AutoModelForCausalLM.from_pretrained(place.model)
    PeftModel.from_pretrained(base, events.last["artifact"])


def test_a_reference_of_many_epochs_is_measured_once_and_only_as_far_as_it_is_used(place):
    spec = tuned(Preference, batch_size=4, max_steps=3, run=EACH_STEP)
    events = run_here(place.task(spec))
    saved = Path(events.of("checkpointed")[-1]["path"])
    logps_N2 = load_file(saved / "kept.safetensors")["train/logps"]
    assert int(logps_N2.isfinite().all(1).sum()) == 12
    assert "3 of 3 steps" in walks(events)[0]


def test_a_stop_while_the_reference_is_measured_is_answered_without_a_step(place):
    events = run_here(place.task(tuned(Preference)), Asks(should_stop=True))
    assert events.last == {"type": "stopped", "step": 0}


def test_held_out_pairs_are_measured_with_rewards(place):
    held_out = str(write_rows(place.folder / "eval.jsonl", preferences(9)))
    inputs = Inputs(model=str(place.model), dataset=str(place.dataset), eval_dataset=held_out)
    events = run_here(place.task(tuned(Preference, max_steps=4), inputs=inputs))
    metrics = events.of("evaluated")[-1]["metrics"]
    assert {"eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"} <= metrics.keys()
    assert "eval_perplexity" not in metrics


def test_kto_takes_single_answers_and_both_of_a_pair(place):
    single = run_here(place.task(tuned(Kto), inputs=other(place, "judged.jsonl", judged(20))))
    assert single.last["detail"]["samples"] == 20
    told = [event["metrics"] for event in single.of("step")]
    assert {"kl", "rewards/margins", "logps/chosen"} <= told[0].keys()
    assert told[0]["kl"] == 0
    both = run_here(place.task(tuned(Kto), inputs=other(place, "both.jsonl", preferences(20))))
    assert both.last["detail"]["samples"] == 40


def test_rows_that_cannot_be_compared_are_left_out_and_named(place):
    rows = preferences(12)
    rows[4]["rejected"] = " river" * 90
    rows[7]["chosen"] = "  river" + " stone" * 90
    inputs = other(place, "long.jsonl", rows)
    events = run_here(place.task(tuned(Preference, max_length=64), inputs=inputs))
    assert events.last["detail"]["omitted"]["overlong"][0] == 2
    assert sorted(events.last["detail"]["omitted"]["overlong"][1:]) == [5, 8]
    assert events.last["detail"]["samples"] == 10
    rows = [{"prompt": " river" * 90, "chosen": "a", "rejected": "b"}] * 2
    error = failure(
        place.task(
            tuned(Preference, max_length=64, overlong="truncate"),
            inputs=other(place, "cut.jsonl", rows),
        )
    )
    assert "2 rows whose answers become the same tokens (lines " in str(error)


def test_a_file_of_another_kind_is_refused_with_what_would_be_right(place):
    error = failure(place.task(tuned(Preference), inputs=other(place, "chat.jsonl", pairs(4))))
    assert error.failure_class is FailureClass.DATA_ERROR
    assert '{"prompt", "chosen", "rejected"}' in str(error)
    error = failure(place.task(sft()))
    assert "train on it with dpo" in str(error)


def failure(task):
    with pytest.raises(JobFailure) as caught:
        run_here(task)
    return caught.value


def test_dropout_is_off_whatever_the_model_says(place):
    model = open_model(str(place.model), lora=Lora(rank=4, dropout=0.5), has_dropout=False)
    assert model.is_lean
    plain = run_here(place.task(tuned(Preference, lora=Lora(rank=4), max_steps=3)))
    with_dropout = run_here(
        place.task(tuned(Preference, lora=Lora(rank=4, dropout=0.5), max_steps=3))
    )
    assert plain.losses == with_dropout.losses


def test_the_odds_keep_their_digits_at_both_ends():
    x = torch.tensor([-1e-6, -0.1, -0.7, -5.0, -40.0], requires_grad=True)
    exact = torch.log1p(-torch.exp(x.detach().double())).float()
    found = log_one_less_exp(x)
    assert torch.allclose(found, exact, rtol=1e-5)
    found.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, Lora(rank=8, alpha=64)], ids=["full", "lora"])
def test_dpo_turns_a_preference_around(place, lora):
    """After a fine-tune that says "night", pairs that prefer "river" are won on unseen prompts."""
    taught = [{"prompt": asked(n), "completion": " night"} for n in range(300)]
    rows = write_rows(place.folder / "taught.jsonl", taught)
    first = run_here(
        place.task(
            sft(epochs=2, learning_rate=3e-3, batch_size=16),
            inputs=Inputs(model=str(place.model), dataset=str(rows)),
        )
    )
    turned = [{"prompt": asked(n), "chosen": " river", "rejected": " night"} for n in range(600)]
    inputs = Inputs(
        model=first.last["artifact"],
        dataset=str(write_rows(place.folder / "turned.jsonl", turned[:400])),
        eval_dataset=str(write_rows(place.folder / "unseen.jsonl", turned[400:])),
    )
    spec = tuned(Preference, lora=lora, epochs=3, batch_size=16, learning_rate=1e-2)
    events = run_here(place.task(spec, inputs=inputs))
    assert events.of("evaluated")[-1]["metrics"]["eval_rewards/accuracies"] >= 0.95
    assert win_rate(first.last["artifact"], None) <= 0.05
    assert win_rate(events.last["artifact"], lora) >= 0.95


def win_rate(folder, lora):
    """Of unseen prompts, how many the model would rather answer with "river" than "night"."""
    model, renderer = open_model(folder, lora=lora), Renderer.load(folder)
    forks = []
    for number in range(400, 600):
        told = [
            renderer.encode(Row(1, prompt=asked(number), completion=text))
            for text in (" river", " night")
        ]
        forks.append(fork_of(told))
    batch = flatten_forks(forks)
    with torch.no_grad():
        sums_P2 = batch.sums(model.log_probs(batch.flat)).view(-1, 2)
    return (sums_P2[:, 0] > sums_P2[:, 1]).float().mean().item()


def asked(number: int) -> str:
    dice = torch.Generator().manual_seed(number)
    return " ".join(WORDS[at] for at in torch.randint(3, 14, (5,), generator=dice)) + "?"

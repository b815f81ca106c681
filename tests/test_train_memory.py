"""A step that memory does not suffice for is made in smaller passes, and is the same step."""

from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from several import run_several
from train_fixtures import (
    WORDS,
    Events,
    Place,
    make_model,
    run_here,
    sft,
    write_rows,
)
from tunesmith.spec.pipe import Plan, TrainerTask
from tunesmith.spec.train import Lora, Run, Sft
from tunesmith.train.batches import Sample
from tunesmith.train.episodes import Episodes
from tunesmith.train.narrowing import narrow
from tunesmith.train.parallel import Group
from tunesmith.train.standing import Standing

PLAN = Plan(threads=1, micro_batch_tokens=8192)
ROOM = 60 << 20
"""Bytes: a pass of 4,000 tokens takes about three times as much."""
EACH_STEP = Run(save_steps=1, keep_checkpoints=9, save_seconds=3600)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("memory")
    model = make_model(folder / "model")
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(model)
    config.update({"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4})
    config.update({"head_dim": 16})
    LlamaForCausalLM(config).save_pretrained(model)
    rows = [{"prompt": _words(7 * i, 40), "completion": " " + _words(5 * i, 8)} for i in range(96)]
    return Place(folder, model, write_rows(folder / "rows.jsonl", rows))


def _words(start: int, count: int) -> str:
    return " ".join(WORDS[(start + k) % len(WORDS)] for k in range(count))


def dropping(**over: object) -> Sft:
    """Random numbers are drawn in each pass."""
    return sft(Lora(rank=4, dropout=0.2), epochs=2, run=EACH_STEP, **over)


def pair_task(place: Place) -> TrainerTask:
    return place.task(sft(batch_size=48), plan=PLAN.model_copy(update={"processes": 2}))


@dataclass(frozen=True)
class Told:
    """What was said where memory was short."""

    alone: Events
    pair: Events
    hopeless: Events
    probed: Events


@pytest.fixture(scope="module")
def told(place: Place) -> Told:
    cases = [
        (place.task(dropping(batch_size=48), plan=PLAN), [ROOM]),
        (pair_task(place), [0, ROOM // 2]),
        (place.task(sft(batch_size=48), plan=PLAN), [1 << 20]),
        (place.task(sft(batch_size=48, run=Run(probe=True)), plan=PLAN), [ROOM]),
    ]
    return Told(*run_several(cases))


def plan_of(events: Events) -> Plan:
    return Plan.model_validate(events.of("replanned")[-1]["plan"])


def test_a_pass_without_memory_is_made_in_smaller_ones_and_the_update_stays(
    place: Place, told: Told
) -> None:
    narrowed = told.alone
    found = plan_of(narrowed)
    assert found.micro_batch_tokens < PLAN.micro_batch_tokens / 2
    [*_, notice] = [one for one in narrowed.of("notice") if one["code"] == "passes_halved"]
    assert "step 1: " in notice["message"]
    assert notice["detail"]["micro_batch_tokens"] == found.micro_batch_tokens
    kinds = [event["type"] for event in narrowed.all]
    assert kinds.index("replanned") < kinds.index("step")

    small = run_here(place.task(dropping(batch_size=48), plan=found))
    assert narrowed.losses == small.losses
    second = narrowed.of("checkpointed")[1]["path"]
    rest = run_here(place.task(dropping(batch_size=48), resume_from=second, plan=None))
    assert rest.of("started")[0]["plan"] == found.model_dump()
    assert rest.losses == {step: small.losses[step] for step in (3, 4)}


def test_where_one_process_lacks_memory_both_make_the_step_again(place: Place, told: Told) -> None:
    both = told.pair
    alone = run_here(place.task(sft(batch_size=96), plan=PLAN))
    assert plan_of(both).micro_batch_tokens < PLAN.micro_batch_tokens / 2
    assert both.losses == pytest.approx(alone.losses, rel=1e-6)


def test_a_sample_that_does_not_fit_by_itself_ends_the_job(told: Told) -> None:
    failed = told.hopeless.last
    assert failed["failure_class"] == "oom_host"
    assert "a pass of one sample does not fit either" in failed["message"]


def test_a_probe_that_does_not_fit_is_told_of_and_the_job_goes_on(told: Told) -> None:
    codes = [event["code"] for event in told.probed.of("notice")]
    assert codes.index("probe_failed") < codes.index("passes_halved")
    assert told.probed.last["type"] == "finished"


def test_passes_are_halved_until_there_are_more_of_them() -> None:
    standing = Standing(Plan(threads=1, micro_batch_tokens=4096))
    samples = [Sample.of([0] * 100, [True] * 100) for _ in range(6)]
    found = narrow(standing, Group(), samples, lambda: samples)
    assert found is not None
    assert found.detail == {"micro_batch_tokens": 512, "before": 4096, "passes": 2}
    while narrow(standing, Group(), samples, lambda: samples) is not None:
        last = standing.micro_batch_tokens
    assert standing.micro_batch_tokens == last == 128


def test_completions_that_share_a_prompt_are_parted_where_they_do_not_fit() -> None:
    standing = Standing(Plan(threads=1, micro_batch_tokens=64))
    values = {"old": torch.zeros(40)}
    learnt = torch.ones(4, dtype=torch.bool)
    episodes = Episodes([[1, 2, 3]], [[4] * 10] * 4, values, learnt, beta=0.0)

    def lay_anew() -> list[object]:
        return list(episodes.bundles(range(4), standing.micro_batch_tokens))

    bundles = lay_anew()
    assert len(bundles) == 1
    found = narrow(standing, Group(), bundles, lay_anew)  # type: ignore[arg-type]
    assert found is not None
    assert [bundle.completions for bundle in found.samples] == [2, 2]

"""How a job is to be computed here, and how what goes wrong is named."""

import errno
import os

import pytest
import torch

from train_fixtures import PLAN, Place, make_model, pairs, run_here, sft, tuned, write_rows
from tunesmith.errors import FailureClass, JobFailure, NotFoundError
from tunesmith.spec.pipe import Inputs
from tunesmith.spec.train import Kto, Run
from tunesmith.train import plan
from tunesmith.train.failure import tell


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    return Place(folder, make_model(folder / "model"), write_rows(folder / "rows.jsonl", pairs(20)))


def test_a_plan_is_made_from_what_the_machine_has(place, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"hidden_size": 1024, "num_hidden_layers": 1}')
    inputs = Inputs(model=str(tmp_path), dataset=str(place.dataset))
    wide = place.task(sft(), inputs=inputs)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    chosen = plan.choose(wide)
    assert chosen.threads == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert plan.choose(wide).threads == len(os.sched_getaffinity(0))
    if chosen.device == "cpu":
        assert chosen.precision == "fp32"
        assert not chosen.compile


def test_a_narrow_model_gets_one_thread(place, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    chosen = plan.choose(place.task(sft()))
    assert chosen.threads == (1 if chosen.device == "cpu" else 3)


def test_what_is_asked_for_wins(place):
    run = Run(precision="bf16", compile="on", gradient_checkpointing="on")
    task = place.task(sft(run=run))
    chosen = plan.choose(task)
    assert (chosen.precision, chosen.compile) == ("bf16", True)
    assert chosen.gradient_checkpointing is True
    assert plan.choose(place.task(sft())).gradient_checkpointing is False
    off = sft(run=Run(gradient_checkpointing="off"))
    assert plan.choose(place.task(off)).gradient_checkpointing is False


def test_activations_that_memory_does_not_hold_are_computed_twice(place, tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 8192, "num_hidden_layers": 100000}')
    deep = place.task(sft(), inputs=Inputs(model=str(tmp_path), dataset=str(place.dataset)))
    assert plan.choose(deep).gradient_checkpointing is True


def test_a_model_of_which_no_process_holds_a_copy_is_shared_out(place, tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 65536, "num_hidden_layers": 1000}')
    inputs = Inputs(model=str(tmp_path), dataset=str(place.dataset))
    vast = place.task(sft(), inputs=inputs)
    assert plan.choose(vast, 2).parallel == "fsdp"
    assert plan.choose(vast).parallel == "ddp"
    assert plan.choose(place.task(sft()), 2).parallel == "ddp"
    asked = place.task(sft(run=Run(parallel="ddp", devices=2)), inputs=inputs)
    assert plan.choose(asked, 2).parallel == "ddp"
    apart = place.task(tuned(Kto, batch_size=4), inputs=inputs)
    assert plan.choose(apart, 2).parallel == "ddp"


def test_what_the_first_attempt_decided_by_its_memory_holds_for_the_next(place):
    whole = run_here(place.task(sft(max_steps=5)))
    assert whole.of("started")[0]["plan"]["gradient_checkpointing"] is False
    poor = PLAN.model_copy(update={"gradient_checkpointing": True})
    run = Run(save_steps=2, keep_checkpoints=5, save_seconds=3600)
    first = run_here(place.task(sft(max_steps=5, run=run), plan=poor))
    resumed = {"resume_from": first.of("checkpointed")[0]["path"], "plan": None}
    rest = run_here(place.task(sft(max_steps=5, run=run), **resumed))
    assert rest.of("started")[0]["plan"] == poor.model_dump()
    assert {step: whole.losses[step] for step in (3, 4, 5)} == rest.losses


def test_nothing_is_compiled_unasked(place):
    assert plan.choose(place.task(sft(epochs=10_000))).compile is False


def test_an_adapters_size_is_that_of_its_base(place, tmp_path):
    config = f'{{"base_model_name_or_path": "{place.model}"}}'
    (tmp_path / "adapter_config.json").write_text(config)
    assert plan.Size.of(tmp_path).hidden == 32
    assert plan.Size.of(tmp_path / "nowhere").hidden == 0


@pytest.mark.parametrize(
    ("error", "failure_class"),
    [
        (JobFailure(FailureClass.NAN_LOSS, "said"), "nan_loss"),
        (NotFoundError("no such model"), "user_error"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "disk_full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "disk_full"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom_gpu"),
        (MemoryError(), "oom_host"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "user_error"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "gpu_error"),
        (KeyError("강물"), "no_artifact"),
        (ValueError("\udcff" + "long" * 4000), "no_artifact"),
    ],
)
def test_every_exception_has_a_class_a_sentence_and_a_hint(error, failure_class):
    told = tell(error)
    assert told.failure_class == failure_class
    assert 0 < len(told.message) <= 4000
    assert told.hint
    told.model_dump_json()


def test_memory_that_the_host_does_not_have_is_named_so():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 58, dtype=torch.uint8)
    assert tell(caught.value).failure_class is FailureClass.OOM_HOST

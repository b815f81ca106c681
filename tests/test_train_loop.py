"""What training computes, says and leaves behind, on tiny real models."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from task_files import document, sentencepiece_model
from train_fixtures import (
    PLAN,
    Events,
    Place,
    make_model,
    pairs,
    read_events,
    run_here,
    sft,
    write_rows,
)
from tunesmith import manifest
from tunesmith.data.brought import pack
from tunesmith.data.render import Renderer
from tunesmith.data.rows import RowIndex
from tunesmith.errors import FailureClass, JobFailure, NotFoundError
from tunesmith.nn.language import open_model
from tunesmith.spec.pipe import KNOWN, STAGES, Inputs, Plan
from tunesmith.spec.train import Lora, Pretrain, Run
from tunesmith.train.batches import Shuffle
from tunesmith.train.failure import tell
from tunesmith.train.process import Asks

COUNT = 86


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("loop")
    model = make_model(folder / "model")
    return Place(folder, model, write_rows(folder / "rows.jsonl", pairs(COUNT)))


def failure(task, asks=None):
    with pytest.raises(JobFailure) as caught:
        run_here(task, asks)
    return caught.value


def rows_of(place):
    with RowIndex.open(place.dataset) as rows:
        return list(rows)


def plain_losses(place, model, steps, total):
    """The loop that everybody writes: padded batches, AdamW, clipping, a schedule."""
    renderer, rows = Renderer.load(place.model), rows_of(place)
    order = Shuffle(len(rows), 42, 0)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    schedule = get_scheduler("cosine", adam, 2, total)
    losses = []
    for step in range(steps):
        encoded = [renderer.encode(rows[order[4 * step + i]]) for i in range(4)]
        longest = max(len(one.ids) for one in encoded)
        ids, labels, attention = [], [], []
        for one in encoded:
            gap = longest - len(one.ids)
            ids.append(one.ids + [2] * gap)
            attention.append([1] * len(one.ids) + [0] * gap)
            marked = [t if m else -100 for t, m in zip(one.ids, one.mask, strict=True)]
            labels.append(marked + [-100] * gap)
        out = model(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(attention),
            labels=torch.tensor(labels),
        )
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        schedule.step()
        adam.zero_grad()
        losses.append(out.loss.item())
    return losses


def test_the_first_20_losses_of_a_full_run_are_those_of_a_plain_padded_loop(place):
    events = run_here(place.task(sft(warmup_steps=2)))
    model = AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32)
    expected = plain_losses(place, model, 20, 22)
    assert [events.losses[step] for step in range(1, 21)] == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]


def test_the_first_20_losses_of_a_lora_run_are_those_of_peft_in_a_plain_padded_loop(place):
    events = run_here(place.task(sft(Lora(rank=4, alpha=64), warmup_steps=2, learning_rate=1e-3)))
    base = AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=64, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    peft = get_peft_model(base, config)
    ours = open_model(str(place.model), lora=Lora(rank=4, alpha=64), seed=42).weights()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(ours[name.replace(".default", "")])
    expected = plain_losses(place, peft, 20, 22)
    assert [events.losses[step] for step in range(1, 21)] == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]


def test_accumulation_and_passes_do_not_change_the_updates(place):
    ways = [
        (sft(batch_size=8, max_steps=6), Plan(threads=1, micro_batch_tokens=100_000)),
        (sft(batch_size=2, gradient_accumulation_steps=4, max_steps=6), PLAN),
        (sft(batch_size=8, max_steps=6), Plan(threads=1, micro_batch_tokens=1)),
    ]
    runs = [run_here(place.task(spec, plan=plan)).losses for spec, plan in ways]
    for losses in runs[1:]:
        assert losses == pytest.approx(runs[0], rel=1e-5)


def test_the_share_of_clipped_steps_is_told_step_by_step(place):
    free = run_here(place.task(sft(max_steps=4, max_grad_norm=0)))
    norms = [event["grad_norm"] for event in free.of("step")]
    limit = norms[0] * 0.999
    events = run_here(place.task(sft(max_steps=4, max_grad_norm=limit)))
    steps = events.of("step")
    clipped = [event["grad_norm"] > limit for event in steps]
    shares = [sum(clipped[:done]) / done for done in range(1, 5)]
    assert clipped[0]
    assert [event["metrics"]["clipped_share"] for event in steps] == pytest.approx(shares, abs=1e-6)
    assert {event["metrics"]["clipped_share"] for event in free.of("step")} == {0}


def test_a_run_says_where_it_is_at_each_logged_step_and_always_at_the_first_and_last(place):
    spec = sft(max_steps=9, run=Run(logging_steps=4, save_seconds=3600))
    events = run_here(place.task(spec))
    assert [event["step"] for event in events.of("step")] == [1, 4, 8, 9]
    first, last = events.of("step")[0], events.of("step")[-1]
    assert first["total_steps"] == 9
    assert first["eta_seconds"] is None
    assert last["eta_seconds"] == 0
    assert last["tokens"] > last["label_tokens"] > 0
    assert last["tokens_per_second"] > 0
    assert last["peak_memory_bytes"] > 10 << 20
    assert last["grad_norm"] > 0
    started = events.of("started")[0]
    assert started["plan"] == PLAN.model_dump() | {"gradient_checkpointing": False}
    assert started["parameters"] == started["trainable_parameters"] > 10_000
    assert [event["type"] for event in events.all][-2:] == ["checkpointed", "finished"]


def test_the_norms_of_an_adapters_weights_are_told(place):
    events = run_here(place.task(sft(Lora(rank=2, use_dora=True), max_steps=3)))
    first, *_, last = [event["metrics"] for event in events.of("step")]
    tensors = load_file(Path(events.last["artifact"]) / "adapter_model.safetensors")
    for mark, metric in (("lora_A", "lora_a_norm"), ("lora_B", "lora_b_norm")):
        flat = torch.cat([one.flatten() for name, one in tensors.items() if mark in name])
        assert last[metric] == pytest.approx(flat.norm().item(), rel=1e-6)
    assert first["lora_b_norm"] > 0
    assert "lora_magnitude_norm" in last
    full = run_here(place.task(sft(max_steps=1))).of("step")[0]["metrics"]
    assert set(full) == {"clipped_share"}


def test_epochs_may_be_a_fraction(place):
    events = run_here(place.task(sft(epochs=0.5, batch_size=8)))
    assert events.last["step"] == math.ceil(0.5 * math.ceil(COUNT / 8))
    events = run_here(place.task(sft(epochs=1.5, batch_size=40)))
    assert events.last["step"] == math.ceil(1.5 * math.ceil(COUNT / 40))


def test_the_validation_set_is_measured_at_each_epochs_end_and_at_eval_steps(place):
    held_out = write_rows(place.folder / "held.jsonl", pairs(10))
    inputs = Inputs(model=str(place.model), dataset=str(place.dataset), eval_dataset=str(held_out))
    spec = sft(epochs=2, batch_size=40, run=Run(eval_steps=2, save_seconds=3600))
    events = run_here(place.task(spec, inputs=inputs))
    told = events.of("evaluated")
    assert [event["step"] for event in told] == [2, 3, 4, 6]
    metrics = told[-1]["metrics"]
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    plain = run_here(place.task(spec))
    assert events.losses == plain.losses


def test_rows_that_are_too_long_or_teach_nothing_are_left_out_counted_and_named(place):
    rows = pairs(20)
    rows[4]["completion"] = " river" * 90
    rows[9]["completion"] = " 강물" * 90
    dataset = write_rows(place.folder / "long.jsonl", rows)
    inputs = Inputs(model=str(place.model), dataset=str(dataset))
    events = run_here(place.task(sft(max_length=64, epochs=2), inputs=inputs))
    notice = next(event for event in events.of("notice") if event["code"] == "rows_dropped")
    assert "2 rows longer than max_length (lines" in notice["message"]
    assert sorted(notice["detail"]["overlong"]) == [2, 5, 10]
    assert events.of("started")[0]["is_total_exact"] is False
    assert events.last["detail"]["omitted"] == notice["detail"]
    assert events.last["detail"]["samples"] == 36
    assert events.last["step"] == 10


def test_rows_that_are_too_long_are_cut_where_that_is_asked_for(place):
    rows = pairs(8)
    rows[4]["completion"] = " river" * 90
    rows[5]["prompt"] = " river" * 90
    inputs = place.task(sft()).inputs.model_copy(
        update={"dataset": str(write_rows(place.folder / "cut.jsonl", rows))}
    )
    events = run_here(place.task(sft(max_length=64, overlong="truncate"), inputs=inputs))
    omitted = events.last["detail"]["omitted"]
    assert omitted == {"truncated": [2, *omitted["truncated"][1:]], "masked": [1, 6]}
    assert events.last["detail"]["samples"] == 7


def test_a_row_that_is_too_long_ends_the_job_where_that_is_asked_for(place):
    rows = [{"prompt": "river", "completion": " stone" * 90}]
    inputs = place.task(sft()).inputs.model_copy(
        update={"dataset": str(write_rows(place.folder / "refuse.jsonl", rows))}
    )
    error = failure(place.task(sft(max_length=64, overlong="refuse"), inputs=inputs))
    assert error.failure_class is FailureClass.DATA_ERROR
    assert "line 1: 183 tokens, over max_length 64" in str(error)


def test_a_data_set_in_which_nothing_is_learnt_is_refused_with_its_lines(place):
    rows = [{"prompt": " river" * 90, "completion": "🌊"}] * 3
    inputs = place.task(sft()).inputs.model_copy(
        update={"dataset": str(write_rows(place.folder / "masked.jsonl", rows))}
    )
    error = failure(place.task(sft(max_length=64, overlong="truncate"), inputs=inputs))
    assert error.failure_class is FailureClass.DATA_ERROR
    assert "3 rows without a token to learn from (lines " in str(error)


def test_a_conversation_that_is_context_only_is_refused_with_its_line(place):
    answer = {"role": "assistant", "content": "🌊", "weight": 0}
    rows = [{"messages": [{"role": "user", "content": "夜?"}, answer]}]
    inputs = place.task(sft()).inputs.model_copy(
        update={"dataset": str(write_rows(place.folder / "context.jsonl", rows))}
    )
    error = failure(place.task(sft(), inputs=inputs))
    assert error.failure_class is FailureClass.DATA_ERROR
    assert "line 1: every assistant message has weight 0" in str(error)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (['{"prompt": "a", "completion": "b"}', '{"prompt": "a"'], "line 2"),
        ([], "no row"),
    ],
)
def test_a_broken_data_set_names_the_line(place, lines, sentence):
    path = place.folder / f"broken-{len(lines)}.jsonl"
    path.write_text("\n".join(lines))
    inputs = place.task(sft()).inputs.model_copy(update={"dataset": str(path)})
    error = failure(place.task(sft(epochs=2), inputs=inputs))
    assert error.failure_class is FailureClass.DATA_ERROR
    assert sentence in str(error)


def test_a_missing_model_or_data_set_is_the_users_error(place):
    for field in ("model", "dataset"):
        inputs = place.task(sft()).inputs.model_copy(update={field: "/nowhere/강물"})
        with pytest.raises((JobFailure, NotFoundError)) as caught:
            run_here(place.task(sft(), inputs=inputs))
        told = tell(caught.value)
        assert told.failure_class is FailureClass.USER_ERROR
        assert "강물" in told.message


def test_a_loss_that_is_no_number_is_null_and_skipped_up_to_three_times_in_a_row(place, tmp_path):
    broken = make_model(tmp_path / "nan")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = math.nan
    from safetensors.torch import save_file

    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    run = Run(on_nan="skip", save_seconds=3600)
    task = place.task(sft(run=run), inputs=Inputs(model=str(broken), dataset=str(place.dataset)))
    error = failure(task)
    assert error.failure_class is FailureClass.NAN_LOSS
    assert "3 steps in a row" in str(error)
    text = Path(task.attempt_dir).with_suffix(".events").read_text()
    steps = [json.loads(line) for line in text.splitlines() if '"step"' in line]
    assert [event["loss"] for event in steps if event["type"] == "step"] == [None] * 3
    assert "NaN" not in text


@pytest.fixture(scope="module")
def burnt(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A row in twenty has a token whose embedding has overflowed; the others don't see it."""
    folder = tmp_path_factory.mktemp("burnt")
    model = make_model(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    [token, *_] = tokenizer("ß", add_special_tokens=False).input_ids
    network = AutoModelForCausalLM.from_pretrained(model, tie_word_embeddings=False)
    with torch.no_grad():
        network.model.embed_tokens.weight[token] = math.inf
    network.save_pretrained(model)
    rows = pairs(20)
    rows[13]["prompt"] += " ß"
    return Place(folder, model, write_rows(folder / "rows.jsonl", rows))


def bad_step(events: Events) -> int:
    [found] = [event["step"] for event in events.of("step") if event["grad_norm"] is None]
    return found


def test_a_step_without_a_finite_number_ends_the_job_and_names_its_rows(burnt):
    task = burnt.task(sft())
    error = failure(task)
    said = read_events(Path(task.attempt_dir).with_suffix(".events"))
    assert error.failure_class is FailureClass.NAN_LOSS
    lines = [int(word) for word in re.findall(r"(\d+)(?=,|$)", str(error).split("lines ")[1])]
    assert len(lines) == 4
    assert 14 in lines
    assert f"step {bad_step(said)}: " in str(error)
    assert said.last["step"] == bad_step(said)


def test_a_step_without_a_finite_number_is_passed_over_where_that_is_asked_for(burnt):
    events = run_here(burnt.task(sft(run=Run(on_nan="skip", save_seconds=3600))))
    [notice] = [event for event in events.of("notice") if event["code"] == "update_skipped"]
    assert 14 in notice["detail"]["lines"]
    assert f"step {bad_step(events)}: " in notice["message"]
    assert events.last["detail"]["skipped_updates"] == 1
    weights = load_file(Path(events.last["artifact"]) / "model.safetensors")
    embedding = weights.pop("model.embed_tokens.weight")
    assert (~embedding.isfinite().any(1)).sum() == 1  # the row that was so before
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_a_gradient_that_is_no_number_never_reaches_the_weights(place):
    model = open_model(str(place.model), lora=None)
    from tunesmith.spec.train import Optim
    from tunesmith.train.optimizer import Optimizer

    before = {name: tensor.clone() for name, tensor in model.weights().items()}
    optimizer = Optimizer(model.trainable(), Optim(max_grad_norm=0))
    for parameter in model.trainable().values():
        parameter.grad = torch.full_like(parameter, math.inf)
    assert not math.isfinite(optimizer.update(0.1))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.weights().items())
    assert optimizer.state() == {}


def test_norms_and_biases_are_not_decayed():
    from tunesmith.spec.train import Optim
    from tunesmith.train.optimizer import Optimizer

    named = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
    optimizer = Optimizer(named, Optim(weight_decay=0.5, max_grad_norm=0))
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.update(0.1)
    assert named["weight"].unique().item() == pytest.approx(0.95)
    assert named["norm"].unique().item() == 1


SHAPES = {"weight": (2, 3), "norm": (3,)}


def test_a_full_artifact_loads_in_plain_transformers_and_has_the_same_loss(place):
    events = run_here(place.task(sft(max_steps=5)))
    folder = Path(events.last["artifact"])
    assert manifest.verify(folder, events.last["manifest_sha256"]).kind == "artifact"
    model = AutoModelForCausalLM.from_pretrained(folder)
    ours = open_model(str(folder), lora=None)
    assert loss_of(model, place) == pytest.approx(loss_with(ours, place), rel=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "빛"}], tokenize=False)
    assert text == "<|im_start|>user\n빛<|im_end|>\n"
    record = json.loads((folder / "training.json").read_text())
    assert record["base_model"] == str(place.model)
    assert record["metrics"]["steps"] == 5


def test_an_adapter_loads_in_plain_peft_and_has_the_same_loss(place):
    events = run_here(place.task(sft(Lora(rank=4), max_steps=5, learning_rate=1e-2)))
    folder = Path(events.last["artifact"])
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    base = AutoModelForCausalLM.from_pretrained(place.model)
    before = loss_of(base, place)
    after = loss_of(PeftModel.from_pretrained(base, folder), place)
    assert after == pytest.approx(
        loss_with(open_model(str(folder), lora=Lora(rank=4)), place), rel=1e-5
    )
    assert after < before


def loss_of(model, place):
    encoded = probe(place)
    model.eval()
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([encoded.ids]),
            labels=torch.tensor(
                [[t if m else -100 for t, m in zip(encoded.ids, encoded.mask, strict=True)]]
            ),
        ).loss.item()


def loss_with(model, place):
    from tunesmith.nn.batch import flatten

    encoded = probe(place)
    model.eval()
    batch = flatten([(encoded.ids, encoded.mask)])
    with torch.no_grad():
        return model.loss_sum(batch).item() / batch.labels


def probe(place):
    return Renderer.load(place.model).encode(rows_of(place)[11])


def test_a_checkpoint_can_be_served_and_holds_no_pickle(place):
    events = run_here(place.task(sft(max_steps=3, run=Run(save_steps=2, save_seconds=3600))))
    told = events.of("checkpointed")
    assert [event["step"] for event in told] == [2, 3]
    folder = Path(told[-1]["path"])
    assert manifest.verify(folder, told[-1]["manifest_sha256"]).kind == "checkpoint"
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".jinja", ".txt"}
    AutoTokenizer.from_pretrained(folder / "model")
    final, kept = Path(events.last["artifact"]), folder / "model"
    for name, tensor in load_file(final / "model.safetensors").items():
        assert torch.equal(tensor, load_file(kept / "model.safetensors")[name])


def test_only_the_newest_checkpoints_are_kept(place):
    spec = sft(max_steps=6, run=Run(save_steps=1, keep_checkpoints=2, save_seconds=3600))
    events = run_here(place.task(spec))
    folder = Path(events.of("checkpointed")[0]["path"]).parent
    assert sorted(path.name for path in folder.iterdir()) == ["step-5", "step-6"]


def test_the_newest_checkpoint_that_the_api_knows_of_stays_beside_them(place):
    spec = sft(max_steps=6, run=Run(save_steps=1, keep_checkpoints=2, save_seconds=3600))
    task = place.task(spec)
    known = Path(task.attempt_dir, KNOWN)
    known.parent.mkdir(parents=True)
    known.write_text("step-3")
    run_here(task)
    kept = sorted(path.name for path in known.parent.glob("step-*"))
    assert kept == ["step-3", "step-5", "step-6"]


@pytest.mark.parametrize("lora", [None, Lora(rank=4, dropout=0.3)], ids=["full", "lora"])
def test_a_run_goes_on_from_every_checkpoint_bit_for_bit(place, lora):
    run = Run(save_steps=1, keep_checkpoints=100, save_seconds=3600)
    spec = sft(lora, epochs=2, max_steps=24, batch_size=8, run=run)
    whole = run_here(place.task(spec))
    expected = weights_of(whole)
    for step in (1, 10, 11, 12, 21):
        resume = next(e["path"] for e in whole.of("checkpointed") if e["step"] == step)
        again = run_here(place.task(spec, resume_from=resume))
        assert again.of("started")[0]["start_step"] == step
        assert again.losses == {n: loss for n, loss in whole.losses.items() if n > step}
        found = weights_of(again)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_that_leaves_out_rows_goes_on_bit_for_bit_too(place):
    """What is left out changes how many steps are foretold, and so the learning rates."""
    rows = pairs(60)
    for row in rows[::3]:
        row["completion"] = " river" * 90
    dataset = write_rows(place.folder / "gaps.jsonl", rows)
    inputs = Inputs(model=str(place.model), dataset=str(dataset))
    run = Run(save_steps=1, keep_checkpoints=100, save_seconds=3600)
    spec = sft(max_length=64, epochs=2, run=run)
    whole = run_here(place.task(spec, inputs=inputs))
    for saved in whole.of("checkpointed")[:-1:2]:
        again = run_here(place.task(spec, inputs=inputs, resume_from=saved["path"]))
        for ours, theirs in zip(again.of("step"), whole.of("step")[saved["step"] :], strict=True):
            for field in ("step", "total_steps", "epoch", "loss", "learning_rate", "grad_norm"):
                assert ours[field] == theirs[field]
    assert whole.of("step")[-1]["total_steps"] == 20


def weights_of(events):
    (path,) = Path(events.last["artifact"]).glob("*.safetensors")
    return load_file(path)


def test_a_checkpoint_with_a_changed_byte_or_a_missing_file_is_refused(place):
    events = run_here(place.task(sft(max_steps=2)))
    folder = Path(events.of("checkpointed")[-1]["path"])
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"):
        body = path.read_bytes()
        middle = len(body) // 2
        path.write_bytes(body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :])
        error = failure(place.task(sft(max_steps=4), resume_from=str(folder)))
        assert error.failure_class is FailureClass.CHECKPOINT_CORRUPT
        assert path.name in str(error)
        path.write_bytes(body)
    (folder / "optimizer.safetensors").unlink()
    error = failure(place.task(sft(max_steps=4), resume_from=str(folder)))
    assert error.failure_class is FailureClass.CHECKPOINT_CORRUPT


def test_a_checkpoint_of_another_model_is_refused(place):
    events = run_here(place.task(sft(Lora(rank=4), max_steps=2)))
    resume = events.of("checkpointed")[-1]["path"]
    error = failure(place.task(sft(Lora(rank=8), max_steps=4), resume_from=resume))
    assert error.failure_class is FailureClass.USER_ERROR
    assert "other weights" in str(error)


def test_a_stop_asked_for_early_is_answered_without_a_step(place):
    asks = Asks(should_stop=True)
    events = run_here(place.task(sft()), asks)
    assert events.last == {"type": "stopped", "step": 0}
    assert events.of("checkpointed") == []


def test_plain_text_is_packed_and_learnt_from_scratch(place):
    rows = [{"text": " ".join(row["prompt"] for row in pairs(6)) * 2} for _ in range(12)]
    dataset = write_rows(place.folder / "text.jsonl", rows)
    optim = {"learning_rate": 1e-2, "batch_size": 4, "epochs": 2}
    run = Run(save_steps=3, keep_checkpoints=9, save_seconds=3600)
    spec = Pretrain.model_validate(
        {"model": "m", "dataset": "d", "sequence_length": 32, "optim": optim, "run": run}
    )
    inputs = Inputs(model=str(place.model), dataset=str(dataset))
    whole = run_here(place.task(spec, inputs=inputs))
    losses = list(whole.losses.values())
    assert losses[0] == pytest.approx(math.log(320), rel=0.05)
    assert losses[-1] < losses[0] - 1
    steps = whole.of("step")
    assert steps[0]["tokens"] == 4 * 32
    assert steps[0]["label_tokens"] == 4 * 31
    AutoModelForCausalLM.from_pretrained(whole.last["artifact"])
    resume = whole.of("checkpointed")[1]["path"]
    again = run_here(place.task(spec, inputs=inputs, resume_from=resume))
    assert again.losses == {n: loss for n, loss in whole.losses.items() if n > 6}


def test_a_tokenizer_that_is_brought_along_is_gone_on_with_and_named_in_the_model(place):
    dataset = write_rows(place.folder / "words.jsonl", [document(at) for at in range(16)])
    packed = place.folder / "t.tokenizer"
    (place.folder / "t.model").write_bytes(sentencepiece_model())
    packed.write_bytes(pack(place.folder / "t.model", "t.model"))
    inputs = Inputs(model=str(place.model), dataset=str(dataset), tokenizer=str(packed))
    run = Run(save_steps=2, keep_checkpoints=9, save_seconds=3600)
    spec = Pretrain(model="m", dataset="d", sequence_length=32, run=run, tokenizer="t.model")
    whole = run_here(place.task(spec, inputs=inputs))
    resume = whole.of("checkpointed")[0]["path"]
    again = run_here(place.task(spec, inputs=inputs, resume_from=resume))
    assert again.losses == {n: loss for n, loss in whole.losses.items() if n > 2}
    config = AutoModelForCausalLM.from_pretrained(whole.last["artifact"]).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)
    (place.folder / "t.model").write_bytes(sentencepiece_model(vocab_size=340))
    packed.write_bytes(pack(place.folder / "t.model", "t.model"))
    assert "340 tokens, and the model has room for 320" in str(
        failure(place.task(spec, inputs=inputs))
    )


def test_models_on_the_way_stay_and_survive_a_resume(place):
    dataset = write_rows(place.folder / "way.jsonl", [document(at) for at in range(40)])
    inputs = Inputs(model=str(place.model), dataset=str(dataset))
    run = Run(save_steps=2, keep_checkpoints=9, save_seconds=3600)
    optim = {"batch_size": 4, "max_steps": 7}
    spec = Pretrain(model="m", dataset="d", sequence_length=32, optim=optim, run=run)
    first = place.task(spec, inputs=inputs)
    whole = run_here(first)
    assert len(list(Path(whole.last["artifact"]).glob("step-*"))) == 3
    shutil.rmtree(Path(first.attempt_dir) / STAGES / "step-4")  # killed before it was named
    (Path(first.attempt_dir) / STAGES / "step-3").mkdir()
    (Path(first.attempt_dir) / STAGES / "step-3" / "secret").symlink_to("/etc/hostname")
    fewer = spec.model_copy(update={"keep_stages": 3})
    resume = whole.of("checkpointed")[1]["path"]
    folder = Path(run_here(place.task(fewer, inputs=inputs, resume_from=resume)).last["artifact"])
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-2", "step-4", "step-6"]
    manifest.verify(folder)
    for name in ("step-4", "step-6"):
        AutoModelForCausalLM.from_pretrained(folder / name)
        AutoTokenizer.from_pretrained(folder / name)
        assert json.loads((folder / name / "training.json").read_bytes())["step"] == int(name[5:])
        stages = (folder / name, Path(whole.last["artifact"]) / name)
        ours, theirs = (load_file(stage / "model.safetensors") for stage in stages)
        assert all(torch.equal(one, theirs[key]) for key, one in ours.items())


def test_pretraining_refuses_rows_that_are_no_text(place):
    spec = Pretrain(model="m", dataset="d", sequence_length=32)
    error = failure(place.task(spec))
    assert error.failure_class is FailureClass.DATA_ERROR
    assert 'pretrain reads rows like {"text"}' in str(error)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_weights_of_few_bits_are_whole_ones_on_a_cpu_and_that_is_said(place, lora, bits):
    run = Run(save_seconds=3600, quantization=bits)
    asked = run_here(place.task(sft(lora, max_steps=2, run=run)))
    plain = run_here(place.task(sft(lora, max_steps=2)))
    assert asked.losses == plain.losses
    [notice] = [one for one in asked.of("notice") if one["code"] == "quantization_off"]
    assert notice["level"] == "warning"
    assert bits in notice["message"]
    assert asked.last["type"] == "finished"

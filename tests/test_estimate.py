"""What is told of a job beforehand is what its trainer then finds."""

import time
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from api_fixtures import ASKED, make_workspace, open_door
from train_fixtures import (
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
from tunesmith.data.fit import Cut
from tunesmith.data.measure import FEWEST_ROWS, MOST_BYTES, MOST_ROWS, measure
from tunesmith.data.reading import Reading
from tunesmith.data.render import Renderer
from tunesmith.data.rows import RowIndex
from tunesmith.hub import needs
from tunesmith.hub.estimate import Ran, foretell
from tunesmith.hub.folder import read
from tunesmith.spec.estimate import Estimate
from tunesmith.spec.train import (
    AnySpec,
    Grpo,
    Kto,
    Lora,
    Preference,
    Pretrain,
    PretrainOptim,
    Reward,
    Run,
    Sft,
)

TEXTS = [{"text": f"die Katze {'schläft ' * (3 + i % 9)}🐈 고양이"} for i in range(40)]
CASES: dict[str, tuple[AnySpec, list[dict[str, Any]]]] = {
    "full": (sft(epochs=2), pairs(30)),
    "lora": (sft(Lora(rank=4, dropout=0.2)), pairs(30)),
    "targets": (sft(Lora(rank=3, targets=("q_proj", "mlp.down_proj"))), pairs(9)),
    "cut": (sft(max_length=16, overlong="truncate", epochs=1.5), pairs(30, 60)),
    "dropped": (sft(max_length=24), pairs(30, 60)),
    "few steps": (sft(max_steps=2), pairs(30)),
    "dpo": (tuned(Preference), preferences(20)),
    "reward": (tuned(Reward), preferences(20)),
    "kto of pairs": (tuned(Kto), preferences(20)),
    "kto": (tuned(Kto), judged(20)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("estimate") / "model")


def foretold(place: Place, spec: AnySpec, history: list[Ran] | None = None) -> Estimate:
    folder = read(place.model)
    with RowIndex.open(place.dataset, Reading.of(spec)) as index:
        renderer = Renderer.load(place.model).with_fallback(index.format)
        cut = None if isinstance(spec, Pretrain) else Cut(spec.max_length, spec.overlong)
        found = measure(index, renderer, cut)
    return foretell(spec, folder, found, history or [], False)


@pytest.mark.parametrize("name", CASES)
def test_steps_tokens_and_parameters_are_those_of_the_trainer(
    model: Path, tmp_path: Path, name: str
) -> None:
    spec, rows = CASES[name]
    place = Place(tmp_path, model, write_rows(tmp_path / "rows.jsonl", rows))
    told = foretold(place, spec)
    events = run_here(place.task(spec))
    [started], finished = events.of("started"), events.last["detail"]
    assert told.trainable_parameters == started["trainable_parameters"]
    assert told.steps == finished["steps"]
    assert told.is_exact
    if spec.optim.max_steps is None and spec.optim.epochs == int(spec.optim.epochs):
        assert told.tokens == finished["tokens"]
        assert told.label_tokens == finished["label_tokens"]
    assert told.tokens == pytest.approx(finished["tokens"], rel=0.25)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_from_scratch_is_counted_from_its_configuration(tmp_path: Path, tied: bool) -> None:
    spec = Pretrain(model="m", dataset="d", sequence_length=32)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    config.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    exact = sum(one.numel() for one in LlamaForCausalLM(config).parameters())
    assert needs.parameters(spec, read(tmp_path)) == pytest.approx(exact, rel=0.02)


def test_documents_are_counted_as_they_are_packed(model: Path, tmp_path: Path) -> None:
    place = Place(tmp_path, model, write_rows(tmp_path / "rows.jsonl", TEXTS))
    spec = Pretrain(
        model="m",
        dataset="d",
        sequence_length=32,
        optim=PretrainOptim(epochs=2, batch_size=4),
        from_scratch=False,
    )
    told = foretold(place, spec)
    finished = run_here(place.task(spec)).last["detail"]
    assert (told.steps, told.tokens) == (finished["steps"], finished["tokens"])


def test_a_large_file_is_looked_at_here_and_there(model: Path, tmp_path: Path) -> None:
    short = [{"prompt": "a", "completion": "b"}] * (2 * MOST_ROWS)
    long = [{"prompt": "a " * (MOST_BYTES // 8), "completion": "b"}] * 40
    renderer = Renderer.load(model)
    for rows, looked_at in ((short, MOST_ROWS), (long, FEWEST_ROWS)):
        with RowIndex.open(write_rows(tmp_path / "rows.jsonl", rows)) as index:
            found = measure(index, renderer, Cut(1 << 20, "drop"))
        assert (found.rows, found.usable, found.is_exact) == (len(rows), 1.0, False)
        assert looked_at <= found.looked_at <= 2 * looked_at


@pytest.mark.parametrize("name", ["lora", "dpo", "kto", "cut"])
def test_a_probe_changes_nothing_of_what_follows(model: Path, tmp_path: Path, name: str) -> None:
    spec, rows = CASES[name]
    place = Place(tmp_path, model, write_rows(tmp_path / "rows.jsonl", rows))
    told = run_here(place.task(spec, is_probe=True))
    [probed] = told.of("probed")
    assert told.last["type"] == "stopped"
    assert probed["samples"] == 4
    assert probed["tokens"] >= 4 * foretold(place, spec).tokens / (2 * len(rows))
    plain = run_here(place.task(spec))
    first = run_here(place.task(spec.model_copy(update={"run": Run(probe=True)})))
    assert first.of("probed")[0]["tokens"] == probed["tokens"]
    assert first.losses == plain.losses


def test_a_sweep_takes_what_its_configurations_take(model: Path, tmp_path: Path) -> None:
    place = Place(tmp_path, model, write_rows(tmp_path / "rows.jsonl", pairs(30)))
    trials = ({"rank": 2, "max_steps": 2}, {"rank": 4, "batch_size": 8})
    spec = sft(Lora(), sweep={"trials": trials})
    told = foretold(place, spec)
    [started] = run_here(place.task(spec)).of("started")
    assert told.trainable_parameters == started["trainable_parameters"]
    assert told.steps == started["total_steps"]


def test_time_is_told_from_the_jobs_that_ran_here(model: Path, tmp_path: Path) -> None:
    place = Place(tmp_path, model, write_rows(tmp_path / "rows.jsonl", pairs(30)))
    slow, fast = Ran(False, 1e6), Ran(False, 1e9)
    assert foretold(place, sft()).seconds_from == "guess"
    told = foretold(place, sft(), [slow, Ran(True, 1e15)])
    assert told.seconds_from == "history"
    assert told.seconds > foretold(place, sft(), [fast]).seconds


def test_an_estimate_costs_no_job_and_is_shown_beside_one(tmp_path: Path) -> None:
    with open_door(make_workspace(tmp_path)) as door:
        asked = ASKED | {"num_epochs": 2}
        answer = door.post("/train/sft/estimate", json=asked)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert (told["rows"], told["steps"], told["is_exact"]) == (8, 4, True)
        assert door.get("/jobs").json() == []
        job_id = door.post("/train/sft", json=asked).json()["job_id"]
        for _ in range(100):  # until its data is checked
            shown = door.get(f"/jobs/{job_id}").json()["estimate"]
            if shown:
                break
            time.sleep(0.05)
        assert shown.pop("actual")["steps"] == 0
        assert shown.pop("probe") is None
        assert shown == told
        second = door.post("/train/sft", json=asked | {"seed": 1}).json()["job_id"]
        assert door.get(f"/jobs/{second}").json()["estimate"]["tokens"] == told["tokens"]


@pytest.mark.parametrize(
    ("over", "status", "word"),
    [
        ({"model_name": "models/none"}, 404, "model_name"),
        ({"dataset_path": "data/none.jsonl"}, 404, "dataset_path"),
        ({"batch_size": 0}, 422, "batch_size"),
        ({"model_name": "../x"}, 400, "model_name"),
    ],
)
def test_what_is_wrong_is_said(
    tmp_path: Path, over: dict[str, Any], status: int, word: str
) -> None:
    with open_door(make_workspace(tmp_path)) as door:
        answer = door.post("/train/sft/estimate", json=ASKED | over)
        assert answer.status_code == status
        assert word in answer.text


def test_what_rewards_take_is_counted(tmp_path: Path) -> None:
    """A second copy of what is trained, a reward model's weights, a function's memory."""
    folder = read(make_model(tmp_path / "model"))

    def bytes_of(**over: Any) -> int:
        return needs.of(tuned(Grpo, max_completion_length=8, **over), folder).memory_bytes

    weights = 4 * folder.parameters
    plain = bytes_of(rewards=[{"kind": "exact_match"}])
    alone = needs.of(tuned(Sft), folder).memory_bytes
    assert plain - alone == weights
    assert bytes_of(rewards=[{"kind": "python", "code": "x"}]) - plain == 512 << 20
    spec = tuned(Grpo, rewards=[{"kind": "model", "model": "m"}], max_completion_length=8)
    assert needs.of(spec, folder, rewarding=[folder]).memory_bytes - plain == weights
    assert bytes_of() - plain == pytest.approx(weights, rel=0.01)
    assert needs.checkpoint_bytes(tuned(Grpo), folder) == pytest.approx(
        16 * folder.parameters, 1e-3
    )

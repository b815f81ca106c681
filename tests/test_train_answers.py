"""Held-out rows that the model answers while it is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from train_fixtures import Place, make_model, pairs, run_here, sft, write_rows
from tunesmith.data.rouge import rouge_l
from tunesmith.spec.pipe import Inputs
from tunesmith.spec.train import Kto, Lora, Pretrain, Reward, Run

ROWS = pairs(12, 5)
TOKENS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("answers")
    return Place(folder, make_model(folder / "model"), write_rows(folder / "rows.jsonl", ROWS))


def run(place: Place, lora: Lora | None = None, rows: int = 100, **over: Any) -> Any:
    """The rows that are learnt are those that are asked, so that answers get right."""
    asked = Run(generated_rows=rows, generated_tokens=TOKENS, save_seconds=3600)
    spec = sft(lora, run=asked, eval_dataset="e", **{"learning_rate": 2e-2, **over})
    path = str(place.dataset)
    return run_here(
        place.task(spec, inputs=Inputs(model=str(place.model), dataset=path, eval_dataset=path))
    )


def test_what_is_measured_is_what_plain_transformers_answers(place: Place) -> None:
    events = run(place, epochs=12.0)
    told = [one["metrics"] for one in events.of("evaluated")]
    assert told[0]["eval_rougeL"] < told[-1]["eval_rougeL"]
    folder = Path(events.last["artifact"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    near, exact = [], []
    for row in ROWS:
        ids = tokenizer(row["prompt"], return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)
        said = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        near.append(rouge_l(said, row["completion"]))
        exact.append(said.strip() == row["completion"].strip())
    assert told[-1]["eval_rougeL"] == pytest.approx(sum(near) / len(near))
    assert told[-1]["eval_exact_match"] == pytest.approx(sum(exact) / len(exact))


def test_training_is_the_same_with_and_without(place: Place) -> None:
    lora = Lora(rank=4, dropout=0.3)
    asked, plain = run(place, lora, epochs=2.0), run(place, lora, rows=0, epochs=2.0)
    assert asked.losses == plain.losses
    assert "eval_rougeL" not in plain.of("evaluated")[-1]["metrics"]


def test_each_adapter_of_a_sweep_answers_for_itself(place: Place) -> None:
    trials = [{"learning_rate": 1e-3}, {"learning_rate": 2e-1, "rank": 8}]
    swept = run(place, Lora(rank=4), epochs=6.0, sweep={"trials": trials})
    found = {one["trial"]: one["metrics"]["eval_rougeL"] for one in swept.of("evaluated")}
    alone = run(place, Lora(rank=8), epochs=6.0, learning_rate=2e-1)
    assert found["trial-2"] == alone.of("evaluated")[-1]["metrics"]["eval_rougeL"]
    assert found["trial-1"] != found["trial-2"]


@pytest.mark.parametrize("kind", [Kto, Pretrain, Reward])
def test_methods_with_no_right_answer_refuse_it(kind: Any) -> None:
    with pytest.raises(ValueError, match="generated_rows"):
        kind(model="m", dataset="d", run=Run(generated_rows=1), eval_dataset="e")

"""A training specification in a file: faults are told in words that help."""

import json
from pathlib import Path

import pytest

from tunesmith.cli.specfile import EXAMPLE, read_spec
from tunesmith.errors import NotFoundError, ValidationError
from tunesmith.spec.train import Pretrain, Sft
from tunesmith.spec.written import parse, schema


def test_the_example_is_valid() -> None:
    spec = parse(EXAMPLE).spec
    assert isinstance(spec, Sft)
    assert spec.optim.learning_rate == 2e-4


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "학습.yaml"
    path.write_text("method: pretrain\nmodel: 모델\ndataset: 数据.txt\n", encoding="utf-8")
    spec = read_spec(path)
    assert isinstance(spec, Pretrain)
    assert spec.model == "모델"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{model: m, dataset: d, optim: {learning_rat: 1}}", "did you mean 'optim.learning_rate'?"),
        ("{model: m, dataset: d, learning_rate: 1}", "did you mean 'optim.learning_rate'?"),
        ("{model: m, datset: d}", "unknown field 'datset'; did you mean 'dataset'?"),
        ("{model: m, dataset: d, lora: {r: 8}}", "unknown field 'lora.r'"),
        ("{model: m, dataset: d, epoch: 3}", "did you mean 'optim.epochs'?"),
        ("{model: m}", "'dataset' is missing"),
        ("{model: m, dataset: d, method: stf}", "write sft, pretrain, dpo,"),
        ("{model: m, dataset: d, method: [1]}", "grpo, rloo or ppo"),
        ("{model: m, dataset: d, optim: {epochs: -1}}", "optim.epochs: input should be greater"),
        ("{model: m, dataset: d, optim: {epochs: many}}", "optim.epochs: "),
        ("{model: m, dataset: d, method: dpo, bta: 1}", "did you mean 'beta'?"),
        ("{model: m, dataset: d, method: dpo, loss: ipo, label_smoothing: 0.1}", "leave it 0"),
        ("{model: m, dataset: d, method: kto, optim: {batch_size: 1}}", "has to be 2 or more"),
        ("[1, 2]", "holds no fields"),
        ("", "holds no fields"),
    ],
)
def test_a_fault_is_told_with_what_would_be_right(text: str, told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        parse(text)
    faults = [str(entry["msg"]) for entry in caught.value.details]
    assert any(told in line for line in [str(caught.value), *faults])


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(EXAMPLE)
    with pytest.raises(NotFoundError, match=r"did you mean 'train\.yaml'"):
        read_spec(tmp_path / "trian.yaml")


def test_the_schema_names_every_field() -> None:
    text = json.dumps(schema())
    assert all(name in text for name in ("learning_rate", "save_seconds", "pretrain", "rank"))

"""What is refused before a model is opened, and with which words."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nn_fixtures import LEAN, load, samples, write_model
from tunesmith.errors import FailureClass, JobFailure
from tunesmith.nn.batch import flatten
from tunesmith.nn.language import open_model
from tunesmith.nn.weights import read_tensors, write_tensors
from tunesmith.spec.train import Lora


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(write_model(LEAN["llama"], tmp_path / "모델 🌱"))


def refusal(folder: Path | str, **asked: Any) -> str:
    with pytest.raises(JobFailure) as caught:
        open_model(str(folder), **({"lora": None} | asked))
    assert caught.value.failure_class is FailureClass.USER_ERROR
    assert caught.value.hint
    return str(caught.value)


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_folder_of_any_name_opens(folder: Path) -> None:
    assert open_model(str(folder), lora=None).is_lean


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path)


def test_code_in_the_folder_is_refused(folder: Path) -> None:
    (folder / "modeling_mine.py").write_text("print('never')")
    assert "modeling_mine.py" in refusal(folder)


def test_a_config_that_names_code_is_refused(folder: Path) -> None:
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "mine.Model"})
    assert "auto_map" in refusal(folder)


def test_a_pickle_is_refused_unread(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickle" in refusal(folder)


def test_missing_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(folder)


def test_a_cut_weights_file_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "model.safetensors" in refusal(folder)


def test_a_config_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{not json")
    assert "JSON" in refusal(folder)


def test_an_unknown_architecture_is_refused(folder: Path) -> None:
    change(folder / "config.json", model_type="nonesuch")
    assert "nonesuch" in refusal(folder)


def test_an_adapter_whose_base_is_gone_is_refused(folder: Path, tmp_path: Path) -> None:
    open_model(str(folder), lora=Lora()).save(tmp_path / "adapter")
    change(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="/gone/모델")
    assert "/gone/모델" in refusal(tmp_path / "adapter", lora=Lora())


def test_an_adapter_of_another_kind_is_refused(folder: Path, tmp_path: Path) -> None:
    open_model(str(folder), lora=Lora()).save(tmp_path / "adapter")
    change(tmp_path / "adapter" / "adapter_config.json", peft_type="IA3")
    assert "IA3" in refusal(tmp_path / "adapter")


def test_quantization_on_a_cpu_is_refused_honestly(folder: Path) -> None:
    assert "CUDA" in refusal(folder, lora=Lora(), quantization="4bit")


def test_from_scratch_takes_no_adapter(folder: Path) -> None:
    assert "from_scratch" in refusal(folder, lora=Lora(), from_scratch=True)


def test_weights_over_several_files_read_as_one(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.nn.weights.MAX_FILE_BYTES", 60_000)
    tensors = read_tensors(folder)
    (folder / "model.safetensors").unlink()
    write_tensors(folder, tensors)
    assert len(list(folder.glob("*.safetensors"))) > 3
    again = read_tensors(folder)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(load(folder).lm_head.weight, tensors["lm_head.weight"])
    assert open_model(str(folder), lora=None).loss_sum(flatten(samples((9, 12)))) > 0

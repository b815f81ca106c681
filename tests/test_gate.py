"""The gate before a model's public name: what is served says what was trained, and what does not
is found out and told why."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from house import chats
from train_fixtures import TEMPLATE, Place, make_model, run_here, sft, write_rows
from tunesmith.infer.gate import judge_all
from tunesmith.spec.parity import WITNESSED, Verdict, Witnessed
from tunesmith.spec.train import Lora


class Trained:
    """A job that has run: its artifact, and what its trainer said of it."""

    def __init__(self, place: Place, lora: Lora | None) -> None:
        task = place.task(sft(lora, learning_rate=3e-2, holdout=0.25))
        run_here(task)
        attempt = Path(task.attempt_dir)
        self.artifact = attempt / "artifact"
        told = (attempt / WITNESSED).glob("*.json")
        self.witnessed = [Witnessed.model_validate_json(one.read_bytes()) for one in told]

    def judge(self, folder: Path | None = None) -> Verdict:
        return judge_all(folder or self.artifact, self.witnessed)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("gate")
    rows = write_rows(folder / "rows.jsonl", chats(48))
    return Place(folder, make_model(folder / "model"), rows)


@pytest.fixture(scope="module")
def adapter(place: Place) -> Trained:
    return Trained(place, Lora(rank=4, alpha=16))


@pytest.fixture(scope="module")
def full(place: Place) -> Trained:
    return Trained(place, None)


def test_what_is_served_says_what_was_trained(adapter: Trained, full: Trained) -> None:
    for trained in (adapter, full):
        (witnessed,) = trained.witnessed
        assert len(witnessed.spoken) == 8
        verdict = trained.judge()
        assert verdict.has_passed, verdict.message
        assert verdict.worst < 1e-3
        assert "served = trained" in verdict.message


def change_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("{{ m.role }}\n", "{{ m.role }} "))


def change_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    told = json.loads(path.read_text())
    told["model"]["merges"] = told["model"]["merges"][:5]
    path.write_text(json.dumps(told))


def change_weight(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    next(iter(weights.values()))[0, 0] += 1e-2
    save_file(weights, path, {"format": "pt"})


def flip(module: str) -> Callable[[Path], None]:
    """Turn its rows around, which no sum sees."""

    def change(folder: Path) -> None:
        (path,) = folder.glob("*.safetensors")
        weights = load_file(path)
        turned = {name: one.flip(0).contiguous() for name, one in weights.items() if module in name}
        save_file(weights | turned, path, {"format": "pt"})

    return change


def without_sums(trained: Trained) -> list[Witnessed]:
    return [one.model_copy(update={"sums": {}}) for one in trained.witnessed]


def edit(name: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        told = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(told | changes))

    return change


ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 2.0}}


@pytest.mark.parametrize(
    ("kind", "change", "cause", "word"),
    [
        ("adapter", change_template, "template", "token"),
        ("full", change_tokenizer, "tokenizer", "in training"),
        ("full", change_weight, "weights", "model.embed_tokens.weight"),
        ("adapter", change_weight, "weights", "lora_A"),
        ("full", flip("down_proj"), "weights", "log-probability"),
        ("full", flip("q_proj"), "position", "log-probability"),
        ("adapter", edit("adapter_config.json", lora_alpha=32), "adapter", "lora_alpha was 16"),
        ("full", edit("config.json", **ROPE), "position", "rope_theta"),
        ("full", edit("config.json", rms_norm_eps=0.1), "configuration", "rms_norm_eps"),
    ],
)
def test_what_was_tampered_with_fails_with_its_cause(
    adapter: Trained,
    full: Trained,
    tmp_path: Path,
    kind: str,
    change: Callable[[Path], None],
    cause: str,
    word: str,
) -> None:
    trained = {"adapter": adapter, "full": full}[kind]
    folder = tmp_path / "served"
    shutil.copytree(trained.artifact, folder)
    change(folder)
    verdict = trained.judge(folder)
    assert not verdict.has_passed
    assert verdict.cause == cause, verdict.message
    assert word in verdict.message, verdict.message


def test_an_adapter_that_changes_nothing_is_told_as_missing(
    adapter: Trained, tmp_path: Path
) -> None:
    folder = tmp_path / "served"
    shutil.copytree(adapter.artifact, folder)
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: torch.zeros_like(one) for name, one in weights.items()}, path)
    verdict = judge_all(folder, without_sums(adapter))
    assert verdict.cause == "adapter_missing", verdict.message

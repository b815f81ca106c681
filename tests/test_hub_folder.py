"""Model folders made by somebody else: looked at, never believed."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from api_fixtures import (
    ASKED,
    ONE,
    copy_model,
    hub_of,
    make_adapter,
    make_workspace,
    open_door,
    safetensors,
)
from tunesmith.errors import BadRequestError
from tunesmith.hub.folder import read

CONFIGS = {
    "a list": b"[]",
    "bottomless": b'{"a":' * 100_000,
    "huge": b" " * (5 << 20) + b"{}",
    "no text": b"\0" * 10,
    "code": b'{"auto_map": {"AutoModel": "evil.Model"}}',
}
WEIGHTS = {
    "empty": b"",
    "a longer header than the file": b"\xff" * 7 + b"\x00",
    "bottomless": safetensors(b'{"a":' * 100_000),
    "a list": safetensors(b"[]"),
    "no tensor": safetensors(b'{"a": 5}'),
    "text for a side": safetensors(
        b'{"a": {"dtype": "F32", "shape": ["a", 999999999], "data_offsets": [0, 4]}}'
    ),
    "infinite sides": safetensors(
        b'{"a": {"dtype": "F32", "shape": [1e300, 1e300], "data_offsets": [0, 4]}}'
    ),
    "more numbers than bytes": safetensors(
        b'{"a": {"dtype": "F32", "shape": [100000, 100000], "data_offsets": [0, 4]}}'
    ),
}
SIZES = [
    {"text_config": []},
    {"text_config": 5},
    {"hidden_size": -5, "num_hidden_layers": -1},
    {"hidden_size": 10**400, "num_hidden_layers": 10**9},
    {"hidden_size": 1 << 24, "num_hidden_layers": 1 << 24, "intermediate_size": 1 << 24},
    {"max_position_embeddings": 10**30},
    {"hidden_size": "a", "vocab_size": True},
]


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with open_door(make_workspace(tmp_path_factory.mktemp("folders"))) as door:
        yield door


@pytest.fixture
def model(door: TestClient) -> Iterator[Path]:
    place = copy_model(hub_of(door).workspace, "odd")
    yield place
    shutil.rmtree(place)


def ask(door: TestClient, name: str = "models/odd") -> tuple[int, str]:
    """Both routes that look at a model: neither fails, neither waits."""
    shown = door.get(f"/v1/models/{name}", headers=ONE)
    trained = door.post("/train/sft", json=ASKED | {"model_name": name})
    assert shown.status_code < 500
    return trained.status_code, trained.text


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_configuration_is_refused(door: TestClient, model: Path, name: str) -> None:
    (model / "config.json").write_bytes(CONFIGS[name])
    status, text = ask(door)
    assert status == 400
    assert "model_name" in text


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_lie_are_refused(door: TestClient, model: Path, name: str) -> None:
    (model / "model.safetensors").write_bytes(WEIGHTS[name])
    assert ask(door)[0] == 400


@pytest.mark.parametrize("sizes", SIZES, ids=range(len(SIZES)))
def test_senseless_sizes_break_no_estimate(
    door: TestClient, model: Path, sizes: dict[str, object]
) -> None:
    body = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps(body | sizes))
    assert ask(door)[0] in (200, 400, 507)


@pytest.mark.parametrize("body", [b"{", b"[]", b"", b"[" * 100_000])
def test_a_broken_tokenizer_is_told(door: TestClient, model: Path, body: bytes) -> None:
    (model / "tokenizer.json").write_bytes(body)
    status, text = ask(door)
    assert status == 422
    assert "tokenizer.json" in text


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_in_a_model_folder_is_not_waited_for(
    door: TestClient, model: Path, name: str
) -> None:
    (model / name).unlink()
    os.mkfifo(model / name)
    assert ask(door)[0] == 400


def test_code_beside_the_tokenizer_is_refused(door: TestClient, model: Path) -> None:
    (model / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["e.T", null]}}')
    status, text = ask(door)
    assert status == 400
    assert "auto_map" in text


def test_pickled_weights_are_not_read(door: TestClient, model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    status, text = ask(door)
    assert status == 400
    assert "safetensors" in text


@pytest.mark.parametrize("place", ["../../../etc/passwd", "/etc/passwd", "sub/a.safetensors", ""])
def test_an_index_names_only_files_of_its_folder(door: TestClient, model: Path, place: str) -> None:
    index = {"weight_map": {"lm_head.weight": place}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert ask(door)[0] == 400


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_workspace_is_not_followed(
    door: TestClient, model: Path, tmp_path: Path, name: str
) -> None:
    shutil.move(model / name, tmp_path / name)
    (model / name).symlink_to(tmp_path / name)
    status, text = ask(door)
    assert status == 400
    assert "out of the workspace" in text
    assert str(tmp_path) not in text


def test_an_adapter_stands_on_a_model_of_the_workspace_or_a_registered_one(
    door: TestClient, tmp_path: Path
) -> None:
    workspace = hub_of(door).workspace
    outside = tmp_path / "outside"
    shutil.copytree(workspace / "models" / "tiny", outside)
    make_adapter(workspace / "models" / "out", str(outside))
    make_adapter(workspace / "models" / "up", os.path.relpath(outside, workspace / "models" / "up"))
    make_adapter(workspace / "models" / "in", str(workspace / "models" / "tiny"))
    assert ask(door, "models/in")[0] == 200
    for name in ("models/out", "models/up"):
        assert ask(door, name)[0] == 400
    hub_of(door).register_model("base", str(outside))
    for name in ("models/out", "models/up"):
        assert ask(door, name)[0] == 200


@pytest.mark.parametrize("base", [".", "a\0b", "a/" * 5000, "gpt2", "/etc", "/dev/zero"])
def test_an_adapter_on_nothing_is_refused(tmp_path: Path, base: str) -> None:
    place = make_adapter(tmp_path / "adapter", base)
    with pytest.raises(BadRequestError):
        read(place)

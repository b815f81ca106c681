"""POST /train/config: a configuration's file over HTTP, of any method."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from api_fixtures import LOCAL, copy_model, hub_of, make_workspace, open_door
from house import preferences
from servers import wait_for
from task_files import LORA, SFT, sentencepiece_model
from train_fixtures import write_rows
from tunesmith.errors import NotFoundError
from tunesmith.hub.principal import Principal
from tunesmith.hub.tokenizers import renderer
from tunesmith.spec.rewards import RewardService
from tunesmith.spec.train import Kto, Lora, Sft
from tunesmith.spec.yaml_guard import MAX_BYTES
from tunesmith.store.listing import pinned

YAML = {"Content-Type": "application/yaml"}
HERE = {
    "qwen-7b": "models/tiny",
    "llama2-7b": "models/tiny",
    "datasets/sft_dataset.jsonl": "data/chat.jsonl",
    "datasets/lora_demo.jsonl": "data/chat.jsonl",
}


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    place = make_workspace(tmp_path_factory.mktemp("configured"))
    write_rows(place / "data" / "pairs.jsonl", preferences(8))
    with open_door(place) as door:
        yield door


def here(text: str) -> str:
    for name, path in HERE.items():
        text = text.replace(name, path)
    return text


def send(door: TestClient, text: str, **asked: Any) -> Any:
    return door.post("/train/config", content=text.encode(), **({"headers": YAML} | asked))


def spec_of(door: TestClient, answer: Any) -> Any:
    assert answer.status_code == 200, answer.text
    return hub_of(door).job(answer.json()["job_id"], Principal.local()).spec


def test_a_tasks_file_makes_a_job_and_is_shown_in_its_own_words(door: TestClient) -> None:
    answer = send(door, here(SFT))
    assert answer.json().keys() == {"job_id", "status", "message"}
    assert answer.json()["message"] == "SFT training job created"
    spec = spec_of(door, answer)
    assert isinstance(spec, Sft)
    assert (spec.lora, spec.max_length) == (None, 2048)
    told = door.get(f"/jobs/{answer.json()['job_id']}").json()
    assert told["training_type"] == "sft"
    assert told["config"]["task_type"] == "sft"
    assert told["config"]["model_name"] == "models/tiny"
    assert told["config"]["weight_decay"] == 0


def test_the_loras_file_is_never_refused_for_want_of_a_gpu(door: TestClient) -> None:
    spec = spec_of(door, send(door, here(LORA)))
    assert spec.lora == Lora(rank=8, alpha=16, dropout=0.05)


def test_a_specification_of_any_method_makes_a_job(door: TestClient) -> None:
    body = {"method": "kto", "model": "models/tiny", "dataset": "data/pairs.jsonl", "beta": 0.2}
    asked = {"json": body, "params": {"suffix": "wanted", "priority": 3}}
    answer = door.post("/train/config", **asked)
    spec = spec_of(door, answer)
    assert isinstance(spec, Kto)
    assert spec.beta == 0.2
    told = door.get(f"/jobs/{answer.json()['job_id']}").json()
    assert (told["training_type"], told["config"]["model"]) == ("kto", "models/tiny")


def test_one_key_makes_one_job(door: TestClient) -> None:
    headers = YAML | {"Idempotency-Key": "the-one"}
    made = {send(door, here(SFT), headers=headers).json()["job_id"] for _ in range(3)}
    assert len(made) == 1
    assert send(door, here(LORA), headers=headers).status_code == 422


def test_every_fault_is_told_with_line_and_key(door: TestClient) -> None:
    answer = send(door, here(SFT) + "learning_rat: 1\nseed: x\n")
    assert answer.status_code == 422
    assert answer.json()["detail"] == [
        {"loc": ["line", 8, "learning_rat"], "msg": "unknown key; did you mean 'learning_rate'?"},
        {
            "loc": ["line", 9, "seed"],
            "msg": "has to be a valid integer, unable to parse string as an integer",
        },
    ]


@pytest.mark.parametrize(
    ("text", "status", "told"),
    [
        (SFT, 404, "model_name: no model 'qwen-7b'"),
        (LORA, 404, "base_model: no model 'llama2-7b'"),
        (here(SFT).replace("data/chat.jsonl", "data/none.jsonl"), 404, "dataset: no data set"),
        (here(SFT).replace("data/chat.jsonl", "/etc/passwd"), 400, "dataset"),
        (here(SFT).replace("models/tiny", "../.."), 400, "model_name"),
        (here(SFT) + "output_path: ../out", 400, "output_path"),
        (here(SFT).replace("data/chat.jsonl", "data/pairs.jsonl"), 422, "dataset: 'data/pairs"),
        ("", 422, "holds no fields"),
        ("[1", 422, "line"),
        ("a: *b", 422, "aliases"),
        ("[" * 100_000, 422, "deep"),
        ("\x00", 422, ""),
    ],
)
def test_what_cannot_be_trained_is_refused(
    door: TestClient, text: str, status: int, told: str
) -> None:
    answer = send(door, text)
    assert answer.status_code == status, answer.text
    assert told in answer.text


TEXT = "task_type: pretrain\nmodel_name: models/bare\ndataset: data/text.txt\nval_size: 0\n"


def test_a_tokenizer_stands_in_for_one_that_the_model_has_not(door: TestClient) -> None:
    place = hub_of(door).workspace
    bare = copy_model(place, "bare")
    (bare / "tokenizer.json").unlink()
    (place / "data" / "text.txt").write_text("강물\n\nriver")
    (place / "t.model").write_bytes(sentencepiece_model())
    assert "no tokenizer.json" in send(door, TEXT).text
    answer = send(door, TEXT + "tokenizer_path: t.model")
    assert answer.status_code == 200, answer.text
    job = hub_of(door).job(answer.json()["job_id"], Principal.local())
    assert job.tokenizer is not None
    (place / "t.model").write_bytes(b"changed")
    assert renderer(job.tokenizer).encode_text("river")
    assert hub_of(door).store.read(pinned) >= {job.tokenizer.sha256}


def test_a_stage_of_a_job_that_runs_is_found_by_name(door: TestClient) -> None:
    hub, who = hub_of(door), Principal.local()
    job_id = send(door, here(SFT)).json()["job_id"]
    for fence in (2, 10):
        stages = hub.settings.home / "jobs" / job_id / "attempts" / str(fence) / "stages"
        shutil.copytree(hub.workspace / "models" / "tiny", stages / "step-5")
    found = hub.find_model(f"ft:tiny:local::{job_id}:step-5", who)
    assert found.folder.path == stages / "step-5"
    for name in ("step-6", "step-05", "..", "step-5/../step-5"):
        with pytest.raises(NotFoundError):
            hub.find_model(f"ft:tiny:local::{job_id}:{name}", who)


@pytest.mark.parametrize(
    ("name", "status", "told"),
    [
        ("none.model", 404, "nothing lies at 'none.model'"),
        ("../t.model", 400, "tokenizer_path"),
        ("/etc/passwd", 400, "tokenizer_path"),
        (".tunesmith", 400, "private"),
        ("data/text.txt", 422, "it is no tokenizer; give a folder"),
        ("wide.model", 422, "has 340 tokens, and the model has room for 320; set vocab_size in "),
    ],
)
def test_a_tokenizer_that_cannot_be_is_refused(
    door: TestClient, name: str, status: int, told: str
) -> None:
    place = hub_of(door).workspace
    (place / "wide.model").write_bytes(sentencepiece_model(vocab_size=340))
    answer = send(door, TEXT.replace("bare", "tiny") + f"tokenizer_path: {name}")
    assert answer.status_code == status, answer.text
    assert told in answer.text


def test_a_body_over_the_limit_or_of_another_kind_is_refused(door: TestClient) -> None:
    assert send(door, "#" * (MAX_BYTES + 1)).status_code == 413
    plain = send(door, here(SFT), headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415
    assert "application/yaml" in plain.text
    stranger = {"X-API-Key": "wrong"} | YAML
    assert send(door, here(SFT), headers=stranger).status_code == 401


def test_the_client_sends_a_file_or_a_mapping(tmp_path: Path, door: TestClient) -> None:
    """As `tuning_sdk` writes it: JSON, told as YAML."""
    answer = send(
        door, json.dumps({"task_type": "lora", "base_model": "models/tiny", "data": "🌊"})
    )
    assert answer.status_code == 404
    assert "data: no data set '🌊'" in answer.text
    assert str(door.base_url) == LOCAL


def test_a_reward_model_is_pinned_and_counted(door: TestClient) -> None:
    workspace = hub_of(door).workspace
    folder = copy_model(workspace, "rm", architectures=["LlamaForSequenceClassification"])
    text = "method: grpo\nmodel: models/tiny\ndataset: data/pairs.jsonl\n"
    text += "max_completion_length: 16\nrewards:\n- kind: "
    plain = hub_of(door).job(send(door, text + "exact_match").json()["job_id"], Principal.local())
    answer = send(door, text + "model\n  model: models/rm")
    job = hub_of(door).job(answer.json()["job_id"], Principal.local())
    assert [(one.name, one.path) for one in job.reward_models] == [("models/rm", str(folder))]
    size = (folder / "model.safetensors").stat().st_size
    assert job.needs.memory_bytes - plain.needs.memory_bytes == pytest.approx(size, rel=0.1)


@pytest.mark.parametrize(
    ("name", "why", "status"),
    [
        ("models/tiny", "is no reward model", 400),
        ("models/none", "no model 'models/none'", 404),
        ("../rm", "", 400),
    ],
)
def test_what_is_no_reward_model_is_refused_at_once(
    door: TestClient, name: str, why: str, status: int
) -> None:
    body = {"method": "grpo", "model": "models/tiny", "dataset": "data/pairs.jsonl"}
    body |= {"max_completion_length": 16}
    rewards = [{"kind": "model", "model": name}]
    answer = door.post("/train/config", json=body | {"rewards": rewards})
    assert answer.status_code == status
    assert answer.json()["detail"].startswith("rewards")
    assert why in answer.json()["detail"]


def test_a_rule_that_is_none_is_refused_at_once(door: TestClient) -> None:
    body = {"method": "grpo", "model": "models/tiny", "dataset": "data/pairs.jsonl"}
    body |= {"max_completion_length": 16}
    rewards = [{"kind": "json_schema", "json_schema": {"$ref": "http://127.0.0.1/schema"}}]
    answer = door.post("/train/config", json=body | {"rewards": rewards})
    assert answer.status_code == 422
    assert "rewards: the schema's $ref" in answer.text


def test_a_reward_service_may_be_no_closed_address(door: TestClient) -> None:
    text = "task_type: rl\nalgorithm: grpo\nmodel: models/tiny\ndataset: data/pairs.jsonl\n"
    text += "max_new_tokens: 16\n"
    answer = send(door, text + "reward_model: http://169.254.169.254/latest\n")
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("reward_model: 169.254.169.254 is never")
    spec = spec_of(door, send(door, text + "reward_model: http://127.0.0.1:9000/score\n"))
    assert spec.rewards == (RewardService(url="http://127.0.0.1:9000/score"),)


def test_completions_that_leave_no_room_for_a_prompt_are_refused_at_once(door: TestClient) -> None:
    body = {"method": "grpo", "model": "models/tiny", "dataset": "data/pairs.jsonl"}
    answer = door.post("/train/config", json=body)
    assert answer.status_code == 400
    assert "max_completion_length: 512 leaves no room for a prompt" in answer.json()["detail"]


def test_pairs_that_a_reward_model_cannot_be_trained_on_are_found_before_a_claim(
    door: TestClient,
) -> None:
    rows = [{"prompt": "빛", "chosen": "돌 " * 200, "rejected": "물 " * 200}] * 2
    write_rows(hub_of(door).workspace / "data" / "long.jsonl", rows)
    body = {"method": "grpo", "model": "models/tiny", "dataset": "data/long.jsonl"}
    body |= {"max_completion_length": 8, "max_length": 64}
    asked = door.post("/train/config", json=body | {"rewards": [{"kind": "exact_match"}]})
    assert asked.status_code == 200
    job_id = door.post("/train/config", json=body).json()["job_id"]
    wait_for(lambda: door.get(f"/jobs/{job_id}").json()["status"] == "failed", "the check")
    assert "longer than 64 tokens" in door.get(f"/jobs/{job_id}").json()["error"]
    again = door.post("/train/config", json=body)
    assert (again.status_code, "longer than 64" in again.text) == (422, True)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rewards: [{kind: nothing}]", "rewards.0: kind 'nothing' is unknown; write one of exact"),
        ("rewards: [{}]", "rewards.0: kind is missing"),
        ("rewards: [{kind: numeric, tolerance: -1}]", "rewards.0.numeric.tolerance: input should"),
        ("rewards: [{kind: trained}, {kind: trained}]", "one reward model is trained first"),
        ("rewards: []", "rewards: tuple should have at least 1 item"),
    ],
)
def test_a_reward_that_is_none_is_told_once_and_where(
    door: TestClient, text: str, told: str
) -> None:
    answer = send(door, f"method: grpo\nmodel: models/tiny\ndataset: data/chat.jsonl\n{text}")
    assert answer.status_code == 422
    [fault] = answer.json()["detail"]
    assert fault["msg"].startswith(told)


def test_a_value_of_metadata_that_is_none_is_told_once(door: TestClient) -> None:
    text = "method: pretrain\nmodel: models/tiny\ndataset: d\nsampling: {where: {lang: {a: 1}}}"
    [fault] = send(door, text).json()["detail"]
    assert fault["msg"].startswith("sampling.where.lang.0: has to be a text of up to 1000")


def test_a_long_configuration_is_left_out_of_lists_and_a_longer_one_is_refused(
    door: TestClient,
) -> None:
    def text(count: int) -> str:
        code = "#" * 60_000 + "\ndef reward(**given): return 1"
        told = {"method": "grpo", "model": "models/tiny", "dataset": "data/chat.jsonl"}
        sizes = {"max_completion_length": 16, "max_length": 64}
        return json.dumps(told | sizes | {"rewards": [{"kind": "python", "code": code}] * count})

    job_id = send(door, text(1)).json()["job_id"]
    [listed] = [job for job in door.get("/jobs").json() if job["job_id"] == job_id]
    assert list(listed["config"]) == ["omitted"]
    assert len(door.get(f"/jobs/{job_id}").json()["config"]["rewards"][0]["code"]) > 60_000
    answer = send(door, text(9))
    assert answer.status_code == 413
    assert "262,144 is the limit; shorten what is long in it" in answer.text

"""Ways through the whole house, as a user walks them: real server, worker, trainers, engine."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import PeftModel
from sentencepiece import SentencePieceProcessor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import task_files
from house import KEY, House, chats, open_house
from receivers import Receiver, Say
from train_fixtures import WORDS, write_rows
from tunesmith.spec.tasks.metrics import contract_metrics


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with open_house(tmp_path_factory.mktemp("journeys")) as opened:
        yield opened


@pytest.fixture(scope="module")
def finished(house: House) -> str:
    """A LoRA job that has run to its end."""
    job_id = house.submit(num_epochs=1, learning_rate=1e-3, suffix="mine")
    job = house.wait_end(job_id)
    assert job["status"] == "completed", job
    return job_id


def test_a_job_trains_and_its_events_tell_the_story_in_order(house: House, finished: str) -> None:
    events = house.events(finished)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    kinds = [event["type"] for event in events]
    for earlier, later in [("queued", "validated"), ("claimed", "started"), ("step", "succeeded")]:
        assert kinds.index(earlier) < kinds.index(later)
    assert kinds[-1] == "succeeded"
    (gate,) = [event["data"] for event in events if event["data"].get("code") == "parity"]
    assert gate["message"].startswith("served = trained: 8 conversations")
    steps = [event["data"] for event in events if event["type"] == "step"]
    assert steps[-1]["step"] == steps[-1]["total_steps"] == 16
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert {"learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes"} <= steps[
        0
    ].keys()


def test_a_finished_job_is_shown_as_the_contract_says(house: House, finished: str) -> None:
    job = house.job(finished)
    assert job["training_type"] == "sft"
    assert job["progress"] == 1.0
    assert job["error"] is None
    assert job["config"]["num_epochs"] == 1.0
    assert job["log_file"] == f"outputs/training_logs/job_{finished}.log"
    assert job["output_dir"] == f"outputs/{finished}"
    assert len(job["created_at"]) == len("2024-01-01T10:00:00")
    with house.client as client:
        listed = client.get("/jobs", params={"status": "completed"}).json()
        assert finished in [entry["job_id"] for entry in listed]
        assert client.get(f"/jobs/ftjob-{finished}").json()["job_id"] == finished


def test_the_log_is_a_file_and_its_tail_is_served(house: House, finished: str) -> None:
    with house.client as client:
        tail = client.get(f"/jobs/{finished}/logs", params={"tail": 1}).json()
        whole = client.get(f"/jobs/{finished}/logs", params={"tail": 0}).json()
    assert len(tail["logs"]) == 1
    assert whole["logs"][-1] == tail["logs"][0]
    assert whole["total_lines"] == len(whole["logs"]) == tail["total_lines"]
    assert (house.workspace / "outputs/training_logs" / f"job_{finished}.log").exists()


def test_the_tuned_model_answers_the_official_client(house: House, finished: str) -> None:
    client = openai.OpenAI(api_key="test-key-001", base_url=house.url + "/v1", timeout=120)
    name = f"ft:tiny:local:mine:{finished}"
    assert name in [model.id for model in client.models.list()]
    messages = [{"role": "user", "content": "강물 1"}]
    whole = client.chat.completions.create(
        model=name, messages=messages, max_tokens=8, temperature=0
    )
    parts = client.chat.completions.create(
        model=name, messages=messages, max_tokens=8, temperature=0, stream=True
    )
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert whole.model == name
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 8
    base = client.completions.create(model="models/tiny", prompt="river", max_tokens=4)
    assert base.choices[0].finish_reason in ("length", "stop")


def test_a_model_by_its_output_folder_is_the_same_model(house: House, finished: str) -> None:
    client = openai.OpenAI(api_key="test-key-001", base_url=house.url + "/v1", timeout=120)
    for name in (f"outputs/{finished}", f"ft:tiny:local:mine:{finished}"):
        reply = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "水"}], max_tokens=2
        )
        assert reply.choices


def test_a_job_continues_from_an_adapter_of_an_earlier_one(house: House, finished: str) -> None:
    job_id = house.submit(model_name=f"outputs/{finished}", max_steps=2)
    assert house.wait_end(job_id)["status"] == "completed"
    config = json.loads((house.workspace / "outputs" / job_id / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == house.workspace / "models" / "tiny"


def test_several_configurations_are_one_job_and_each_answers_by_name(house: House) -> None:
    grid = {"lora_r": [2, 4], "learning_rate": [1e-3]}
    job_id = house.submit(max_steps=3, suffix="swept", sweep={"grid": grid})
    job = house.wait_end(job_id)
    assert job["status"] == "completed", job
    assert job["config"]["sweep"]["grid"] == {"rank": [2, 4], "learning_rate": [1e-3]}
    assert [one["settings"]["rank"] for one in job["sweep"]["trials"]] == [2, 4]
    assert {"trial-1/loss", "trial-2/loss"} <= job["metrics"].keys()
    steps = [event["data"] for event in house.events(job_id) if event["type"] == "step"]
    assert [(one["step"], one["trial_step"]) for one in steps] == [
        (number, (number + 1) // 2) for number in range(1, 7)
    ]
    client = openai.OpenAI(api_key="test-key-001", base_url=house.url + "/v1", timeout=120)
    name = f"ft:tiny:local:swept:{job_id}"
    known = [model.id for model in client.models.list()]
    asked = [{"role": "user", "content": "水"}]
    places = (f"outputs/{job_id}/adapters/trial-1", f"{name}:trial-2", name)
    for place in places:
        reply = client.chat.completions.create(model=place, messages=asked, max_tokens=2)
        assert reply.choices
    assert {name, f"{name}:trial-1", f"{name}:trial-2"} <= set(known)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=f"{name}:trial-3", messages=asked)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=f"{name}:../../models", messages=asked)


def test_a_sweep_that_cannot_be_is_refused_in_its_own_words(house: House) -> None:
    for sweep, word in [
        ({"grid": {"lora_r": [2, 4096]}}, "trial-2: rank"),
        ({"grid": {}}, "either a grid or trials"),
        ({"grid": {"batch": [1]}}, "learning_rate"),
        ({"trials": [{"name": "../up"}]}, "pattern"),
    ]:
        body = {"model_name": "models/tiny", "dataset_path": "data/chat.jsonl", "sweep": sweep}
        with house.client as client:
            reply = client.post("/train/sft", json=body)
            assert reply.status_code == 422, reply.text
            assert word in reply.text
            whole = client.post("/train/sft", json={**body, "use_lora": False})
            assert whole.status_code == 422


def test_preferences_are_learnt_on_the_output_of_a_fine_tune_and_answer_a_chat(
    house: House, finished: str
) -> None:
    asked = [{"role": "user", "content": "강물 1"}]
    rows = [
        {
            "prompt": asked,
            "chosen": [{"role": "assistant", "content": WORDS[i % 7]}],
            "rejected": [{"role": "assistant", "content": WORDS[i % 7 + 7]}],
        }
        for i in range(16)
    ]
    write_rows(house.workspace / "data" / "pairs.jsonl", rows)
    body = {
        "model_name": f"outputs/{finished}",
        "dataset_path": "data/pairs.jsonl",
        "learning_rate": 1e-3,
        "suffix": "liked",
    }
    with house.client as client:
        reply = client.post("/train/dpo", json=body)
        assert reply.json()["message"] == "DPO training job created", reply.text
        job_id = reply.json()["job_id"]
        wrong = client.post("/train/dpo", json={**body, "dataset_path": "data/chat.jsonl"})
        assert wrong.status_code == 422
        assert '{"prompt", "chosen", "rejected"}' in wrong.json()["detail"]
        wrong = client.post("/train/sft", json={**body, "dataset_path": "data/pairs.jsonl"})
        assert wrong.status_code == 422
        wrong = client.post("/train/dpo", json={**body, "loss": "ipo", "label_smoothing": 0.1})
        assert wrong.status_code == 422
    job = house.wait_end(job_id)
    assert (job["status"], job["training_type"]) == ("completed", "dpo"), job
    assert (job["config"]["beta"], job["config"]["num_epochs"]) == (0.1, 1)
    assert {"rewards/margins", "rewards/accuracies", "logps/chosen"} <= job["metrics"].keys()
    steps = [event["data"] for event in house.events(job_id) if event["type"] == "step"]
    assert steps[0]["metrics"]["rewards/margins"] == 0
    client = openai.OpenAI(api_key="test-key-001", base_url=house.url + "/v1", timeout=120)
    name = f"ft:tiny:local:liked:{job_id}"
    reply = client.chat.completions.create(model=name, messages=asked, max_tokens=2)
    assert reply.choices[0].message.content is not None


def test_a_full_fine_tune_is_a_model_of_its_own_named_after_its_root(
    house: House, finished: str
) -> None:
    job_id = house.submit(model_name=f"outputs/{finished}", use_lora=False, max_steps=2)
    job = house.wait_end(job_id)
    assert job["fine_tuned_model"] == f"ft:tiny:local::{job_id}"
    client = openai.OpenAI(api_key="test-key-001", base_url=house.url + "/v1", timeout=120)
    reply = client.chat.completions.create(
        model=job["fine_tuned_model"], messages=[{"role": "user", "content": "빛"}], max_tokens=2
    )
    assert reply.choices[0].message.content is not None


@pytest.fixture(scope="module")
def tasked(house: House) -> House:
    """The folder has all that the contract's configurations of the tasks name."""
    task_files.lay_out(house.workspace)
    return house


def configured(house: House, text: str) -> tuple[dict[str, Any], Path, set[str]]:
    """A configuration's file, run to its end: the job, its folder, and the notices it gave."""
    job_id = house.configure(text)
    job = house.wait_end(job_id)
    assert job["status"] == "completed", job
    events = house.events(job_id)
    notices = {event["data"]["code"] for event in events if event["type"] == "notice"}
    named = {name for event in events for name in contract_metrics(event["type"], event["data"])}
    steps = [event["data"]["step"] for event in events if event["type"] == "step"]
    return job | {"named": named, "steps": steps}, house.workspace / job["output_dir"], notices


def test_the_contracts_sft_file_runs_as_it_stands(tasked: House) -> None:
    job, folder, notices = configured(tasked, task_files.SFT)
    assert "max_length_lowered" in notices
    assert {"train/loss", "eval/loss"} <= job["named"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    said = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        task_files.conversation(0)["messages"][:1],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    answer = model.generate(said, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert answer.shape[1] == said.shape[1] + 4


def test_the_contracts_lora_file_runs_as_it_stands(tasked: House) -> None:
    job, folder, notices = configured(tasked, task_files.LORA)
    assert "quantization_off" in notices or torch.cuda.is_available()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(folder))
    base = AutoModelForCausalLM.from_pretrained(tasked.workspace / "llama2-7b")
    adapted = PeftModel.from_pretrained(base, folder)
    config = adapted.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.05)
    assert any(one.any() for name, one in adapted.named_parameters() if "lora_B" in name)
    assert (job["config"]["task_type"], job["config"]["model_name"]) == ("lora", "llama2-7b")


RL_DATA = "task_type: rl\npolicy_model: qwen-7b-sft\ndataset: datasets/{}.jsonl\n"


@pytest.mark.parametrize("rows", ["rl_preference", "rl_scored"])
def test_rl_without_an_algorithm_is_dpo_for_both_shapes_of_rows(tasked: House, rows: str) -> None:
    job, folder, _ = configured(tasked, RL_DATA.format(rows))
    assert job["training_type"] == "dpo"
    assert {"train/rewards/margins", "eval/rewards/margins"} <= job["named"]
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def reward_model(tasked: House) -> tuple[dict[str, Any], Path]:
    """Made where the RL file looks for it."""
    text = RL_DATA.format("rl_scored") + "algorithm: reward\noutput_dir: qwen-7b-rm\n"
    return configured(tasked, text)[:2]


def test_a_reward_model_goes_where_it_was_asked_to(
    tasked: House, reward_model: tuple[dict[str, Any], Path]
) -> None:
    job, folder = reward_model
    assert folder == tasked.workspace / "qwen-7b-rm"
    assert job["config"]["output_dir"] == "qwen-7b-rm"
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.num_labels == 1


def test_the_contracts_rl_file_runs_as_it_stands(tasked: House, reward_model: Any) -> None:
    job, folder, _ = configured(tasked, task_files.RL)
    assert job["training_type"] == "ppo"
    assert {"reward/mean", "reward/model", "kl_divergence", "episode_length"} <= job["named"]
    AutoModelForCausalLM.from_pretrained(folder)


def test_without_a_reward_model_one_is_trained_first_and_stays_beside_the_policy(
    tasked: House,
) -> None:
    text = RL_DATA.format("rl_scored") + "algorithm: grpo\nmax_new_tokens: 8\nmax_steps: 2\n"
    job, folder, _ = configured(tasked, text)
    assert {"reward/mean", "kl_divergence", "episode_length"} <= job["named"]
    AutoModelForCausalLM.from_pretrained(folder)
    assert AutoModelForSequenceClassification.from_pretrained(folder / "reward_model")


def test_a_reward_service_is_asked_by_the_trainer(tasked: House) -> None:
    service = Receiver()
    try:
        rounds = [{"scores": [float(at) for at in range(32)]}] * 2  # and one held-out row
        said = [json.dumps(one).encode() for one in (*rounds, {"scores": [0.5]})]
        service.answers["/score"] = [Say(200, body=one) for one in said]
        text = RL_DATA.format("rl_scored") + "algorithm: grpo\nmax_new_tokens: 4\nmax_steps: 1\n"
        job, _, _ = configured(tasked, f"{text}reward_model: {service.url('/score')}\n")
    finally:
        service.close()
    assert "reward/url" in job["named"]
    assert len(service.at("/score")) == 3


def test_a_reward_model_is_wanted_where_rows_compare_nothing(tasked: House) -> None:
    text = RL_DATA.format("sft_dataset") + "algorithm: grpo\n"
    headers = {"Content-Type": "application/yaml"}
    with tasked.client as client:
        reply = client.post("/train/config", content=text.encode(), headers=headers)
    assert reply.status_code == 422
    assert "name rewards (or a reward_model)" in reply.text


def test_the_contracts_pretraining_file_runs_as_it_stands(tasked: House) -> None:
    """Packed to the context, in one smaller step; with its tokenizer, by which it is served."""
    job, folder, notices = configured(tasked, task_files.PRETRAIN)
    assert "max_length_lowered" in notices
    assert (job["steps"], job["config"]["num_train_epochs"]) == ([1], 1)
    model, tokenizer = (
        one.from_pretrained(folder) for one in (AutoModelForCausalLM, AutoTokenizer)
    )
    theirs = SentencePieceProcessor(model_file=str(tasked.workspace / "configs/tokenizer.model"))
    assert tokenizer.encode("강물 river") == theirs.encode("강물 river")
    assert model.config.eos_token_id == tokenizer.eos_token_id == theirs.eos_id()
    asked = {"model": job["fine_tuned_model"], "prompt": "강물", "max_tokens": 4}
    with tasked.client as client:
        said = client.post("/v1/completions", json=asked, headers=KEY)
        asked = {"model": job["fine_tuned_model"], "input": "강물"}
        told = client.post("/v1/embeddings", json=asked, headers=KEY)
    assert said.status_code == 200, said.text
    assert said.json()["usage"]["prompt_tokens"] == len(theirs.encode("강물"))
    assert told.status_code == 200, told.text
    assert len(told.json()["data"][0]["embedding"]) == model.config.hidden_size


def test_a_model_on_the_way_answers_and_can_be_tuned_on(tasked: House) -> None:
    text = "task_type: pretrain\nmodel: llama2-7b\ndata: datasets/pretrain_corpus.jsonl\n"
    sizes = "length: 32\nbatch: 2\nsave_steps: 5\nkeep_stages: 2\n"
    job, folder, _ = configured(tasked, text + sizes)
    stages = sorted((path.name for path in folder.glob("step-*")), key=lambda name: int(name[5:]))
    last = max(job["steps"]) // 5 * 5
    assert stages == [f"step-{last - 5}", f"step-{last}"]
    name = f"{job['fine_tuned_model']}:{stages[0]}"
    asked = {"model": name, "prompt": "강물", "max_tokens": 4}
    with tasked.client as client:
        listed = client.get("/v1/models", headers=KEY).json()["data"]
        assert name in [model["id"] for model in listed]
        assert client.post("/v1/completions", json=asked, headers=KEY).status_code == 200
    tuned = tasked.wait_end(tasked.submit(model_name=f"outputs/{folder.name}/{stages[0]}"))
    assert tuned["status"] == "completed", tuned


def test_an_ended_output_folder_is_replaced_and_a_foreign_one_is_left_alone(house: House) -> None:
    first = house.submit(output_dir="outputs/named", max_steps=1)
    assert house.wait_end(first)["status"] == "completed"
    before = (house.workspace / "outputs/named/manifest.json").read_bytes()
    second = house.submit(output_dir="outputs/named", max_steps=2, seed=1)
    assert house.wait_end(second)["status"] == "completed"
    assert (house.workspace / "outputs/named/manifest.json").read_bytes() != before
    with house.client as client:
        body = {"model_name": "models/tiny", "dataset_path": "data/chat.jsonl"}
        for place in ("data", "models/tiny"):
            reply = client.post("/train/sft", json={**body, "output_dir": place})
            assert reply.status_code == 409, reply.text


def test_a_retried_submit_with_one_key_makes_one_job(house: House) -> None:
    body = {"model_name": "models/tiny", "dataset_path": "data/chat.jsonl", "max_steps": 1}
    with house.client as client:
        replies = [
            client.post("/train/sft", json=body, headers={"Idempotency-Key": "once"})
            for _ in range(3)
        ]
        assert len({reply.json()["job_id"] for reply in replies}) == 1
        other = client.post(
            "/train/sft", json={**body, "max_steps": 2}, headers={"Idempotency-Key": "once"}
        )
        assert other.status_code == 422
    house.wait_end(replies[0].json()["job_id"])


def test_cancelling_a_running_job_keeps_a_checkpoint_and_ends_its_process(house: House) -> None:
    job_id = house.submit(num_epochs=10_000)
    trainer = house.trainer(job_id)
    house.wait_event(job_id, "step")
    with house.client as client:
        reply = client.post(f"/jobs/{job_id}/cancel")
        assert reply.json()["status"] == "cancelled"
    job = house.wait_end(job_id)
    assert job["status"] == "cancelled"
    assert job["checkpoint_step"] >= 1
    assert not trainer.is_running() or trainer.status() == "zombie"
    with house.client as client:
        again = client.post(f"/jobs/{job_id}/cancel")
        assert again.status_code == 409


def test_a_checkpoint_of_a_running_job_answers_beside_the_base_it_stands_on(house: House) -> None:
    job_id = house.submit(num_epochs=10_000, suffix="live")
    trainer = house.trainer(job_id)
    house.wait_event(job_id, "step")
    trainer.send_signal(signal.SIGUSR2)
    step = house.wait_event(job_id, "checkpointed")["data"]["step"]
    name = f"ft:tiny:local:live:{job_id}:ckpt-step-{step}"
    client = openai.OpenAI(api_key="test-key-001", base_url=house.url + "/v1", timeout=120)
    asked: Any = [{"role": "user", "content": "水"}]
    reply = client.chat.completions.create(model=name, messages=asked, max_tokens=2)
    assert reply.model == name
    known = [model.id for model in client.models.list()]
    assert {name, "models/tiny"} <= set(known)
    assert client.models.retrieve(name).id == name
    base = client.chat.completions.create(model="models/tiny", messages=asked, max_tokens=2)
    assert base.choices
    assert house.job(job_id)["status"] == "running"
    engines = house.query("select id from engines where state = 'ready' and model_name = 'tiny'")
    assert len(engines) == 1
    with pytest.raises(openai.NotFoundError, match="no tuned model"):
        client.models.retrieve(f"ft:tiny:local:live:{job_id}:ckpt-step-{step + 10**6}")
    with house.client as http:
        http.post(f"/jobs/{job_id}/cancel", params={"force": True})
    house.wait_end(job_id)


def test_each_configuration_of_a_running_sweep_has_its_checkpoints(house: House) -> None:
    grid = {"lora_r": [2, 4]}
    job_id = house.submit(num_epochs=10_000, suffix="grid", sweep={"grid": grid})
    trainer = house.trainer(job_id)
    house.wait_event(job_id, "step")
    trainer.send_signal(signal.SIGUSR2)
    step = house.wait_event(job_id, "checkpointed")["data"]["step"]
    name = f"ft:tiny:local:grid:{job_id}:trial-2:ckpt-step-{step}"
    asked = {"model": name, "prompt": "水", "max_tokens": 2}
    with house.client as http:
        said = http.post("/v1/completions", json=asked, headers=KEY)
        assert said.status_code == 200, said.text
        known = http.get("/v1/models", headers=KEY).json()["data"]
        assert {"gated": False} in [{"gated": one["gated"]} for one in known if one["id"] == name]
        other = name.replace("trial-2", "trial-9")
        assert http.get(f"/v1/models/{other}", headers=KEY).status_code == 404
        http.post(f"/jobs/{job_id}/cancel", params={"force": True})
    house.wait_end(job_id)


def test_a_model_that_is_served_otherwise_gets_no_name_and_keeps_its_files(house: House) -> None:
    """The base is changed under a job that trains an adapter on it."""
    base = house.workspace / "models" / "changed"
    shutil.copytree(house.workspace / "models" / "tiny", base)
    job_id = house.submit(model_name="models/changed", num_epochs=25, suffix="other")
    house.wait_event(job_id, "step")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    job = house.wait_end(job_id)
    assert job["status"] == "failed"
    assert house.events(job_id)[-1]["data"]["failure_class"] == "parity"
    assert "rms_norm_eps was 1e-06 in training and is 0.5" in job["error"]
    kept = Path(job["error"].rpartition("the model is at ")[2].partition(" (")[0])
    assert (kept / "adapter_model.safetensors").exists()
    assert not (house.workspace / job["output_dir"]).exists()
    with house.client as client:
        names = [one["id"] for one in client.get("/v1/models", headers=KEY).json()["data"]]
    assert f"ft:changed:local:other:{job_id}" not in names
    assert f"ft:changed:local:other:{job_id}:ckpt-step-400" in names


def test_a_model_that_took_anothers_place_answers_from_then_on(house: House) -> None:
    client = openai.OpenAI(api_key="test-key-001", base_url=house.url + "/v1", timeout=120)
    heard = []
    for rate in (1e-4, 5e-2):
        fields = {"num_epochs": 1, "use_lora": False, "output_dir": "outputs/same"}
        job = house.wait_end(house.submit(learning_rate=rate, **fields))
        assert job["status"] == "completed", job
        reply = client.completions.create(
            model="outputs/same", prompt="水", max_tokens=3, temperature=0, logprobs=1
        )
        assert reply.choices[0].logprobs is not None
        heard.append(reply.choices[0].logprobs.token_logprobs)
    assert heard[0] != heard[1]


def test_a_queued_job_is_cancelled_at_once(house: House) -> None:
    long = [house.submit(num_epochs=10_000) for _ in range(3)]
    last = house.submit(num_epochs=1)
    with house.client as client:
        waits = client.get(f"/jobs/{last}/logs").json()
        assert len(waits["logs"]) == 1
        client.post(f"/jobs/{last}/cancel")
        assert house.job(last)["state"] == "cancelled"
        for job_id in long:
            client.post(f"/jobs/{job_id}/cancel", params={"force": True})
    assert {house.wait_end(job_id)["status"] for job_id in long} == {"cancelled"}
    assert "claimed" not in [event["type"] for event in house.events(last)]


def test_an_upload_is_checked_and_can_be_trained_on(house: House) -> None:
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chats(8)).encode()
    with house.client as client:
        sent = {"file": ("내 자료 🌊.jsonl", rows)}
        first = client.post("/upload/dataset", files=sent).json()
        assert first["num_samples"] == 8
        assert first["format"] == "openai"
        assert first["size"] == len(rows)
        other = client.post("/upload/dataset", files={"file": ("내 자료 🌊.jsonl", rows + rows)})
        assert other.json()["dataset_path"] != first["dataset_path"]
    job_id = house.submit(dataset_path=first["dataset_path"], max_steps=1)
    assert house.wait_end(job_id)["status"] == "completed"


def test_a_malformed_upload_names_its_lines_and_leaves_nothing(house: House) -> None:
    good = json.dumps(chats(1)[0])
    before = sorted((house.home / "blobs").iterdir())
    with house.client as client:
        sent = {"file": ("bad.jsonl", f"{good}\n{{broken\n{good}\n[]\n".encode())}
        reply = client.post("/upload/dataset", files=sent)
    assert reply.status_code == 422
    lines = [fault["loc"][2] for fault in reply.json()["detail"]]
    assert lines == [2, 4]
    assert sorted((house.home / "blobs").iterdir()) == before


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        ({"model_name": "models/none"}, 404, "models/none"),
        ({"dataset_path": "data/none.jsonl"}, 404, "data/none.jsonl"),
        ({"model_name": "../.."}, 400, "model_name"),
        ({"dataset_path": "/etc/passwd"}, 400, "dataset_path"),
        ({"output_dir": "../out"}, 400, "output_dir"),
        ({"output_dir": ".tunesmith/x"}, 400, "output_dir"),
        ({"num_epochs": 0}, 422, "num_epochs"),
        ({"learning_rate": 1e9}, 422, "learning_rate"),
        ({"colour": "red"}, 422, "colour"),
        ({"load_in_4bit": True, "load_in_8bit": True}, 400, "exclude"),
    ],
)
def test_a_bad_request_is_refused_with_its_field(
    house: House, change: dict[str, object], status: int, told: str
) -> None:
    body = {"model_name": "models/tiny", "dataset_path": "data/chat.jsonl", **change}
    with house.client as client:
        reply = client.post("/train/sft", json=body)
    assert reply.status_code == status, reply.text
    assert told in reply.text


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("empty.jsonl", "", "no row"),
        ("broken.jsonl", '{"messages": [\n', "line"),
        ("silent.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', "line"),
    ],
)
def test_a_data_set_with_broken_structure_is_refused_at_submit(
    house: House, name: str, text: str, told: str
) -> None:
    (house.workspace / "data" / name).write_text(text)
    with house.client as client:
        body = {"model_name": "models/tiny", "dataset_path": f"data/{name}"}
        reply = client.post("/train/sft", json=body)
    assert reply.status_code == 422, reply.text
    assert told in reply.text


def test_rows_that_are_all_too_long_end_the_job_before_it_is_claimed(house: House) -> None:
    row = {"prompt": "river " * 400, "completion": " stone"}
    (house.workspace / "data/long.jsonl").write_text(json.dumps(row) + "\n")
    job = house.wait_end(house.submit(dataset_path="data/long.jsonl", max_length=64))
    assert job["status"] == "failed"
    assert "longer than 64 tokens" in job["error"]
    assert "claimed" not in [event["type"] for event in house.events(job["job_id"])]
    with house.client as client:
        body = {"model_name": "models/tiny", "dataset_path": "data/long.jsonl", "max_length": 64}
        again = client.post("/train/sft", json=body)
    assert again.status_code == 422


def test_a_model_without_a_tokenizer_is_refused_at_submit(house: House) -> None:
    place = house.workspace / "models" / "mute"
    place.mkdir()
    for name in ("config.json", "model.safetensors"):
        (place / name).write_bytes((house.workspace / "models/tiny" / name).read_bytes())
    with house.client as client:
        body = {"model_name": "models/mute", "dataset_path": "data/chat.jsonl"}
        reply = client.post("/train/sft", json=body)
    assert reply.status_code == 400
    assert "tokenizer" in reply.text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"num_epochs": NaN}',
        b'{"num_epochs": 1e999}',
        b'{"model_name": "\\ud800", "dataset_path": "x"}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_no_body_breaks_the_server(house: House, body: bytes) -> None:
    with house.client as client:
        for path in ("/train/sft", "/v1/chat/completions", "/internal/v1/work"):
            headers = {"Content-Type": "application/json", **KEY}
            reply = client.post(path, content=body, headers=headers)
            assert 400 <= reply.status_code < 500, (path, reply.status_code, reply.text)


def test_keys_are_wanted_where_the_contract_wants_them(house: House) -> None:
    with house.client as client:
        assert client.get("/health").status_code == 200
        assert client.get("/docs").status_code == 200
        assert client.get("/jobs").status_code == 200
        assert client.get("/v1/models").status_code == 401
        assert client.get("/jobs", headers={"X-API-Key": "wrong"}).status_code == 401
        assert client.get("/jobs", headers={"X-Forwarded-For": "1.2.3.4"}).status_code == 401
        assert client.get("/jobs", headers={"Host": "evil.example"}).status_code == 401
        assert client.get("/jobs", headers={"Origin": "https://evil.example"}).status_code == 401
        assert (
            client.post("/internal/v1/keys", json={"owner": "me"}, headers=KEY).status_code == 403
        )


def test_another_owner_does_not_see_a_job(house: House, finished: str) -> None:
    other = {"Authorization": "Bearer test-key-002"}
    with house.client as client:
        assert client.get(f"/jobs/{finished}", headers=other).status_code == 404
        assert finished not in client.get("/jobs", headers=other).text
        assert client.post(f"/jobs/{finished}/cancel", headers=other).status_code == 404


def test_a_follower_that_comes_back_misses_nothing(house: House, finished: str) -> None:
    events = house.events(finished)
    with house.client as client:
        headers = {"Last-Event-ID": "3"}
        with client.stream("GET", f"/jobs/{finished}/events", headers=headers) as reply:
            rest = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data:")]
    assert rest == events[3:]


def test_an_unknown_model_is_a_404_in_the_openai_shape(house: House) -> None:
    client = openai.OpenAI(api_key="test-key-001", base_url=house.url + "/v1")
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="ft:no:such:model", messages=[])
    assert caught.value.param == "model"


def test_a_second_server_on_the_workspace_refuses_to_start(house: House) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "tunesmith.cli", "up", "--port", "0"],
        env=os.environ | {"TUNESMITH_WORKSPACE": str(house.workspace)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode != 0
    assert "postgresql" in second.stderr.lower()
    with house.client as client:
        assert client.get("/health").status_code == 200


def test_a_port_that_is_taken_is_said_in_a_sentence(tmp_path: Path, house: House) -> None:
    port = house.url.rsplit(":", 1)[1]
    second = subprocess.run(
        [sys.executable, "-m", "tunesmith.cli", "up", "--port", port],
        env=os.environ | {"TUNESMITH_WORKSPACE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode != 0
    assert f"port {port}" in second.stderr
    assert "Traceback" not in second.stderr


def test_a_server_without_a_key_refuses_to_listen_to_others(tmp_path: Path) -> None:
    started = subprocess.run(
        [sys.executable, "-m", "tunesmith.cli", "up", "--host", "0.0.0.0", "--port", "0"],
        env=os.environ | {"TUNESMITH_WORKSPACE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert started.returncode != 0
    assert "tunesmith keys create" in started.stderr

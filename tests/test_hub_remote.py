"""Models that only the hub has: asked for at submit, downloaded before the check, or a sentence."""

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from house import House, open_house
from hub_fixtures import Hub
from tunesmith.errors import BadRequestError, NotFoundError
from tunesmith.hub import remote
from tunesmith.hub.cache import Snapshot, is_hub_id
from tunesmith.hub.fetch import download
from tunesmith.hub.order import Order, Wanted
from tunesmith.settings import Settings

TOKEN = "hf_gate_0123456789"
API = ("api", "--no-worker")
FETCH = "tunesmith.hub.fetch"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    opened = Hub()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Iterator[House]:
    """With a hub and without a worker: what is validated waits to be claimed."""
    over = {
        "TUNESMITH_HUB_ENDPOINT": hub.url,
        "TUNESMITH_SHOULD_ASK_HUB": "1",
        "TUNESMITH_HUB_CACHE": str(tmp_path_factory.mktemp("cache")),
        "TUNESMITH_HUB_DOWNLOAD_TRIES": "2",
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "1",
    }
    with open_house(tmp_path_factory.mktemp("hub"), API, **over) as opened:
        yield opened


@pytest.fixture
def model(house: House, tmp_path: Path) -> Path:
    """A tiny real model, with a file beside it that no trainer reads."""
    folder = tmp_path / "model"
    shutil.copytree(house.workspace / "models" / "tiny", folder)
    (folder / "flax_model.msgpack").write_bytes(b"x" * 9000)
    return folder


def cache(house: House) -> Path:
    return Path(house.over["TUNESMITH_HUB_CACHE"])


def refusal(house: House, name: str) -> tuple[int, str]:
    body = {"model_name": name, "dataset_path": "data/chat.jsonl"}
    with house.client as client:
        reply = client.post("/train/sft", json=body)
    return reply.status_code, reply.text


def test_a_model_of_the_hub_is_downloaded_before_its_job_is_validated(
    hub: Hub, house: House, model: Path
) -> None:
    repo = hub.add("kim/tiny", model)
    repo.answered.clear()
    job_id = house.submit(model_name="kim/tiny")
    told = house.wait_event(job_id, "notice", code="download")
    assert "downloading the model kim/tiny" in told["data"]["message"]
    with house.client as client:
        assert "downloaded from the hub" in client.get(f"/jobs/{job_id}/logs").text

    local = house.submit()
    house.wait_event(local, "validated")  # does not wait behind the download
    assert "validated" not in {event["type"] for event in house.events(job_id)}

    repo.answered.set()
    assert house.wait_event(job_id, "validated")["data"]["rows"] == 64
    snapshot = Snapshot(cache(house), "kim/tiny", repo.commit)
    assert snapshot.is_whole()
    here = {path.name for path in snapshot.folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= here
    assert "flax_model.msgpack" not in here


def test_a_model_that_was_downloaded_is_not_asked_for_again(
    hub: Hub, house: House, model: Path
) -> None:
    hub.add("once", model)
    house.wait_event(house.submit(model_name="once"), "validated")
    asked = len(hub.asked)
    job = house.job(house.submit(model_name="once"))
    assert (job["status"], job["error"]) == ("pending", None)
    assert len(hub.asked) == asked


def test_two_jobs_on_one_model_share_its_download(hub: Hub, house: House, model: Path) -> None:
    repo = hub.add("shared/tiny", model)
    repo.answered.clear()
    both = [house.submit(model_name="shared/tiny", seed=seed) for seed in (1, 2)]
    house.wait_event(both[0], "notice", code="download")
    repo.answered.set()
    for job_id in both:
        house.wait_event(job_id, "validated")
    assert len(hub.fetched("shared/tiny", "model.safetensors")) == 1


def test_a_cut_connection_is_taken_up_again(hub: Hub, house: House, model: Path) -> None:
    repo = hub.add("cut/once", model, cuts=1)
    house.wait_event(house.submit(model_name="cut/once"), "validated")
    assert repo.cuts == 0
    snapshot = Snapshot(cache(house), "cut/once", repo.commit)
    weights = (snapshot.folder / "model.safetensors").read_bytes()
    assert weights == (model / "model.safetensors").read_bytes()


def test_a_download_that_never_ends_well_fails_its_job_and_is_not_used(
    hub: Hub, house: House, model: Path
) -> None:
    repo = hub.add("down/forever", model, status=500)
    job_id = house.submit(model_name="down/forever")
    told = house.wait_event(job_id, "failed")["data"]
    assert told["failure_class"] == "download"
    assert "down/forever could not be downloaded" in told["message"]
    assert "tunesmith models add" in told["hint"]
    assert house.job(job_id)["status"] == "failed"
    assert len(hub.fetched("down/forever", "model.safetensors")) == 2
    snapshot = Snapshot(cache(house), "down/forever", repo.commit)
    assert (snapshot.folder / "config.json").is_file()
    assert not snapshot.is_whole()

    repo.status = 200
    house.wait_event(house.submit(model_name="down/forever"), "validated")


def test_a_download_that_nobody_waits_for_is_given_up(hub: Hub, house: House, model: Path) -> None:
    repo = hub.add("given/up", model)
    repo.answered.clear()
    job_id = house.submit(model_name="given/up")
    house.wait_event(job_id, "notice", code="download")
    house.wait(lambda: house.children(FETCH))
    with house.client as client:
        assert client.post(f"/jobs/{job_id}/cancel").status_code == 200
    house.wait(lambda: not house.children(FETCH))
    assert house.job(job_id)["status"] == "cancelled"
    repo.answered.set()


def test_a_download_ends_with_its_server_and_begins_anew_with_the_next(
    hub: Hub, house: House, model: Path
) -> None:
    repo = hub.add("over/night", model)
    repo.answered.clear()
    job_id = house.submit(model_name="over/night")
    house.wait(lambda: house.children(FETCH))
    house.stop()
    assert not house.children(FETCH)
    repo.answered.set()
    house.start(*API)
    house.wait_event(job_id, "validated")


def test_a_gated_model_is_read_with_the_operators_token(
    hub: Hub, house: House, model: Path
) -> None:
    hub.add("gated/ours", model, gate=TOKEN)
    house.wait_event(house.submit(model_name="gated/ours"), "validated")
    hub.add("gated/theirs", model, gate="another")
    status, said = refusal(house, "gated/theirs")
    assert status == 404
    assert "gates it" in said
    assert TOKEN not in said
    assert TOKEN not in (house.workspace / "server.log").read_text()


def test_a_name_that_the_hub_does_not_have_is_a_404(house: House) -> None:
    status, said = refusal(house, "nobody/nothing")
    assert status == 404
    assert "has none of that name" in said
    assert "tunesmith models add NAME PATH" in said


def test_chat_does_not_ask_the_hub(hub: Hub, house: House, model: Path) -> None:
    hub.add("chat/only", model)
    body = {"model": "chat/only", "messages": [{"role": "user", "content": "안녕 🌊"}]}
    headers = {"Authorization": "Bearer test-key-001"}
    with house.client as client:
        reply = client.post("/v1/chat/completions", json=body, headers=headers)
    assert reply.status_code == 404
    assert not any("chat/only" in path for _, path, _ in hub.asked)


def test_what_a_folder_is_refused_for_a_repository_is_refused_for_at_submit(
    hub: Hub, house: House, model: Path, tmp_path: Path
) -> None:
    def refused(name: str, drop: str = "", **files: str) -> str:
        folder = tmp_path / name
        shutil.copytree(model, folder)
        if drop:
            (folder / drop).unlink()
        for file, text in files.items():
            (folder / file.replace("__", ".")).write_text(text)
        hub.add(f"bad/{name}", folder)
        status, said = refusal(house, f"bad/{name}")
        assert status == 400, said
        return said

    assert "has no tokenizer.json" in refused("no-tokenizer", "tokenizer.json")
    assert "has no config.json" in refused("no-config", "config.json")
    assert "has no safetensors weights" in refused("no-weights", "model.safetensors")
    pickled = refused("pickled", "model.safetensors", pytorch_model__bin="x")
    assert "pickled weights only" in pickled
    code = json.dumps({"auto_map": {"AutoConfig": "own.Config"}})
    assert "run code of its own" in refused("code", config__json=code)


def settings(hub_url: str, folder: Path, **over: Any) -> Settings:
    values = {"hub_endpoint": hub_url, "should_ask_hub": True, "hub_cache": folder, **over}
    return Settings(workspace=folder, **values)


def test_a_hub_that_cannot_be_reached_is_said_so(tmp_path: Path) -> None:
    asked = settings("http://127.0.0.1:9", tmp_path)
    with pytest.raises(NotFoundError, match=r"cannot be reached .*models add NAME PATH"):
        remote.find(asked, "org/name", "model_name")


def test_a_hub_that_is_turned_off_is_not_asked(hub: Hub, tmp_path: Path) -> None:
    asked = len(hub.asked)
    with pytest.raises(NotFoundError, match="the hub is not asked"):
        remote.find(settings(hub.url, tmp_path, should_ask_hub=False), "org/name", "model")
    assert len(hub.asked) == asked


def test_the_size_of_a_repository_is_known_before_it_is_downloaded(
    hub: Hub, house: House, model: Path, tmp_path: Path
) -> None:
    hub.add("sized", model)
    folder = remote.find(settings(hub.url, tmp_path), "sized", "model")
    assert folder is not None
    assert folder.weight_bytes == (model / "model.safetensors").stat().st_size
    assert folder.parameters == folder.weight_bytes // 4
    assert not folder.path.exists()


def test_the_token_is_not_shown() -> None:
    shown = Settings(hub_token=SecretStr(TOKEN))
    assert TOKEN not in repr(shown)
    assert TOKEN not in shown.model_dump_json()


@pytest.mark.parametrize("name", ["gpt2", "org/name", "a-b/c_d.e", "O9/x"])
def test_a_hub_id_is_told_from_its_form(name: str) -> None:
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name",
    ["", "a/b/c", "../x", "a..b", "a--b", "-a", "a/.b", "모델", "a b", "a/b.git", "a" * 97, "a\n"],
)
def test_what_no_hub_has_is_not_asked_for(name: str) -> None:
    assert not is_hub_id(name)


def test_a_large_file_goes_on_from_where_it_was_cut(hub: Hub, tmp_path: Path) -> None:
    """The library takes in blocks of ten megabytes; from the second on, it asks for the rest."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "U8", "shape": [24 << 20], "data_offsets": [0, 24 << 20]}})
    weights = struct.pack("<Q", len(header)) + header.encode() + bytes(24 << 20)
    (folder / "model.safetensors").write_bytes(weights)
    hub.add("large", folder, cuts=1)
    order = ordered(hub, "large", tmp_path / "cache")
    assert download(order).kind == "done"
    first, second = hub.fetched("large", "model.safetensors")
    assert (first, second) == ("", f"bytes={10 * 1024 * 1024}-")


def test_a_file_that_is_cut_for_ever_is_no_part_of_a_snapshot(
    hub: Hub, house: House, model: Path, tmp_path: Path
) -> None:
    repo = hub.add("cut/always", model, cuts=1000)
    outcome = download(ordered(hub, "cut/always", tmp_path / "cache"))
    assert outcome.kind == "again"
    assert "RemoteProtocolError" in outcome.message
    snapshot = Snapshot(tmp_path / "cache", "cut/always", repo.commit)
    assert not (snapshot.folder / "model.safetensors").exists()


def test_other_bytes_than_announced_are_thrown_away(
    hub: Hub, house: House, model: Path, tmp_path: Path
) -> None:
    repo = hub.add("altered", model)
    order = ordered(hub, "altered", tmp_path / "cache")
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    outcome = download(order)
    assert outcome.kind == "again"
    assert "model.safetensors came with other bytes" in outcome.message
    snapshot = Snapshot(tmp_path / "cache", "altered", repo.commit)
    assert not (snapshot.folder / "model.safetensors").exists()


def ordered(hub: Hub, repo: str, place: Path) -> Order:
    model = remote.ask(settings(hub.url, place), repo)
    files = [Wanted(name=f.name, size=f.size, sha256=f.sha256) for f in model.files]
    return Order(
        repo=repo, commit=model.snapshot.commit, files=files, cache=place, endpoint=hub.url
    )


def test_a_broken_answer_of_the_hub_is_a_sentence(hub: Hub, house: House, model: Path) -> None:
    hub.add("odd", model).commit = "../../../etc"
    status, said = refusal(house, "odd")
    assert status == 404
    assert "what no hub answers" in said


def test_a_model_with_weights_missing_is_not_whole(model: Path, tmp_path: Path) -> None:
    snapshot = Snapshot(tmp_path, "org/parts", "a" * 40)
    shutil.copytree(model, snapshot.folder)
    assert snapshot.is_whole()
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (snapshot.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not snapshot.is_whole()


def test_only_a_download_that_ended_makes_a_snapshot_whole(model: Path, tmp_path: Path) -> None:
    snapshot = Snapshot(tmp_path, "org/mine", "b" * 40)
    snapshot.begin()
    shutil.copytree(model, snapshot.folder)
    assert not snapshot.is_whole()
    assert Snapshot.main(tmp_path, "org/mine") is None
    snapshot.finish()
    assert snapshot.is_whole()
    assert Snapshot.main(tmp_path, "org/mine") == snapshot


def test_a_config_that_is_no_object_is_refused(hub: Hub, model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text("[]")
    hub.add("listed", model)
    with pytest.raises(BadRequestError, match="must hold a JSON object"):
        remote.find(settings(hub.url, tmp_path), "listed", "model")

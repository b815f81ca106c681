"""What a key opens at the API, how often it may ask, and what is told of that."""

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from api_fixtures import ASKED, hub_of, make_workspace, open_door

CHAT = {"model": "nowhere", "messages": [{"role": "user", "content": "a"}]}


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    workspace = make_workspace(tmp_path_factory.mktemp("limits"))
    with open_door(workspace, rate_limit="2/hour") as door:
        yield door


def bearer(door: TestClient, *scopes: str) -> dict[str, str]:
    made = hub_of(door).make_key("me", scopes=scopes or None)  # type: ignore[arg-type]
    return {"Authorization": f"Bearer {made['key']}"}


def test_generating_too_often_is_a_429_for_that_key_alone(door: TestClient) -> None:
    mine, other = bearer(door), bearer(door)
    assert door.post("/generate", json={"prompt": "a"}, headers=mine).status_code == 503
    assert door.post("/v1/chat/completions", json=CHAT, headers=mine).status_code == 404
    refused = door.post("/v1/chat/completions", json=CHAT, headers=mine)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limited")
    assert 3000 < int(refused.headers["retry-after"]) <= 3600
    assert door.get("/v1/models", headers=mine).status_code == 200
    assert door.post("/v1/chat/completions", json=CHAT, headers=other).status_code == 404


def test_a_key_of_one_scope_opens_nothing_else(door: TestClient) -> None:
    infer, train = bearer(door, "infer"), bearer(door, "train")
    assert door.post("/train/sft", json=ASKED, headers=infer).status_code == 403
    assert door.get("/jobs", headers=infer).status_code == 403
    assert door.post("/load_model?model_path=models/tiny", headers=infer).status_code == 403
    assert door.post("/generate", json={"prompt": "a"}, headers=train).status_code == 403
    assert door.get("/jobs", headers=train).status_code == 200
    assert door.get("/v1/models", headers=train).status_code == 200


def test_metrics_tell_of_requests_and_jobs(door: TestClient) -> None:
    key = bearer(door)
    door.get("/jobs", headers=key)
    text = door.get("/metrics", headers=key).text
    assert 'tunesmith_http_requests_total{method="GET",route="/jobs",status="200"}' in text
    assert 'tunesmith_jobs{state="queued"} 0.0' in text
    assert door.get("/metrics").status_code == 401

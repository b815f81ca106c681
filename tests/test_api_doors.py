"""Who is let in: every route has a door, and no header opens one."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from api_fixtures import LOCAL, ONE, TWO, hub_of, make_workspace, open_door, routes_of
from tunesmith.api import auth, workers
from tunesmith.api.strict import StrictRoute

DOORS = {
    auth.anyone,
    auth.caller,
    auth.key_holder,
    auth.operator,
    auth.worker,
    workers.attempt_token,
}
DOCS = {"/docs", "/docs/oauth2-redirect", "/redoc"}
ATTEMPT = "/internal/v1/attempts/00000000/1"


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with open_door(make_workspace(tmp_path_factory.mktemp("doors"))) as door:
        yield door


def test_every_route_declares_its_door(door: TestClient) -> None:
    found = list(routes_of(door.app.routes))  # type: ignore[attr-defined]
    assert len(found) > 20
    for route in found:
        if route.path not in DOCS:
            assert any(one.dependency in DOORS for one in route.dependencies), route.path


def test_every_route_that_reads_a_body_knows_its_caller_first(door: TestClient) -> None:
    for route in routes_of(door.app.routes):  # type: ignore[attr-defined]
        if (route.methods or set()) & {"POST", "PUT", "PATCH"} or route.body_field is not None:
            assert isinstance(route, StrictRoute), route.path


def test_only_the_open_routes_answer_a_stranger(tmp_path: Path) -> None:
    with open_door(tmp_path, peer="192.0.2.7") as door:
        document = door.get("/openapi.json").json()
        for path in ("/", "/health", "/docs", "/redoc"):
            assert door.get(path).status_code == 200
        others = {path: list(ways) for path, ways in document["paths"].items()}
        assert len(others) > 10
        for path, ways in others.items():
            for way in ways if path not in ("/", "/health", "/health/ready") else ():
                answer = door.request(way, path.replace("{job_id}", "00000000"))
                assert answer.status_code == 401, path
        for path in ("work", "keys", "models", "engines/x"):
            assert door.post(f"/internal/v1/{path}").status_code == 401
        for key in (ONE, TWO):
            assert door.get("/jobs", headers=key).status_code == 401


@pytest.mark.parametrize(
    "path", ["//jobs", "/v1/../jobs", "/JOBS", "/jobs%2f", "/jobs/", "/jobs;x"]
)
def test_no_spelling_of_a_path_goes_around_the_door(tmp_path: Path, path: str) -> None:
    with open_door(tmp_path, peer="192.0.2.7") as door:
        assert door.get(LOCAL + path).status_code in (307, 401, 404)


@pytest.mark.parametrize(
    "host",
    [
        "evil.com",
        "127.0.0.1.evil.com",
        "127.0.0.1:80@evil.com",
        "evil.com#127.0.0.1",
        "0.0.0.0",
        "2130706433",
        "[::1",
        "",
    ],
)
def test_a_page_of_another_name_is_no_local_caller(door: TestClient, host: str) -> None:
    assert door.get("/jobs", headers={"Host": host}).status_code == 401
    assert door.get("/jobs", headers={"Host": host, **ONE}).status_code == 401


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "[::1]", "[::1]:8000", "127.0.0.1"])
def test_this_machine_has_several_names(door: TestClient, host: str) -> None:
    assert door.get("/jobs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        [("Origin", "https://evil.com")],
        [("Origin", "null")],
        [("Origin", "http://localhost.evil.com")],
        [("Origin", "http://localhost:3000"), ("Origin", "https://evil.com")],
        [("X-Forwarded-For", "127.0.0.1")],
        [("X-Forwarded-Proto", "https")],
        [("X-Real-IP", "127.0.0.1")],
        [("Via", "1.1 proxy")],
        [("Authorization", "Basic dGVzdA==")],
        [("Authorization", "Bearer ' OR 1=1--")],
        [("Authorization", "Bearer \u00ff")],
        [("X-API-Key", "")],
        [("X-API-Key", "k" * 60_000)],
    ],
)
def test_no_header_opens_a_door(door: TestClient, headers: list[tuple[str, str]]) -> None:
    sent = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    assert door.get("/jobs", headers=sent).status_code == 401


def test_a_foreign_page_gets_no_grant(door: TestClient) -> None:
    asks = {"Origin": "https://evil.com", "Access-Control-Request-Method": "POST"}
    answer = door.options("/train/sft", headers=asks)
    assert "access-control-allow-origin" not in answer.headers
    at_home = door.options("/train/sft", headers=asks | {"Origin": "http://localhost:3000"})
    assert at_home.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert "access-control-allow-credentials" not in at_home.headers


def test_keys_open_no_more_than_they_should(door: TestClient) -> None:
    token = {"X-API-Key": (hub_of(door).settings.home / "worker.token").read_text()}
    assert [door.post("/internal/v1/work", headers=key).status_code for key in (ONE, TWO)] == [
        403,
        403,
    ]
    assert door.get("/internal/v1/keys", headers=token).status_code == 200
    for key in (ONE, TWO, token):
        for way in ("report", "finish"):
            assert door.post(f"{ATTEMPT}/{way}", headers=key, json={}).status_code == 401


def test_a_strangers_body_is_not_read(door: TestClient) -> None:
    """The body would never come: an answer shows that nobody waited for it."""
    for path in ("/train/sft", "/upload/dataset", "/v1/completions", "/internal/v1/work"):
        assert asyncio.run(_ask_and_stall(door.app, path)) == 401


def test_long_keys_are_not_remembered(door: TestClient) -> None:
    keys = hub_of(door).keys
    assert keys.find("k" * 5000, is_local=True) is None
    assert not any(len(key) > 600 for key in keys._found)


async def _ask_and_stall(app: Any, path: str) -> int:
    statuses = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(3600)
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    headers = [
        (b"host", b"127.0.0.1"),
        (b"content-type", b"application/json"),
        (b"content-length", b"900"),
        (b"x-api-key", b"wrong"),
    ]
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "scheme": "http",
        "server": ("127.0.0.1", 80),
        "http_version": "1.1",
        "root_path": "",
    }
    await app(scope, receive, send)
    return int(statuses[0])

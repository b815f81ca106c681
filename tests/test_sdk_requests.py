"""The client's one request function: retries, errors, keys."""

import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sdk_fixtures import Wire, drop, job, reply, serving
from tuning_sdk import (
    AuthenticationError,
    ConflictError,
    ConnectionError,
    NotFoundError,
    RateLimitError,
    ServerError,
    TimeoutError,
    TuningAPIError,
    TuningClient,
    ValidationError,
)
from tuning_sdk.retry import error_of, retry_after_of, wait_seconds
from tuning_sdk.transport import is_loopback

CREATED = {"job_id": "a1b2c3d4", "status": "pending", "message": "created"}


@pytest.fixture
def wire() -> Iterator[Wire]:
    with serving() as wire:
        yield wire


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def client(wire: Wire, waits: list[float]) -> Iterator[TuningClient]:
    with TuningClient(api_key="sk-one", base_url=wire.url, timeout=5, max_retries=3) as client:
        client.transport.sleep = waits.append
        yield client


def test_a_create_is_retried_with_one_idempotency_key(client: TuningClient, wire: Wire) -> None:
    wire.on("POST /train/sft", drop, reply({"detail": "busy"}, 503), reply(CREATED))
    created = client.jobs.train_sft("팀/base", Path("data/훈련.jsonl"), num_epochs=2)
    asked = wire.of("POST /train/sft")
    assert created.job_id == "a1b2c3d4"
    assert len(asked) == 3
    assert len({one.headers["idempotency-key"] for one in asked}) == 1
    assert asked[2].json["dataset_path"] == "data/훈련.jsonl"
    assert asked[2].json["num_epochs"] == 2


def test_preference_training_is_asked_for_by_its_own_route(
    client: TuningClient, wire: Wire
) -> None:
    wire.on("POST /train/dpo", drop, reply(CREATED))
    created = client.jobs.train_dpo("outputs/sft", Path("쌍.jsonl"), beta=0.3, loss="ipo")
    asked = wire.of("POST /train/dpo")
    assert created.job_id == "a1b2c3d4"
    assert len({one.headers["idempotency-key"] for one in asked}) == 1
    assert asked[-1].json == {
        "model_name": "outputs/sft",
        "dataset_path": "쌍.jsonl",
        "beta": 0.3,
        "loss": "ipo",
    }


def test_two_creates_have_two_keys(client: TuningClient, wire: Wire) -> None:
    wire.on("POST /train/sft", reply(CREATED))
    client.jobs.train_sft("m", "d")
    client.jobs.train_sft("m", "d")
    assert len({one.headers["idempotency-key"] for one in wire.asked}) == 2


def test_retry_after_is_honoured(client: TuningClient, wire: Wire, waits: list[float]) -> None:
    wire.on("GET /jobs", reply({"detail": "slow"}, 429, {"Retry-After": "7"}), reply([]))
    assert client.jobs.list() == []
    assert 7 <= waits[0] <= 7.2


def test_the_wait_doubles_and_is_bounded() -> None:
    longest = [wait_seconds(tried, chance=1.0) for tried in (1, 2, 3, 9, 999)]
    assert longest == [0.25, 0.5, 1.0, 8.0, 8.0]
    assert wait_seconds(3, chance=0.0) == 0.5
    assert wait_seconds(1, retry_after=86_400, chance=0.0) == 60


def test_retry_after_is_read_in_both_forms() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert retry_after_of({"retry-after": "1.5"}) == 1.5
    assert retry_after_of({"retry-after": "Thu, 01 Jan 2026 00:00:30 GMT"}, now) == 30
    for nonsense in ("soon", "-5", "nan", "1e400", ""):
        assert retry_after_of({"retry-after": nonsense}) is None


def test_retries_come_to_an_end(client: TuningClient, wire: Wire) -> None:
    wire.on("GET /jobs", reply({"detail": "the server failed"}, 500))
    with pytest.raises(ServerError, match="the server failed"):
        client.jobs.list()
    assert len(wire.asked) == 4


def test_a_chat_is_not_sent_twice(client: TuningClient, wire: Wire) -> None:
    wire.on("POST /v1/chat/completions", drop)
    with pytest.raises(ConnectionError):
        client.chat("m", [{"role": "user", "content": "안녕"}], stream=False)
    assert len(wire.asked) == 1


@pytest.mark.parametrize("status", [400, 401, 404, 409, 422, 507])
def test_what_would_not_change_is_not_asked_again(
    client: TuningClient, wire: Wire, status: int
) -> None:
    wire.on("GET /jobs", reply({"detail": "no"}, status))
    with pytest.raises(TuningAPIError):
        client.jobs.list()
    assert len(wire.asked) == 1


def test_errors_are_rebuilt_from_both_shapes(client: TuningClient, wire: Wire) -> None:
    told = {"message": "no job 'zz'", "type": "invalid_request_error", "code": "not_found"}
    wire.on("GET /jobs/zz", reply({"error": {**told, "param": "job_id"}}, 404))
    with pytest.raises(NotFoundError, match="no job 'zz'") as caught:
        client.jobs.get("zz")
    assert caught.value.param == "job_id"

    wire.on("POST /jobs/yy/cancel", reply({"detail": "it has ended"}, 409))
    with pytest.raises(ConflictError, match="it has ended"):
        client.jobs.cancel("yy")

    faults = [{"loc": ["body", "num_epochs"], "msg": "must be over 0"}, {"line": 7, "msg": "坏"}]
    wire.on("POST /train/sft", reply({"detail": faults}, 422))
    with pytest.raises(ValidationError, match=r"num_epochs: must be over 0 \(and 1 more\)") as bad:
        client.jobs.train_sft("m", "d")
    assert bad.value.validation_errors == faults


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[1]", b'{"error": 5}', b"[" * 100_000, b'{"detail": {"loc": []}}', b"\xff"],
)
def test_an_error_without_sense_is_still_an_error(body: bytes) -> None:
    error = error_of(429, {"retry-after": "3", "content-type": "text/html"}, body)
    assert isinstance(error, RateLimitError)
    assert error.retry_after == 3
    assert "429" in str(error)


def test_a_page_in_place_of_json_is_named(client: TuningClient, wire: Wire) -> None:
    wire.on("GET /jobs", reply(b"<html>welcome</html>"))
    with pytest.raises(TuningAPIError, match="text/html where JSON was expected"):
        client.jobs.list()


def test_an_answer_of_another_shape_is_no_traceback(client: TuningClient, wire: Wire) -> None:
    wire.on("GET /jobs/a1b2c3d4", reply({"status": "running"}))
    with pytest.raises(TuningAPIError, match=r"no Job: job_id"):
        client.jobs.get("a1b2c3d4")


def test_a_redirect_is_not_followed(client: TuningClient, wire: Wire) -> None:
    wire.on("GET /jobs", reply(None, 307, {"Location": "http://127.0.0.1:1/steal"}))
    with pytest.raises(TuningAPIError, match="points to http://127"):
        client.jobs.list()
    assert len(wire.asked) == 1


def test_nobody_there_is_a_connection_error(waits: list[float]) -> None:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{door.getsockname()[1]}"
    with TuningClient(base_url=url, max_retries=2) as client:
        client.transport.sleep = waits.append
        with pytest.raises(ConnectionError, match=url):
            client.health_check()
    assert len(waits) == 2


def test_silence_is_a_timeout(wire: Wire) -> None:
    with TuningClient(base_url=wire.url, timeout=0.05, max_retries=0) as client:
        door = socket.socket()
        door.bind(("127.0.0.1", 0))
        door.listen()
        silent = TuningClient(
            base_url=f"http://127.0.0.1:{door.getsockname()[1]}", timeout=0.05, max_retries=0
        )
        with door, silent, pytest.raises(TimeoutError):
            silent.health_check()
        assert client.base_url == wire.url


def test_the_environment_names_server_and_key(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_BASE_URL", wire.url + "/")
    monkeypatch.setenv("TUNESMITH_API_KEY", " sk-env\n")
    wire.on("GET /health", reply({"status": "healthy"}))
    with TuningClient() as client:
        assert client.health_check()["status"] == "healthy"
        assert "sk-env" not in repr(client)
    assert wire.asked[0].headers["authorization"] == "Bearer sk-env"


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://", "file:///etc/passwd"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="no address"):
        TuningClient(base_url=url or " ")


def test_a_key_that_no_header_carries_is_refused_unseen() -> None:
    with pytest.raises(ValueError, match="api_key") as caught:
        TuningClient(api_key="sk-열쇠", base_url="http://127.0.0.1:1")
    assert "열쇠" not in str(caught.value)


def test_a_proxy_stands_not_before_loopback(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    wire.on("GET /jobs", reply([job()]))
    with TuningClient(base_url=wire.url, max_retries=0) as client:
        assert client.jobs.list()[0].config["model_name"] == "팀/base"
    assert is_loopback("http://[::1]:8000")
    assert not is_loopback("http://10.0.0.1:8000")


def test_an_id_cannot_leave_its_place_in_the_path(client: TuningClient, wire: Wire) -> None:
    with pytest.raises(NotFoundError):
        client.jobs.get("../internal/v1/keys?x=1#y")
    assert wire.asked[0].path == "/jobs/..%2Finternal%2Fv1%2Fkeys%3Fx%3D1%23y"


def test_a_wrong_key_is_an_authentication_error(client: TuningClient, wire: Wire) -> None:
    wire.on("GET /v1/models", reply({"error": {"message": "unknown key"}}, 401))
    with pytest.raises(AuthenticationError):
        client.models.list()

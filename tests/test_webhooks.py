"""Webhooks from the door to a receiver: routes, signatures, closed addresses, misbehaviour."""

import datetime
import json
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from api_fixtures import LOCAL, hub_of, open_door
from receivers import Heard, Receiver, Say
from servers import wait_for
from store_fixtures import new_job
from tunesmith.hub import delivery as wire
from tunesmith.hub.delivery import sign
from tunesmith.hub.outbox import _wait
from tunesmith.spec.records import StopMode
from tunesmith.store import jobs
from tunesmith.store.outbox import TYPES

OWNER = "test-key-001"
ONE = {"Authorization": f"Bearer {OWNER}"}
TWO = {"Authorization": "Bearer test-key-002"}
CANCELLED = "fine_tuning.job.cancelled"
PLACE = "/v1/webhook_endpoints"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@pytest.fixture
def door(tmp_path: Path, database_url: str) -> Iterator[TestClient]:
    with open_door(tmp_path, database_url=database_url) as opened:
        yield opened


@pytest.fixture
def local_door(tmp_path: Path) -> Iterator[TestClient]:
    with open_door(tmp_path) as opened:
        yield opened


def client_of(door: TestClient, key: str = OWNER) -> openai.OpenAI:
    return openai.OpenAI(
        api_key=key, base_url=LOCAL + "/v1", http_client=door, max_retries=0, webhook_secret=None
    )


def listen(door: TestClient, url: str, *types: str) -> dict[str, Any]:
    body = {"name": "완료 알림 🎣", "url": url, "event_types": list(types or TYPES.values())}
    reply = door.post(PLACE, json=body, headers=ONE)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def submit(door: TestClient) -> str:
    new = new_job(owner=OWNER)

    def work(tx: Any) -> str:
        return jobs.submit(tx, new, max_unfinished=10_000, outputs_root="/ws/outputs").id

    return hub_of(door).store.write(work).result()


def stop(door: TestClient, job_id: str, mode: StopMode = StopMode.CANCEL) -> None:
    hub_of(door).store.write(lambda tx: jobs.request_stop(tx, job_id, mode, 1)).result()


def cancelled(door: TestClient) -> str:
    job_id = submit(door)
    stop(door, job_id)
    return job_id


def deliveries(door: TestClient, endpoint: dict[str, Any]) -> list[dict[str, Any]]:
    reply = door.get(f"{PLACE}/{endpoint['id']}/deliveries", params={"limit": 100}, headers=ONE)
    assert reply.status_code == 200, reply.text
    return list(reply.json()["data"])


def wait_delivery(door: TestClient, endpoint: dict[str, Any], **want: Any) -> dict[str, Any]:
    """The newest delivery, once it is as wanted."""

    def is_so() -> bool:
        found = deliveries(door, endpoint)
        return bool(found) and want.items() <= found[0].items()

    wait_for(is_so, f"a delivery with {want}")
    return deliveries(door, endpoint)[0]


# signatures


def test_the_signature_is_the_standard_s_byte_for_byte() -> None:
    secret = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
    body = (
        '{"id":"evt_1","object":"event","created_at":1764000000,'
        '"type":"fine_tuning.job.succeeded","data":{"id":"ftjob-1"}}'
    )
    signed = "v1,YR0d7EIuyDg1OtQrxtmms+2nirMZxnqTb+xjI/HeVAk="
    assert sign([secret], "wh_1", 1764000000, body) == signed


def test_the_official_client_takes_what_is_sent_and_refuses_what_was_changed(
    door: TestClient, receiver: Receiver
) -> None:
    client = client_of(door)
    made = client.webhooks.create(
        name="완료 🎣", url=receiver.url("/훅"), event_types=["fine_tuning.job.cancelled"]
    )
    job_id = cancelled(door)
    heard = receiver.wait("/%ED%9B%85")[0]
    event = client.webhooks.unwrap(heard.body, heard.headers, secret=made.signing_secret)
    assert (event.type, event.data.id) == (CANCELLED, f"ftjob-{job_id}")  # type: ignore[union-attr]
    assert event.id == heard.id
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(heard.body + " ", heard.headers, secret=made.signing_secret)


def test_both_secrets_sign_after_a_rotation_that_asked_for_it(
    door: TestClient, receiver: Receiver
) -> None:
    client = client_of(door)
    old = client.webhooks.create(
        name="n", url=receiver.url("/r"), event_types=["fine_tuning.job.cancelled"]
    )
    new = client.webhooks.rotate_secret(old.id, keep_old_secret_active_for_24_hours=True)
    cancelled(door)
    heard = receiver.wait("/r")[0]
    for secret in (old.signing_secret, new.signing_secret):
        assert client.webhooks.unwrap(heard.body, heard.headers, secret=secret)
    newest = client.webhooks.rotate_secret(old.id)
    cancelled(door)
    heard = receiver.wait("/r", 2)[1]
    assert client.webhooks.unwrap(heard.body, heard.headers, secret=newest.signing_secret)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(heard.body, heard.headers, secret=new.signing_secret)


# deliveries


def test_a_flaky_receiver_hears_all_that_is_owed_in_order(
    door: TestClient, receiver: Receiver
) -> None:
    endpoint = listen(door, receiver.url("/flaky"))
    receiver.answers["/flaky"] = [Say(status) for status in (500, 200, 429, 503, 200, 404)]
    job_ids = [submit(door) for _ in range(6)]
    for job_id in job_ids:
        stop(door, job_id, StopMode.PAUSE)
    for job_id in job_ids:
        stop(door, job_id)

    def is_done() -> bool:
        return all(one["status"] == "delivered" for one in deliveries(door, endpoint))

    wait_for(is_done, "every delivery")
    heard = receiver.at("/flaky")
    assert len(heard) >= 12 + 4
    assert {one.id for one in heard} == {one["id"] for one in deliveries(door, endpoint)}
    assert len({one.id for one in heard}) == 12
    for job_id in job_ids:
        types = [told["type"] for told in bodies(heard) if told["data"]["id"].endswith(job_id)]
        assert types == sorted(types, reverse=True)  # paused, however often, then cancelled
    same = {one.id: one.body for one in heard}
    assert all(one.body == same[one.id] for one in heard)


def bodies(heard: Sequence[Heard]) -> list[dict[str, Any]]:
    return [json.loads(one.body) for one in heard]


def test_a_receiver_that_hangs_holds_up_no_other(
    local_door: TestClient, receiver: Receiver
) -> None:
    receiver.holding.add("/hangs")
    listen(local_door, receiver.url("/hangs"))
    listen(local_door, receiver.url("/fine"))
    job_ids = [cancelled(local_door) for _ in range(40)]
    heard = receiver.wait("/fine", 40)
    assert sorted(told["data"]["id"][6:] for told in bodies(heard)) == sorted(job_ids)
    assert 1 <= len(receiver.at("/hangs")) <= 4
    assert receiver.holding == {"/hangs"}


def test_a_redirect_is_not_followed(local_door: TestClient, receiver: Receiver) -> None:
    receiver.answers["/from"] = [Say(307, {"Location": receiver.url("/to")})]
    endpoint = listen(local_door, receiver.url("/from"))
    cancelled(local_door)
    tried = wait_delivery(local_door, endpoint, status_code=307)
    assert "redirects are not followed" in tried["error"]
    assert receiver.at("/to") == []


def test_an_answer_without_end_is_not_read_on(local_door: TestClient, receiver: Receiver) -> None:
    receiver.answers["/endless"] = [Say(200, endless=True)]
    endpoint = listen(local_door, receiver.url("/endless"))
    cancelled(local_door)
    assert wait_delivery(local_door, endpoint, status="delivered")["tries"] == 1


def test_a_receiver_that_is_gone_is_told_no_more(
    local_door: TestClient, receiver: Receiver
) -> None:
    receiver.answers["/gone"] = [Say(410)]
    endpoint = listen(local_door, receiver.url("/gone"))
    cancelled(local_door)
    ended = wait_delivery(local_door, endpoint, status="failed")
    assert (ended["status_code"], ended["tries"]) == (410, 1)
    shown = local_door.get(f"{PLACE}/{endpoint['id']}", headers=ONE).json()
    assert "410" in shown["disabled_reason"]
    cancelled(local_door)
    assert len(deliveries(local_door, endpoint)) == 1
    changed = local_door.post(f"{PLACE}/{endpoint['id']}", json={"name": "again"}, headers=ONE)
    assert changed.json()["disabled_at"] is None
    again = f"{PLACE}/{endpoint['id']}/deliveries/{ended['id']}/redeliver"
    assert local_door.post(again, headers=ONE).json()["status"] == "pending"
    heard = receiver.wait("/gone", 2)
    assert heard[0].id == heard[1].id == ended["id"]


def test_a_receiver_s_retry_after_is_honoured(local_door: TestClient, receiver: Receiver) -> None:
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=2)
    date = later.strftime("%a, %d %b %Y %H:%M:%S GMT")
    for path, told in (("/seconds", "7200"), ("/date", date)):
        receiver.answers[path] = [Say(503, {"Retry-After": told})]
        endpoint = listen(local_door, receiver.url(path))
        cancelled(local_door)
        tried = wait_delivery(local_door, endpoint, status_code=503)
        assert 7000 < tried["next_try_at"] - tried["created_at"] < 7400


def test_what_retry_after_says_is_read_with_care() -> None:
    for text in (
        "",
        "soon",
        "-5",
        "1" * 200,
        "²",
        "Mon, 99 Foo",
        None,
        "Sun, 06 Nov 1994 08:49:37 GMT",
    ):
        assert wire._retry_after(text) is None
    assert wire._retry_after("9" * 50) == 999_999_999_999.0


def test_tries_wait_longer_and_longer_and_not_all_alike() -> None:
    waits = [_wait(tries, 3600) for tries in range(1, 30)]
    assert 0.75 <= waits[0] <= 1.25
    assert 2700 <= waits[-1] <= 4500
    assert len(set(waits)) == len(waits)


# routes


def test_the_official_client_manages_endpoints(local_door: TestClient, receiver: Receiver) -> None:
    client = client_of(local_door)
    made = [
        client.webhooks.create(
            name=f"하나 {n}", url=receiver.url(f"/{n}"), event_types=["fine_tuning.job.failed"] * 2
        )
        for n in range(5)
    ]
    assert made[0].signing_secret.startswith("whsec_")
    assert made[0].event_types == ["fine_tuning.job.failed"]
    assert [one.id for one in client.webhooks.list(limit=2)] == [one.id for one in made[::-1]]
    found = client.webhooks.retrieve(made[0].id)
    assert not hasattr(found, "signing_secret")
    assert found.signing_secret_hint == f"whsec_…{made[0].signing_secret[-4:]}"
    changed = client.webhooks.update(made[0].id, name="둘 🎣", url=receiver.url("/new"))
    assert (changed.name, changed.event_types) == ("둘 🎣", ["fine_tuning.job.failed"])
    tested = client.webhooks.test(made[0].id, event_type="fine_tuning.job.succeeded")
    assert (tested.status_code, tested.success) == (200, True)
    heard = receiver.at("/new")[0]
    event = client.webhooks.unwrap(heard.body, heard.headers, secret=made[0].signing_secret)
    assert event.type == "fine_tuning.job.succeeded"
    assert client.webhooks.event_types.list().data == list(TYPES.values())
    assert client.webhooks.delete(made[0].id).deleted
    with pytest.raises(openai.NotFoundError) as missing:
        client.webhooks.retrieve(made[0].id)
    assert missing.value.param == "webhook_endpoint_id"
    with pytest.raises(openai.BadRequestError):
        list(client.webhooks.list(after=made[0].id))


def test_a_test_tells_what_came_back_or_that_nobody_was_there(
    local_door: TestClient, receiver: Receiver
) -> None:
    client = client_of(local_door)
    receiver.answers["/t"] = [Say(418)]
    made = listen(local_door, receiver.url("/t"))
    assert client.webhooks.test(made["id"], event_type=CANCELLED).status_code == 418  # type: ignore[arg-type]
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        dead = listen(local_door, f"http://127.0.0.1:{nobody.getsockname()[1]}/")
        with pytest.raises(openai.BadRequestError, match="no connection"):
            client.webhooks.test(dead["id"], event_type=CANCELLED)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="not sent by this server"):
        client.webhooks.test(made["id"], event_type="video.failed")


def test_another_owner_s_endpoint_is_not_there(door: TestClient, receiver: Receiver) -> None:
    made = listen(door, receiver.url("/mine"))
    place = f"{PLACE}/{made['id']}"
    asked: list[tuple[str, str, Any]] = [
        ("GET", place, None),
        ("POST", place, {"name": "x"}),
        ("DELETE", place, None),
        ("POST", place + "/rotate_secret", {}),
        ("POST", place + "/test", {"event_type": CANCELLED}),
        ("GET", place + "/deliveries", None),
        ("POST", place + "/deliveries/evt_1/redeliver", None),
        ("GET", f"{PLACE}/we_%00", None),
    ]
    for method, path, body in asked:
        reply = door.request(method, path, json=body, headers=TWO)
        assert reply.status_code == 404, (method, path, reply.text)
        assert reply.json()["error"]["param"] == "webhook_endpoint_id"
    assert door.get(PLACE, headers=TWO).json() == {"object": "list", "data": [], "has_more": False}
    assert door.get(PLACE).status_code == 401
    assert receiver.heard == []


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": "n", "url": "https://example.com/"},
        {"name": "", "url": "https://example.com/", "event_types": [CANCELLED]},
        {"name": "n" * 257, "url": "https://example.com/", "event_types": [CANCELLED]},
        {"name": "n", "url": "https://example.com/", "event_types": []},
        {"name": "n", "url": "https://example.com/", "event_types": ["response.completed"]},
        {"name": "n", "url": "https://example.com/", "event_types": [CANCELLED] * 65},
        {"name": "n", "url": "https://example.com/" + "a" * 2048, "event_types": [CANCELLED]},
        {"name": "n", "url": "https://example.com/", "event_types": [CANCELLED], "secret": "x"},
        {"name": "n", "url": 7, "event_types": [CANCELLED]},
    ],
)
def test_a_malformed_endpoint_is_400_in_the_contract_s_shape(body: Any, api: TestClient) -> None:
    reply = api.post(PLACE, json=body, headers=ONE)
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with open_door(tmp_path_factory.mktemp("webhooks")) as opened:
        yield opened


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "after=we_없음", "after=%00"])
def test_a_malformed_page_is_400(query: str, api: TestClient) -> None:
    assert api.get(f"{PLACE}?{query}", headers=ONE).status_code == 400


def test_no_secret_is_shown_or_logged_after_its_making(
    api: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    made = listen(api, "http://127.0.0.1:1024/")
    cancelled(api)
    wait_delivery(api, made, tries=1)
    rest = [
        api.get(f"{PLACE}/{made['id']}", headers=ONE),
        api.get(PLACE, headers=ONE),
        api.get(f"{PLACE}/{made['id']}/deliveries", headers=ONE),
        api.post(f"{PLACE}/{made['id']}", json={"name": "m"}, headers=ONE),
    ]
    assert all(made["signing_secret"] not in reply.text for reply in rest)
    assert made["signing_secret"] not in caplog.text
    api.delete(f"{PLACE}/{made['id']}", headers=ONE)


# closed addresses

CLOSED = [
    *("http://127.0.0.1:{port}/", "http://localhost:{port}/", "http://2130706433:{port}/"),
    *("http://0:{port}/", "http://0x7f.1:{port}/", "http://017700000001:{port}/"),
    *("http://127.1:{port}/", "http://[::1]:{port}/", "http://[::ffff:127.0.0.1]:{port}/"),
    *("http://[::ffff:7f00:1]:{port}/", "http://[::]:{port}/", "http://0.0.0.0:{port}/"),
    *("http://169.254.169.254/", "http://[64:ff9b::a9fe:a9fe]/", "http://[fe80::1]/"),
    *("http://[2002:7f00:1::]:{port}/", "http://10.1.2.3/", "http://LOCALHOST:{port}/"),
]


def test_a_shared_server_connects_to_no_closed_address(tmp_path: Path, receiver: Receiver) -> None:
    """Once a key was made, its holders need not be the machine's own user."""
    with open_door(tmp_path) as door:
        key = hub_of(door).make_key("누구")["key"]
        headers = {"Authorization": f"Bearer {key}"}
        for pattern in CLOSED:
            url = pattern.format(port=receiver.port)
            body = {"name": "n", "url": url, "event_types": [CANCELLED]}
            reply = door.post(PLACE, json=body, headers=headers)
            assert reply.status_code == 400, url
            assert reply.json()["error"]["param"] == "url"
    assert receiver.heard == []


def test_a_network_that_the_operator_lists_is_open_to_all(
    tmp_path: Path, receiver: Receiver
) -> None:
    with open_door(tmp_path, webhook_networks=("127.0.0.0/8",)) as door:
        key = hub_of(door).make_key("누구")["key"]
        body = {"name": "n", "url": receiver.url("/ok"), "event_types": [CANCELLED]}
        headers = {"Authorization": f"Bearer {key}"}
        made = door.post(PLACE, json=body, headers=headers).json()
        tested = door.post(
            f"{PLACE}/{made['id']}/test", json={"event_type": CANCELLED}, headers=headers
        )
        assert tested.json()["status_code"] == 200

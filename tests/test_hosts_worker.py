"""A worker on its own host: what it fetches and sends, where lines are cut and bytes are wrong."""

import asyncio
import base64
import hashlib
import json
import os
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tunesmith import VERSION, manifest
from tunesmith.errors import FailureClass, JobFailure
from tunesmith.spec.pipe import Checkpointed, Notice
from tunesmith.spec.transfer import RemoteFile, UrlPart
from tunesmith.work.cache import Cache
from tunesmith.work.fetch import Fetcher
from tunesmith.work.first_word import Refused, first_word
from tunesmith.work.outbound import Outbound
from tunesmith.work.place import Mount, house_id, make_house, own_mark
from tunesmith.work.send import Parcel, Sender, Unsendable
from tunesmith.work.shipping import MAX_HELD_BYTES, ShippedLog
from tunesmith.work.wire import Wire

PATH, TOKEN = "/attempts/0badcafe/1", "at-token"


@dataclass
class Far:
    """The API's routes for bytes, with faults to order."""

    body: bytes = b""
    cuts: int = 0
    """So often an answer ends half-way."""
    lies: int = 0
    """So often its bytes are others."""
    refusals: int = 0
    """So often it is away."""
    ranges: list[str] = field(default_factory=list)
    strangers_saw: list[str] = field(default_factory=list)
    """Authorization headers that came to addresses that are not the API's."""
    pieces: dict[int, bytes] = field(default_factory=dict)
    total: int = 0
    commits: int = 0
    log: bytes = b""
    url: str = ""
    gate: threading.Event = field(default_factory=threading.Event)
    """Cleared: pieces wait."""

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, bytes]:
        if self.refusals > 0:
            self.refusals -= 1
            return 503, b""
        if path.startswith("/elsewhere"):
            self.strangers_saw.append(headers.get("Authorization", ""))
        if method == "GET":
            return self._give(headers)
        if "/log?" in path:
            return self._log(int(path.split("=")[1]), body)
        if path.endswith("/uploads"):
            missing = [at for at in range(self.total) if at not in self.pieces]
            return 200, json.dumps({"missing": missing}).encode()
        if path.endswith("/commit"):
            self.commits += 1
            return 200, b'{"path": "/canonical"}'
        self.gate.wait(30)
        digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
        assert headers["Content-Digest"] == f"sha-256=:{digest}:"
        self.pieces[int(path.rsplit("/", 1)[1])] = body
        return 200, b"{}"

    def _give(self, headers: Any) -> tuple[int, bytes]:
        asked = headers.get("Range", "")
        self.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-") or 0)
        body = self.body[start:]
        if self.lies > 0:
            self.lies -= 1
            body = b"?" * len(body)
        return 206 if asked else 200, body

    def _log(self, offset: int, body: bytes) -> tuple[int, bytes]:
        if offset <= len(self.log):
            self.log += body[len(self.log) - offset :]
        return 200, json.dumps({"offset": len(self.log)}).encode()


@pytest.fixture
def far() -> Iterator[Far]:
    made = Far()
    made.gate.set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._do()

        def do_POST(self) -> None:
            self._do()

        def do_PUT(self) -> None:
            self._do()

        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, answer = made.answer(self.command, self.path, self.headers, body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            if self.command == "GET" and made.cuts > 0:
                made.cuts -= 1
                answer = answer[: len(answer) // 2]
                self.close_connection = True
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield made
    finally:
        made.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _wanted(body: bytes, **more: Any) -> RemoteFile:
    sha256 = hashlib.sha256(body).hexdigest()
    return RemoteFile(name="model.safetensors", size=len(body), sha256=sha256, **more)


def _fetch(far: Far, folder: Path, wanted: RemoteFile, **more: Any) -> Path:
    async def fetch() -> Path:
        wire = Wire(folder, far.url, "sk-worker")
        try:
            cache = Cache(folder / "cache", 1 << 30)
            return await Fetcher(wire, cache, PATH, TOKEN, **more).file(wanted)
        finally:
            await wire.close()

    return asyncio.run(fetch())


def test_a_download_that_is_cut_goes_on_where_it_was(far: Far, tmp_path: Path) -> None:
    far.body, far.cuts = bytes(range(256)) * 400, 2
    assert _fetch(far, tmp_path, _wanted(far.body)).read_bytes() == far.body
    assert far.ranges == ["", "bytes=51200-", "bytes=76800-"]


def test_a_download_goes_on_after_the_worker_was_killed(far: Far, tmp_path: Path) -> None:
    far.body = bytes(range(256)) * 400
    wanted = _wanted(far.body)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{wanted.sha256}.part").write_bytes(far.body[:1000])
    assert _fetch(far, tmp_path, wanted).read_bytes() == far.body
    assert far.ranges == ["bytes=1000-"]


def test_wrong_bytes_are_fetched_anew_and_the_right_ones_kept(far: Far, tmp_path: Path) -> None:
    far.body, far.lies = b"right" * 1000, 2
    wanted = _wanted(far.body)
    assert _fetch(far, tmp_path, wanted).read_bytes() == far.body
    asked = len(far.ranges)
    _fetch(far, tmp_path, wanted)
    assert len(far.ranges) == asked == 3


def test_bytes_that_stay_wrong_fail_the_download(far: Far, tmp_path: Path) -> None:
    far.body, far.lies = b"right" * 1000, 100
    with pytest.raises(JobFailure, match=r"model\.safetensors .* not those announced") as failure:
        _fetch(far, tmp_path, _wanted(far.body))
    assert failure.value.failure_class is FailureClass.DOWNLOAD
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".part"]


def test_a_file_longer_than_announced_is_not_taken(far: Far, tmp_path: Path) -> None:
    far.body = b"right" * 1000
    with pytest.raises(JobFailure):
        _fetch(far, tmp_path, _wanted(far.body[:-5] + b"wrong").model_copy(update={"size": 10}))


def test_parts_elsewhere_are_put_together_and_no_token_goes_there(far: Far, tmp_path: Path) -> None:
    far.body, far.cuts = b"0123456789" * 100, 1
    part = UrlPart(size=1000, url=f"{far.url}/elsewhere/1?signature=x")
    wanted = _wanted(far.body * 2, parts=(part, part))
    assert _fetch(far, tmp_path, wanted).read_bytes() == far.body * 2
    assert set(far.strangers_saw) == {""}


def test_a_signed_address_that_gives_nothing_is_given_up(far: Far, tmp_path: Path) -> None:
    far.refusals = 1000
    part = UrlPart(size=10, url=f"{far.url}/elsewhere/1?signature=x")
    with pytest.raises(JobFailure, match="HTTP 503") as failure:
        _fetch(far, tmp_path, _wanted(b"0" * 10, parts=(part,)), patience_seconds=0)
    assert "signature" not in str(failure.value)


def test_the_cache_lets_go_of_what_was_used_least_lately(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 25)
    for age, name in enumerate(("a", "b", "c", "d")):
        path = tmp_path / name
        path.write_bytes(name.encode() * 10)
        cache.adopt(path, name * 64)
        if name != "c":  # in use: a job's folder has a second name of it
            path.unlink()
        os.utime(cache.folder / (name * 64), (1000 + age, 1000 + age))
    assert cache.find("a" * 64, 10)
    cache.thin()
    assert sorted(path.name[0] for path in cache.folder.iterdir()) == ["a", "c"]


def test_two_attempts_fetch_a_file_once(far: Far, tmp_path: Path) -> None:
    far.body = b"right" * 1000
    wanted = _wanted(far.body)

    async def both() -> None:
        wire = Wire(tmp_path, far.url, "sk-worker")
        fetcher = Fetcher(wire, Cache(tmp_path / "cache", 1 << 30), PATH, TOKEN)
        await asyncio.gather(*(fetcher.file(wanted) for _ in range(3)))
        await wire.close()

    asyncio.run(both())
    assert len(far.ranges) == 1


def _checkpoint(folder: Path, step: int) -> Checkpointed:
    path = folder / f"step-{step}"
    path.mkdir(parents=True)
    (path / "a").write_bytes(f"weights of {step}".encode())
    digest = manifest.seal(path, "checkpoint")
    return Checkpointed(step=step, path=str(path), manifest_sha256=digest, size_bytes=10)


def test_a_folder_is_sent_through_an_api_that_comes_and_goes(far: Far, tmp_path: Path) -> None:
    made = _checkpoint(tmp_path / "made", 1)
    far.total, far.refusals = 1, 3
    assert asyncio.run(_send(far, made)) == "/canonical"
    assert far.pieces == {0: b"weights of 1"}


async def _send(far: Far, made: Checkpointed) -> str:
    wire = Wire(Path(), far.url, "sk-worker")
    parcel = Parcel(
        kind="checkpoint",
        step=made.step,
        folder=made.path,
        manifest_sha256=made.manifest_sha256,
    )
    try:
        return await Sender(wire, PATH, TOKEN).send(parcel)
    finally:
        await wire.close()


@pytest.mark.parametrize("spoil", ["gone", "shorter", "resealed"])
def test_a_folder_that_changed_since_is_not_sent(far: Far, tmp_path: Path, spoil: str) -> None:
    made = _checkpoint(tmp_path / "made", 1)
    file, far.total = Path(made.path) / "a", 1
    if spoil == "gone":
        file.unlink()
    elif spoil == "shorter":
        file.write_bytes(b"w")
    else:
        file.write_bytes(b"w")
        manifest.seal(Path(made.path), "checkpoint")
    with pytest.raises(Unsendable):
        asyncio.run(_send(far, made))
    assert far.commits == 0


def test_a_newer_checkpoint_takes_the_place_of_one_that_waits(far: Far, tmp_path: Path) -> None:
    heard: list[Any] = []
    asyncio.run(_send_three(far, tmp_path, heard))
    assert [event.step for event in heard] == [1, 3]
    assert {event.path for event in heard} == {"/canonical"}
    assert list((tmp_path / "outgoing").iterdir()) == []


async def _send_three(far: Far, folder: Path, heard: list[Any]) -> None:
    far.total = 1
    far.gate.clear()
    wire = Wire(folder, far.url, "sk-worker")
    cache = Cache(folder / "cache", 1 << 20)

    def say(event: Checkpointed | Notice) -> None:
        far.pieces.clear()
        heard.append(event)

    outbound = Outbound(Sender(wire, PATH, TOKEN), folder / "outgoing", cache, say)
    running = asyncio.create_task(outbound.run())
    outbound.take(_checkpoint(folder / "made", 1))
    await asyncio.sleep(0.2)
    for step in (2, 3):
        made = _checkpoint(folder / "made", step)
        outbound.take(made)
        manifest.remove(Path(made.path))  # the trainer lets go of its own
    far.gate.set()
    while len(heard) < 2:
        await asyncio.sleep(0.02)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert outbound.left() is None
    await wire.close()


def test_a_log_arrives_whole_through_an_api_that_comes_and_goes(far: Far, tmp_path: Path) -> None:
    lines = b"".join(f"{at} 강물\n".encode() for at in range(1000))

    async def ship() -> None:
        wire = Wire(tmp_path, far.url, "sk-worker")
        shipped = ShippedLog(wire, PATH, TOKEN)
        far.refusals = 2
        shipping = asyncio.create_task(shipped.ship())
        for start in range(0, len(lines), 777):
            shipped.write(lines[start : start + 777])
            await asyncio.sleep(0)
        while shipped.rest() is not None:
            await asyncio.sleep(0.02)
        shipping.cancel()
        await asyncio.gather(shipping, return_exceptions=True)
        await wire.close()

    asyncio.run(ship())
    assert far.log == lines


def test_a_log_that_nobody_takes_stays_within_its_bounds(tmp_path: Path) -> None:
    shipped = ShippedLog(Wire(tmp_path, "http://127.0.0.1:9", "sk"), PATH, TOKEN)
    for at in range(200):
        shipped.write(f"{at:06d}\n".encode() * 10_000)
    rest = shipped.rest()
    assert rest is not None
    kept = rest.bytes()
    assert len(kept) <= MAX_HELD_BYTES + 70_000
    assert kept.startswith(b"000000\n")
    assert kept.endswith(b"000199\n")
    assert b"left out" in kept


def test_an_api_with_https_is_trusted_by_its_certificate_only(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    made += ["-nodes", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*made, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"version": VERSION}).encode())

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    url = f"https://127.0.0.1:{server.server_port}"
    try:
        assert first_word(url, "sk-x", str(cert)) == ""
        assert "CERTIFICATE_VERIFY_FAILED" in first_word(url, "sk-x")
        with pytest.raises(Refused, match="can't be read"):
            first_word(url, "sk-x", str(tmp_path / "none"))
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_house_has_one_id_and_a_host_of_its_own_a_mark(tmp_path: Path) -> None:
    assert house_id(tmp_path) == ""
    made = make_house(tmp_path)
    assert made == make_house(tmp_path) == house_id(tmp_path)
    assert len(made) == 32
    assert own_mark(tmp_path) == own_mark(tmp_path)
    (tmp_path / "house.json").write_text("[" * 5000)
    assert house_id(tmp_path) == ""


def test_paths_of_a_folder_that_is_mounted_elsewhere_are_rewritten_both_ways() -> None:
    mount = Mount(Path("/srv/모델"), Path("/mnt/shared"))
    ours = mount.to_ours("/srv/모델/outputs/x")
    assert ours == Path("/mnt/shared/outputs/x")
    assert mount.to_theirs(str(ours)) == "/srv/모델/outputs/x"
    assert mount.to_ours("/srv/모델2/x") == Path("/srv/모델2/x")

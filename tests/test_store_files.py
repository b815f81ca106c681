"""Paths stay in, uploads are whole or gone, and a promotion leaves the old model or the new one."""

import hashlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith import manifest
from tunesmith.errors import BadRequestError, ConflictError, PayloadTooLargeError
from tunesmith.store.files import Blobs, confine, safe_name
from tunesmith.store.promotion import Promotion, check_output, promote, redo


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A workspace with a link out of it, beside a folder that is no business of a request."""
    root = tmp_path / "작업"
    for folder in ("data", ".tunesmith", "outputs"):
        (root / folder).mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("x")
    (root / "data" / "데이터 🙂.jsonl").write_text("{}")
    (root / "out").symlink_to(tmp_path / "outside")
    (root / "in").symlink_to(root / "data")
    (root / "hidden").symlink_to(root / ".tunesmith")
    (root / "loop").symlink_to(root / "loop")
    (root / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(root / "pipe")
    return root


@pytest.mark.parametrize(
    "path",
    [
        "data/데이터 🙂.jsonl",
        "data//데이터 🙂.jsonl",
        "./data/데이터 🙂.jsonl",
        "in/데이터 🙂.jsonl",
    ],
)
def test_a_path_inside_is_resolved(workspace: Path, path: str) -> None:
    real = workspace.resolve() / "data" / "데이터 🙂.jsonl"
    assert confine(path, workspace) == real
    assert confine(str(workspace / path), workspace) == real


def test_a_path_need_not_exist(workspace: Path) -> None:
    assert confine("outputs/새/모델", workspace) == workspace.resolve() / "outputs/새/모델"


@pytest.mark.parametrize(
    "path",
    [
        "",
        "..",
        "../outside/secret",
        "data/../../outside/secret",
        "data/../data",
        "/etc/passwd",
        "/",
        "//etc/passwd",
        "out/secret",
        "out",
        "dangling",
        "loop",
        "loop/x",
        "pipe",
        ".tunesmith/db.sqlite",
        "data/.hidden/x",
        "hidden/db.sqlite",
        "a\0b",
        "a\nb",
        "a\x1bb",
        "\ud800",
        "a" * 300,
        "a/" * 3000,
        "/dev/null",
        "/proc/self/environ",
    ],
)
def test_a_path_that_leads_elsewhere_is_refused_by_field(workspace: Path, path: str) -> None:
    with pytest.raises(BadRequestError, match="dataset_path") as refusal:
        confine(path, workspace, field="dataset_path")
    assert refusal.value.param == "dataset_path"


def test_a_socket_is_refused(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("s")
        with pytest.raises(BadRequestError, match="neither a file nor a folder"):
            confine("s", workspace)


def test_allowed_roots_widen_the_workspace_but_not_for_dot_names(
    workspace: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    (outside / ".ssh").mkdir()
    assert confine(str(outside / "secret"), workspace, [outside]) == outside.resolve() / "secret"
    assert confine("out/secret", workspace, [outside]) == outside.resolve() / "secret"
    with pytest.raises(BadRequestError):
        confine(str(outside / ".ssh" / "key"), workspace, [outside])


def test_a_workspace_below_a_dot_name_works(tmp_path: Path) -> None:
    root = tmp_path / ".cache" / "ws"
    root.mkdir(parents=True)
    assert confine("a", root) == root.resolve() / "a"


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_whatever_is_asked_stays_inside_or_is_refused(path: str) -> None:
    root = Path("/tmp").resolve()
    try:
        real = confine(path, root)
    except BadRequestError:
        return
    assert real.is_relative_to(root)
    assert not any(part.startswith(".") for part in real.relative_to(root).parts)


@pytest.mark.parametrize(
    ("given_name", "name"),
    [
        ("내 데이터.jsonl", "내 데이터.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("C:\\fakepath\\a.json", "a.json"),
        (".bashrc", "bashrc"),
        ("", "upload"),
        ("...", "upload"),
        ("a\0b\n.json", "ab.json"),
        ("👩‍🚀.json", "👩‍🚀.json"),
        ("다" * 200 + ".jsonl", "다" * 64 + ".jsonl"),
    ],
)
def test_a_client_s_file_name_becomes_harmless(given_name: str, name: str) -> None:
    assert safe_name(given_name) == name


@given(st.text(max_size=400))
@settings(max_examples=300, deadline=None)
def test_every_safe_name_is_one_part_of_a_path(text: str) -> None:
    name = safe_name(text)
    assert name
    assert "/" not in name
    assert not name.startswith(".")
    assert len(name.encode()) <= 200
    assert safe_name(name) == name


def test_bytes_lie_under_their_digest(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    body = "데이터".encode() * 1000
    for _ in range(2):
        with blobs.receive(limit_bytes=len(body)) as incoming:
            incoming.write(body[:100])
            incoming.write(body[100:])
            blob = incoming.commit()
    assert blob.path.read_bytes() == body
    assert blob.path.name == blob.sha256 == hashlib.sha256(body).hexdigest()
    assert list((tmp_path / "blobs").iterdir()) == [blob.path]


def test_an_upload_over_the_limit_leaves_nothing(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    with blobs.receive(10) as incoming:
        incoming.write(b"x" * 6)
        with pytest.raises(PayloadTooLargeError, match="10 bytes"):
            incoming.write(b"x" * 6)
    assert list((tmp_path / "blobs").iterdir()) == []


def test_an_upload_that_was_cut_off_leaves_nothing(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    with blobs.receive(10) as incoming:
        incoming.write(b"x")
    with blobs.receive(10) as incoming:
        incoming.write(b"x")
        with pytest.raises(BadRequestError, match="SHA-256"):
            incoming.commit("0" * 64)
    assert list((tmp_path / "blobs").iterdir()) == []
    (tmp_path / "blobs" / "dead.part").write_bytes(b"x")
    Blobs(tmp_path / "blobs")
    assert list((tmp_path / "blobs").iterdir()) == []


def test_another_server_s_start_leaves_an_upload_on_its_way_alone(tmp_path: Path) -> None:
    with Blobs(tmp_path / "blobs").receive(10) as incoming:
        incoming.write("글".encode())
        Blobs(tmp_path / "blobs")
        assert incoming.commit().path.read_bytes() == "글".encode()


def make_artifact(folder: Path, text: str) -> str:
    staging = folder.with_name(folder.name + ".staging")
    (staging / "하위").mkdir(parents=True)
    (staging / "model.bin").write_text(text)
    (staging / "하위" / "x").write_text(text)
    return manifest.commit(staging, folder, "artifact")


def test_an_artifact_becomes_the_output(tmp_path: Path) -> None:
    digest = make_artifact(tmp_path / "artifact", "new")
    output = tmp_path / "outputs" / "a"
    promote(tmp_path / "artifact", output, manifest_sha256=digest, journal=tmp_path / "j")
    manifest.verify(output, digest)
    assert not (tmp_path / "artifact").exists()
    assert list((tmp_path / "j").iterdir()) == []


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_earlier_output_is_replaced_whole(tmp_path: Path, can_exchange: bool) -> None:
    output = tmp_path / "out"
    make_artifact(output, "old")
    digest = make_artifact(tmp_path / "artifact", "new")
    for _ in range(2):
        promote(
            tmp_path / "artifact",
            output,
            manifest_sha256=digest,
            journal=tmp_path / "j",
            can_exchange=can_exchange,
        )
    assert manifest.verify(output, digest).kind == "artifact"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "j"}


def test_another_server_s_start_leaves_a_promotion_under_way_alone(tmp_path: Path) -> None:
    output, journal = tmp_path / "out", tmp_path / "j"
    make_artifact(output, "old")
    digest = make_artifact(tmp_path / "artifact", "new")
    moving = Promotion(tmp_path / "artifact", output, manifest_sha256=digest, journal=journal)
    moving.stage()
    assert redo(journal) == []
    assert moving.swap() == moving.swap() == output
    assert redo(journal) == []
    moving.close()
    manifest.verify(output, digest)
    assert list(journal.iterdir()) == []
    assert not (tmp_path / "artifact").exists()


def test_a_promotion_that_was_not_wanted_leaves_all_as_it_was(tmp_path: Path) -> None:
    output, journal = tmp_path / "out", tmp_path / "j"
    old = make_artifact(output, "old")
    new = make_artifact(tmp_path / "artifact", "new")
    moving = Promotion(tmp_path / "artifact", output, manifest_sha256=new, journal=journal)
    moving.stage()
    moving.close()
    manifest.verify(output, old)
    manifest.verify(tmp_path / "artifact", new)
    assert list(journal.iterdir()) == []


def test_an_empty_folder_may_be_the_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    digest = make_artifact(tmp_path / "artifact", "new")
    promote(tmp_path / "artifact", tmp_path / "out", manifest_sha256=digest, journal=tmp_path / "j")
    manifest.verify(tmp_path / "out", digest)


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    digest = make_artifact(tmp_path / "artifact", "new")
    other = tmp_path / "data"
    other.mkdir()
    (other / "논문.txt").write_text("mine")
    link = tmp_path / "link"
    link.symlink_to(other)
    for output in (other, link, other / "논문.txt"):
        with pytest.raises(ConflictError, match="output_dir"):
            check_output(output)
        with pytest.raises(ConflictError):
            promote(tmp_path / "artifact", output, manifest_sha256=digest, journal=tmp_path / "j")
    assert (other / "논문.txt").read_text() == "mine"
    manifest.verify(tmp_path / "artifact", digest)


def test_a_checkpoint_is_no_output_to_replace(tmp_path: Path) -> None:
    (tmp_path / "staging").mkdir()
    manifest.commit(tmp_path / "staging", tmp_path / "step-1", "checkpoint")
    with pytest.raises(ConflictError):
        check_output(tmp_path / "step-1")


def test_a_missing_or_other_artifact_is_not_promoted(tmp_path: Path) -> None:
    make_artifact(tmp_path / "artifact", "new")
    with pytest.raises(manifest.BrokenManifest):
        promote(
            tmp_path / "artifact", tmp_path / "o", manifest_sha256="0" * 64, journal=tmp_path / "j"
        )
    assert not (tmp_path / "o").exists()


KILLED = """
import os, sys
from pathlib import Path
from tunesmith.store.promotion import promote
left = int(sys.argv[1])
touching = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "open", "shutil.rmtree"}
def count(event, args):
    global left
    if event in touching or event.startswith("ctypes.call"):
        left -= 1
        if left < 0:
            os._exit(9)
folder = Path(sys.argv[2])
sys.addaudithook(count)
promote(folder / "artifact", folder / "out", manifest_sha256=sys.argv[3], journal=folder / "j",
        can_exchange=sys.argv[4] == "True")
"""


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_output(
    tmp_path: Path, can_exchange: bool
) -> None:
    seen: set[str] = set()
    for kill_at in range(0, 60, 2):
        folder = tmp_path / str(kill_at)
        folder.mkdir()
        old = make_artifact(folder / "out", "old")
        new = make_artifact(folder / "artifact", "new")
        arguments = [str(kill_at), str(folder), new, str(can_exchange)]
        code = subprocess.run([sys.executable, "-S", "-c", KILLED, *arguments], env=_ENV).returncode
        assert code in (0, 9)
        redo(folder / "j")
        found = manifest.verify(folder / "out")
        digest = hashlib.sha256((folder / "out" / manifest.MANIFEST).read_bytes()).hexdigest()
        assert found.kind == "artifact"
        assert digest in (old, new)
        seen.add(digest)
        if digest == old:
            manifest.verify(folder / "artifact", new)
        assert list((folder / "j").glob("*.json")) == []
        promote(folder / "artifact", folder / "out", manifest_sha256=new, journal=folder / "j")
        manifest.verify(folder / "out", new)
        if code == 0:
            break
    else:
        raise AssertionError("no run went through to its end")
    assert len(seen) > 1


_ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

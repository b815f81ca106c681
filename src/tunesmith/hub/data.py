"""Data sets on their way in: pinned by content, checked for structure once per content."""

import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from sqlalchemy.engine import Connection

from tunesmith.data import formats
from tunesmith.data.reading import Reading
from tunesmith.data.row import Wrong
from tunesmith.data.rows import FileReport, RowIndex, check_file
from tunesmith.data.scan import open_regular
from tunesmith.data.twins import Twins
from tunesmith.errors import BadRequestError, ValidationError
from tunesmith.hub.names import FoundData
from tunesmith.hub.principal import Principal
from tunesmith.spec.records import Source
from tunesmith.store import catalog
from tunesmith.store.files import Blob, Incoming, safe_name

if TYPE_CHECKING:
    from tunesmith.hub import Hub

SUFFIXES = (".json", ".jsonl", ".txt", ".csv", ".tsv", ".parquet")
CLAIM_SECONDS = 600.0
"""Bytes that were named so lately are not swept away by another process, whatever names them."""
_BLOCK = 1 << 20
Stamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class Pinned:
    """A data set as it was at this moment, whatever becomes of the file it was read from."""

    source: Source
    format: str
    num_samples: int
    size: int
    duplicates: Twins


@dataclass(frozen=True)
class Upload:
    name: str
    """What a request may call it: `data/<file name>`."""
    size: int
    num_samples: int
    format: str


def pin(hub: "Hub", found: FoundData, field: str, reading: Reading = Reading()) -> Pinned:
    """Copy into the content-addressed store, check the structure, keep the verdict.

    Raises ValidationError (422) with the lines that are wrong, BadRequestError for a file of
    another kind.
    """
    suffix = usual_suffix(found.suffix, found.name, field)
    stamp = _stamp(found.path)
    known = hub.pinned.get((str(found.path), stamp, reading))
    if known is not None and claim(hub, known):
        return known
    sha256 = found.sha256 or _take_in(hub, found.path).sha256
    path = named(hub, sha256, suffix)
    report = _structure(hub, path, sha256, reading)
    _refuse_faults(report, found.name, field)
    source = Source(name=found.name, path=str(path), sha256=sha256)
    assert report.format
    pinned = Pinned(source, report.format, report.num_samples, report.size, report.duplicates)
    if len(hub.pinned) > 1000:
        hub.pinned.clear()
    hub.pinned[(str(found.path), stamp, reading)] = pinned
    claim(hub, pinned)
    return pinned


def claim(hub: "Hub", pinned: Pinned) -> bool:
    """Make its bytes young, so that no other process's sweep takes them before the job's row is
    there. False where they are gone."""
    try:
        age = time.time() - os.stat(pinned.source.path).st_mtime
        if not hub.store.is_alone and not 0 <= age < CLAIM_SECONDS:
            os.utime(pinned.source.path)
    except OSError:
        return False
    return True


def keep_upload(
    hub: "Hub",
    filename: str,
    incoming: Incoming,
    who: Principal,
    reading: Reading = Reading(),
) -> Upload:
    """Check what has come in, and keep it under a free name. Call it in `incoming`'s context:
    a file with faults leaves nothing behind."""
    safe = _file_name(filename)
    usual_suffix(Path(safe).suffix, safe, "file")
    incoming.flush()
    report = check_file(incoming.part, name=safe, reading=reading)
    _refuse_faults(report, safe, "file")
    blob = incoming.commit()

    def work(tx: Connection) -> catalog.Upload:
        return catalog.add_upload(
            tx,
            owner=who.owner,
            filename=safe,
            sha256=blob.sha256,
            size_bytes=blob.size_bytes,
            format=report.format,
            num_samples=report.num_samples,
            is_taken=lambda name: os.path.lexists(hub.workspace / name),
        )

    kept = hub.store.write(work).result()
    _keep_report(hub, report, Path(safe).suffix.lower(), reading)
    return Upload(kept.name, blob.size_bytes, report.num_samples, report.format or "")


def refuse_unanswered(part: Pinned, field: str, reading: Reading) -> None:
    """Conversations with no answer to learn from, by their lines, for methods that want one.

    Raises ValidationError. Rows of a prompt alone are no conversations, and left alone.
    """
    name, is_conversation = part.source.name, False
    with RowIndex.open(part.source.path, reading) as rows, suppress(Wrong):
        is_conversation = "messages" in formats.fields(rows.body(0))
    if is_conversation:
        report = check_file(part.source.path, name=name, reading=reading, format="openai")
        _refuse_faults(report, name, field)


def _take_in(hub: "Hub", path: Path) -> Blob:
    """The file's bytes as they are now, under their digest."""
    with open_regular(path) as file, hub.blobs.receive(hub.settings.max_upload_bytes) as incoming:
        refuse_elsewhere(path, file)
        while block := file.read(_BLOCK):
            incoming.write(block)
        return incoming.commit()


def refuse_elsewhere(path: Path, file: BinaryIO) -> None:
    """A folder on the way was made a link since the path was looked at: what is open counts."""
    if os.readlink(f"/proc/self/fd/{file.fileno()}") != str(path):
        raise BadRequestError(f"{path.name} was moved while it was opened; ask again")


def _structure(hub: "Hub", path: Path, sha256: str, reading: Reading) -> FileReport:
    """The file's check, done once per content, kind and way of reading."""
    key = _key(sha256, path.suffix, reading)
    kept = hub.store.read(lambda tx: catalog.find_verdict(tx, key))
    if kept is not None:
        return FileReport.model_validate(kept)
    report = check_file(path, reading=reading)
    _keep_report(hub, report, path.suffix, reading)
    return report


def _keep_report(hub: "Hub", report: FileReport, suffix: str, reading: Reading) -> None:
    body = report.model_dump(mode="json")
    key = _key(report.sha256, suffix, reading)
    hub.store.write(lambda tx: catalog.keep_verdict(tx, key, body)).result()


def _key(sha256: str, suffix: str, reading: Reading) -> str:
    return f"rows:{sha256}:{suffix}{reading.key}"


def named(hub: "Hub", sha256: str, suffix: str) -> Path:
    """The blob under a name that tells its kind: a second name of the same bytes."""
    path = hub.settings.home / "data" / f"{sha256}{suffix}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(hub.blobs.path(sha256), path)
        except FileExistsError:
            pass
        except OSError:
            shutil.copyfile(hub.blobs.path(sha256), path)
    return path


def _refuse_faults(report: FileReport, name: str, field: str) -> None:
    if not report.fault_count:
        return
    first = report.faults[0]
    message = (
        f"{field}: {name}: {report.fault_count} faults, the first in {first.unit} {first.line}: "
        f"{first.msg}"
    )
    details = [
        {"loc": [field, fault.unit, fault.line, fault.loc], "msg": fault.msg, "type": "data"}
        for fault in report.faults
    ]
    raise ValidationError(message, param=field, details=details)


def usual_suffix(suffix: str, name: str, field: str) -> str:
    """Raises BadRequestError for what is no kind of data set."""
    if suffix.lower() not in SUFFIXES:
        raise BadRequestError(
            f"{field}: {name!r} ends in none of {', '.join(SUFFIXES)}", param=field
        )
    return suffix.lower()


def _file_name(filename: str) -> str:
    """What a client calls its file, made harmless."""
    if not filename.strip():
        raise BadRequestError("file: the upload has no file name; send one", param="file")
    return safe_name(filename)


def _stamp(path: Path) -> Stamp:
    """Changes with the file's bytes, and with what the path leads to."""
    found = path.stat(follow_symlinks=False)
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

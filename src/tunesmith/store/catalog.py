"""What can be asked for by name: registered models and data sets, uploads, and their verdicts."""

import secrets
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, Literal

from sqlalchemy import Table, delete, insert, select, update
from sqlalchemy.engine import Connection, RowMapping

from tunesmith.errors import BadRequestError, ConflictError, NotFoundError
from tunesmith.spec.strict import Sha256, Strict
from tunesmith.store.rows import clean
from tunesmith.store.tables import PINNED, UNFINISHED, blobs, jobs, names, now, uploads, verdicts

Kind = Literal["model", "dataset"]
MAX_NAME_LENGTH = 200
_RESERVED = ("ft:", "file-")


class Registered(Strict):
    kind: Kind
    name: str
    path: str
    """Absolute."""
    owner: str
    detail: dict[str, Any]
    created_at: float


class Upload(Strict):
    id: str
    """`file-…`"""
    name: str
    """A path that requests may give, such as `data/a.jsonl`; no other upload has it."""
    filename: str
    """As the client called it, made safe."""
    sha256: Sha256
    size_bytes: int
    owner: str
    purpose: str
    format: str | None
    num_samples: int | None
    created_at: float


def register(
    tx: Connection,
    kind: Kind,
    name: str,
    path: str,
    owner: str,
    *,
    detail: dict[str, Any] | None = None,
    should_replace: bool = False,
) -> Registered:
    """Give a path a name. Raises ConflictError where the name stands for another path."""
    _check_name(name)
    known = find(tx, kind, name)
    if known is not None:
        if known.path != path and not should_replace:
            raise ConflictError(f"{name!r} already stands for {known.path}; remove it first")
        tx.execute(delete(names).where(names.c.kind == kind, names.c.name == name))
    row = {"kind": kind, "name": name, "path": path, "owner": owner, "detail": detail or {}}
    tx.execute(insert(names).values(**row, created_at=now()))
    found = find(tx, kind, name)
    assert found is not None
    return found


def _check_name(name: str) -> None:
    parts = name.split("/")
    if not (
        1 <= len(name) <= MAX_NAME_LENGTH
        and name.isprintable()
        and all(part and not part.startswith(".") for part in parts)
        and not name.startswith(_RESERVED)
        and name == name.strip()
    ):
        raise BadRequestError(
            f"{name[:50]!r} can't be a name: 1 to {MAX_NAME_LENGTH} printable characters, parts "
            "between slashes that are not empty and don't begin with a dot, and neither ft: nor "
            "file- in front",
            param="name",
        )


def find(tx: Connection, kind: Kind, name: str) -> Registered | None:
    query = select(names).where(names.c.kind == kind, names.c.name == clean(name))
    row = tx.execute(query).mappings().first()
    return None if row is None else Registered.model_validate(dict(row))


def list_names(tx: Connection, kind: Kind) -> list[Registered]:
    query = select(names).where(names.c.kind == kind).order_by(names.c.name)
    return [Registered.model_validate(dict(row)) for row in tx.execute(query).mappings()]


def remove(tx: Connection, kind: Kind, name: str) -> None:
    """Forget a name; the files stay. Raises NotFoundError."""
    gone = tx.execute(delete(names).where(names.c.kind == kind, names.c.name == clean(name)))
    if not gone.rowcount:
        raise NotFoundError(f"no {kind} is registered as {clean(name)[:100]!r}")


def add_upload(
    tx: Connection,
    *,
    owner: str,
    filename: str,
    sha256: str,
    size_bytes: int,
    folder: str = "data",
    purpose: str = "fine-tune",
    format: str | None = None,
    num_samples: int | None = None,
    should_reuse: bool = True,
    is_taken: Callable[[str], bool] = lambda name: False,
) -> Upload:
    """Name a blob `<folder>/<filename>`, or `<folder>/<stem>-2<suffix>` where that is taken: by
    another upload, or by what else a request could mean by it (`is_taken`).

    `filename` is safe already (see `files.safe_name`). With `should_reuse`, the same bytes under
    the same name by the same owner are the same upload.
    """
    put_once(tx, blobs, {"sha256": sha256, "size_bytes": size_bytes})
    name, same = _free_name(tx, folder, filename, owner, sha256, is_taken)
    if same is not None and should_reuse:
        return same
    row = {
        "id": "file-" + secrets.token_hex(12),
        "name": name,
        "filename": filename,
        "sha256": sha256,
        "size_bytes": size_bytes,
        "owner": owner,
        "purpose": purpose,
        "format": format,
        "num_samples": num_samples,
    }
    tx.execute(insert(uploads).values(**row, created_at=now()))
    return get_upload(tx, row["id"])  # type: ignore[arg-type]


def _free_name(
    tx: Connection,
    folder: str,
    filename: str,
    owner: str,
    sha256: str,
    is_taken: Callable[[str], bool],
) -> tuple[str, Upload | None]:
    """A name that is free, and the upload of the same bytes met on the way, if any."""
    path = PurePosixPath(filename)
    number, same = 1, None
    while True:
        name = f"{folder}/{path.stem}{'' if number == 1 else f'-{number}'}{path.suffix}"
        known = find_upload(tx, name)
        if known is None and not is_taken(name):
            return name, same
        if known and same is None and (known.owner, known.sha256) == (owner, sha256):
            same = None if is_taken(name) else known
        number += 1


def put_once(tx: Connection, table: Table, row: dict[str, Any]) -> None:
    """Insert a row unless one with its primary key is there."""
    key = [column == row[column.name] for column in table.primary_key]
    if tx.execute(select(*table.primary_key).where(*key)).first() is None:
        tx.execute(insert(table).values(**row, created_at=now()))


def find_upload(tx: Connection, name: str, owner: str | None = None) -> Upload | None:
    """By id or by name."""
    column = uploads.c.id if name.startswith("file-") else uploads.c.name
    query = select(uploads).where(column == clean(name))
    if owner is not None:
        query = query.where(uploads.c.owner == owner)
    row = tx.execute(query).mappings().first()
    return None if row is None else _to_upload(row)


def get_upload(tx: Connection, name: str, owner: str | None = None) -> Upload:
    """Raises NotFoundError."""
    found = find_upload(tx, name, owner)
    if found is None:
        raise NotFoundError(f"no uploaded file {clean(name)[:100]!r}")
    return found


def list_uploads(
    tx: Connection, owner: str | None = None, purpose: str | None = None
) -> list[Upload]:
    """Newest first."""
    query = select(uploads).order_by(uploads.c.number.desc())
    if owner is not None:
        query = query.where(uploads.c.owner == owner)
    if purpose is not None:
        query = query.where(uploads.c.purpose == purpose)
    return [_to_upload(row) for row in tx.execute(query).mappings()]


def describe_upload(tx: Connection, upload_id: str, format: str, num_samples: int) -> None:
    """Add what reading the rows brought to light."""
    values = {"format": format, "num_samples": num_samples}
    tx.execute(update(uploads).where(uploads.c.id == upload_id).values(**values))


def remove_upload(tx: Connection, name: str, owner: str | None = None) -> Upload:
    """Forget an upload; its bytes go with `take_orphans`. Raises NotFoundError."""
    found = get_upload(tx, name, owner)
    tx.execute(delete(uploads).where(uploads.c.id == found.id))
    return found


def take_orphans(tx: Connection) -> list[str]:
    """Forget blobs that no upload and no unfinished job needs; returns whose files to remove."""
    named = select(uploads.c.sha256)
    orphans = set(tx.scalars(select(blobs.c.sha256).where(blobs.c.sha256.not_in(named))))
    if orphans:
        query = select(*PINNED).where(jobs.c.state.in_(UNFINISHED))
        for row in tx.execute(query):
            orphans -= {source["sha256"] for source in row if source}
        tx.execute(delete(blobs).where(blobs.c.sha256.in_(orphans)))
    return sorted(orphans)


def keep_verdict(tx: Connection, key: str, verdict: dict[str, Any]) -> None:
    """What a check of the data said; the key names the bytes, the tokenizer and the limits."""
    known = update(verdicts).where(verdicts.c.key == key).values(verdict=verdict)
    if not tx.execute(known).rowcount:
        tx.execute(insert(verdicts).values(key=key, verdict=verdict, created_at=now()))


def find_verdict(tx: Connection, key: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None = tx.scalar(
        select(verdicts.c.verdict).where(verdicts.c.key == key)
    )
    return found


def _to_upload(row: RowMapping) -> Upload:
    return Upload.model_validate({name: row[name] for name in Upload.model_fields})

"""`python -m tunesmith.hub.fetch`: the process that downloads one snapshot, and can be killed.

A line of JSON on stdin says what; stdin's end means that nobody waits any more. The last line on
stdout is the outcome.
"""

import errno
import hashlib
import os
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO, Literal

from tunesmith.hub.order import Order, Outcome, Wanted

STALE_SECONDS = 24 * 3600.0
"""After which the unfinished file of a download that was killed is taken away."""


def main() -> None:
    """Carry out the one order."""
    lines = sys.stdin.buffer
    order = Order.model_validate_json(lines.readline())
    threading.Thread(target=_die_with, args=(lines,), daemon=True).start()
    print(download(order).model_dump_json(), flush=True)
    os._exit(0)  # no thread of the library's is waited for


def _die_with(lines: BinaryIO) -> None:
    lines.read()
    os._exit(1)


def download(order: Order) -> Outcome:
    """Fetch, then compare every file with what the hub said of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    _drop_stale(order)
    try:
        folder = snapshot_download(
            order.repo,
            revision=order.commit,
            cache_dir=order.cache,
            endpoint=order.endpoint,
            token=order.token or False,
            allow_patterns=[file.name for file in order.files],
        )
        wrong = [file.name for file in order.files if not _is_right(Path(folder), file)]
    except (GatedRepoError, RepositoryNotFoundError) as error:
        return Outcome(kind="final", message=_line(error))
    except OSError as error:
        kind: Literal["disk_full", "again"] = "again"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            kind = "disk_full"
        return Outcome(kind=kind, message=_line(error))
    except Exception as error:  # the process's edge: whatever the library raises is told
        return Outcome(kind="again", message=_line(error))
    if wrong:
        return Outcome(kind="again", message=f"{wrong[0]} came with other bytes than announced")
    return Outcome(kind="done")


def _is_right(folder: Path, file: Wanted) -> bool:
    """A file with other bytes is taken away, so that the next try fetches it anew."""
    path = folder / file.name
    real = path.resolve()
    if real.stat().st_size == file.size and file.sha256 in (None, _sha256(real)):
        return True
    path.unlink()
    real.unlink(missing_ok=True)
    return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _drop_stale(order: Order) -> None:
    blobs = order.cache / ("models--" + order.repo.replace("/", "--")) / "blobs"
    for part in blobs.glob("*.incomplete"):
        if part.stat().st_mtime < time.time() - STALE_SECONDS:
            part.unlink(missing_ok=True)


def _line(error: Exception) -> str:
    """The first line of what is often a page."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:500] if text else ''}"


if __name__ == "__main__":
    main()

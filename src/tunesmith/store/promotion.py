"""How an artifact becomes a job's output: names are exchanged, so that a crash leaves old or new.

The order: place locked → journal written → artifact brought to the output's file system → names
exchanged → folders synced → old one removed → journal removed. Where the kernel can't exchange
names, the old one is moved aside first; `redo` at the next start finishes that.
"""

import ctypes
import errno
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from tunesmith import manifest
from tunesmith.errors import ConflictError, NotReadyError
from tunesmith.manifest import MANIFEST, Manifest
from tunesmith.store import locks
from tunesmith.store.space import told_as_no_space

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
PATIENCE_SECONDS = 20.0
"""For another process that has the same output's place."""
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class _Plan:
    """What the journal holds: absolute paths as text."""

    artifact: str
    staged: str
    """The artifact itself, or its copy on the output's file system."""
    aside: str
    """Where the old output goes if names can't be exchanged."""
    output: str
    manifest_sha256: str


def check_output(output_dir: Path) -> None:
    """Raises ConflictError unless it is absent, empty, or the artifact of an earlier job."""
    if output_dir.is_symlink() or (output_dir.exists() and not output_dir.is_dir()):
        raise _occupied(output_dir, "is not a folder")
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return
    if _kind(output_dir) != "artifact":
        raise _occupied(output_dir, "holds files that no job of this server made")


def _occupied(output_dir: Path, fault: str) -> ConflictError:
    return ConflictError(
        f"output_dir {output_dir} {fault}; choose a folder that is new or empty, or the output of "
        "an earlier job",
        param="output_dir",
    )


class Promotion:
    """One artifact on its way to its output. No other process has the output's place meanwhile.

    `journal` is a folder that `redo` reads at the next start.
    """

    def __init__(
        self,
        artifact: Path,
        output_dir: Path,
        *,
        manifest_sha256: str,
        journal: Path,
        can_exchange: bool = True,
    ) -> None:
        self._artifact, self._output, self._digest = artifact, output_dir, manifest_sha256
        self._can_exchange = can_exchange
        self._line = _line(journal, output_dir)
        self._lock: int | None = None
        self._plan: _Plan | None = None

    def stage(self) -> None:
        """What takes long: bring it near, where a rename can't reach the output.

        Raises as `promote`, and NotReadyError where another process has the place.
        """
        with told_as_no_space():
            self._line.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                self._lock = locks.hold(self._line.with_suffix(".lock"), PATIENCE_SECONDS)
            except TimeoutError:
                raise NotReadyError("another server is writing this output; try again") from None
            if _digest(self._output) == self._digest:
                return
            if _digest(self._artifact) != self._digest:
                raise manifest.BrokenManifest(
                    f"{self._artifact} is not the artifact that was reported"
                )
            check_output(self._output)
            _make_parents(self._output)
            plan = _plan(self._artifact, self._output, self._digest)
            manifest.write_durably(self._line, json.dumps(asdict(plan)).encode())
            self._plan = plan
            _bring_near(plan)

    def swap(self) -> Path:
        """What is quick: exchange the names. Done again, it changes nothing."""
        with told_as_no_space():
            if _digest(self._output) != self._digest:
                assert self._plan is not None, "it is staged before it is swapped"
                check_output(self._output)
                staged, aside = Path(self._plan.staged), Path(self._plan.aside)
                _swap(staged, self._output, aside, self._can_exchange)
        return self._output

    def close(self) -> None:
        """Remove what was replaced, or the copy that was not wanted, and let the place go."""
        if self._plan is not None:
            _redo_one(self._plan, self._line)
        if self._lock is not None:
            locks.let_go(self._line.with_suffix(".lock"), self._lock)
            self._lock = None


def promote(
    artifact: Path,
    output_dir: Path,
    *,
    manifest_sha256: str,
    journal: Path,
    can_exchange: bool = True,
) -> Path:
    """Move a sealed artifact to `output_dir`, in place of an earlier one. Returns `output_dir`.

    Its bytes are verified before, elsewhere; here only its manifest is, by digest. Done again after
    it was done, it changes nothing. Raises, with the old output whole: ConflictError (see
    `check_output`), NoSpaceError, and BrokenManifest where the artifact is missing or another one.
    """
    moving = Promotion(
        artifact,
        output_dir,
        manifest_sha256=manifest_sha256,
        journal=journal,
        can_exchange=can_exchange,
    )
    try:
        moving.stage()
        return moving.swap()
    finally:
        moving.close()


def _line(journal: Path, output_dir: Path) -> Path:
    return journal / (hashlib.sha256(os.fsencode(output_dir)).hexdigest()[:32] + ".json")


def _make_parents(output_dir: Path) -> None:
    """Raises ConflictError where the file system will not have such a folder."""
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
    except RecursionError:
        raise _occupied(output_dir.parent, "lies too deep") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _occupied(output_dir, f"cannot be made ({error.strerror})") from None


def _plan(artifact: Path, output_dir: Path, digest: str) -> _Plan:
    is_near = artifact.stat().st_dev == output_dir.parent.stat().st_dev
    beside = output_dir.with_name(f".{output_dir.name}.new")
    return _Plan(
        artifact=str(artifact),
        staged=str(artifact if is_near else beside),
        aside=str(output_dir.with_name(f".{output_dir.name}.old")),
        output=str(output_dir),
        manifest_sha256=digest,
    )


def _bring_near(plan: _Plan) -> None:
    """Copy to the output's file system where a rename can't reach it, and read the copy back."""
    if plan.staged == plan.artifact:
        return
    staged = Path(plan.staged)
    try:
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(plan.artifact, staged, symlinks=True)
        manifest.verify(staged, plan.manifest_sha256)
        _sync_tree(staged)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _sync_tree(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(staged: Path, output: Path, aside: Path, can_exchange: bool) -> None:
    if not output.exists() or not any(output.iterdir()):
        os.rename(staged, output)
    elif not (can_exchange and _exchange(staged, output)):
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(output, aside)
        os.rename(staged, output)
    manifest.fsync_folder(output.parent)
    if staged.parent != output.parent:
        manifest.fsync_folder(staged.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step. False where kernel or file system can't."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    renameat2.argtypes = (
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_uint,
    )
    done = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(one))


def _tidy(plan: _Plan, line: Path) -> None:
    """Once the new one is in place: remove what it replaced, and the journal's line."""
    for name in {plan.staged, plan.aside, plan.artifact}:
        manifest.remove(Path(name))
    line.unlink(missing_ok=True)
    manifest.fsync_folder(line.parent)


def redo(journal: Path) -> list[Path]:
    """At start: finish or drop what a crash interrupted. Returns the outputs that were looked at.

    Where the exchange had not happened, the old output stays and the artifact waits for its attempt
    to be finished again.
    """
    if not journal.is_dir():
        return []
    outputs = []
    for line in sorted(journal.glob("*.json")):
        with locks.holding(line.with_suffix(".lock")) as is_ours:
            if not is_ours or not line.exists():  # a server that lives is at it
                continue
            plan = _Plan(**json.loads(line.read_bytes()))
            _redo_one(plan, line)
            outputs.append(Path(plan.output))
    for lock in journal.glob("*.lock"):
        with locks.holding(lock):
            pass
    return outputs


def _redo_one(plan: _Plan, line: Path) -> None:
    output, staged, aside = Path(plan.output), Path(plan.staged), Path(plan.aside)
    if not output.exists() and _kind(aside) is not None:
        os.rename(aside, output)
        manifest.fsync_folder(output.parent)
    if _digest(output) == plan.manifest_sha256:
        _tidy(plan, line)
        return
    if plan.staged != plan.artifact:
        manifest.remove(staged)
    line.unlink(missing_ok=True)


def _digest(folder: Path) -> str | None:
    """Of the manifest; None where there is none."""
    try:
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return None


def _kind(folder: Path) -> str | None:
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes()).kind
    except (OSError, ValueError):
        return None

"""`doctor`: what this machine has, what is missing, and what to do about it."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tunesmith.cli.place import JsonOption, WorkspaceOption, home_of, own_server, settings_for
from tunesmith.cli.terminal import FAILED, OK, show, show_json, tell
from tunesmith.cli.text import bytes_text

if TYPE_CHECKING:
    from tunesmith.settings import Settings

Level = Literal["ok", "warning", "error"]

_MARKS = {"ok": "✓", "warning": "!", "error": "✗"}
_LITTLE_DISK, _NO_DISK = 10 << 30, 1 << 30
_LITTLE_MEMORY = 4 << 30
_NVIDIA_SECONDS = 10


@dataclass(frozen=True)
class Check:
    name: str
    level: Level
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Package:
    """`floor` is the first version without a known hole; `extra` is what brings the package."""

    name: str
    floor: tuple[int, ...]
    extra: str
    is_pinned: bool = False


PACKAGES = (
    Package("starlette", (0, 49, 1), "server"),
    Package("h11", (0, 16), "server"),
    Package("python-multipart", (0, 0, 34), "server"),
    Package("jinja2", (3, 1, 6), "server"),
    Package("fastapi", (0, 165), "server"),
    Package("sqlalchemy", (2, 1), "server"),
    Package("torch", (2, 10), "train"),
    Package("transformers", (5, 3), "train"),
    Package("peft", (0, 21, 2), "train"),
    Package("safetensors", (0, 8), "train"),
)


def doctor(
    workspace: WorkspaceOption = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="The port to look at.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check this machine; says what to do. Exits with 1 where something is wrong."""
    settings = settings_for(workspace, port=port)
    checks = examine(settings, workspace)
    if as_json:
        show_json([asdict(check) for check in checks])
    else:
        for check in checks:
            show(f"{_MARKS[check.level]} {check.name:<18}{check.found}")
            if check.advice:
                show(f"{'':<20}→ {check.advice}")
        _sum_up(checks)
    raise typer.Exit(FAILED if any(check.level == "error" for check in checks) else OK)


def examine(settings: "Settings", workspace: Path | None = None) -> list[Check]:
    parts: list[Callable[[], list[Check]]] = [
        lambda: [check_python(), check_sqlite()],
        lambda: [check_package(package) for package in PACKAGES],
        lambda: [check_cores(settings), check_memory(settings), *check_gpus()],
        lambda: [check_compiler(), check_workspace(settings), check_disk(settings)],
        lambda: [check_port(settings, workspace), *check_bell(settings)],
    ]
    return [check for part in parts for check in part()]


def check_bell(settings: "Settings") -> list[Check]:
    """What `TUNESMITH_BELL` wants; nothing where workers ask by themselves."""
    if settings.bell == "poll":
        return []
    if find_spec(settings.bell) is None:
        advice = f"pip install 'tunesmith[{settings.bell}]'"
        return [Check(settings.bell, "error", "not installed", advice)]
    if settings.bell == "ray":
        return [Check("ray", "ok", settings.ray_address or "a cluster of this machine")]
    return [check_redis(settings.redis_url)]


def check_redis(url: str) -> Check:
    from redis import Redis, RedisError

    try:
        with Redis.from_url(url, socket_connect_timeout=2, socket_timeout=2) as client:
            client.ping()
    except (RedisError, ValueError) as error:
        return Check(
            "redis",
            "warning",
            f"no answer ({type(error).__name__}); jobs run all the same, only later",
            "start redis-server, or set TUNESMITH_REDIS_URL",
        )
    return Check("redis", "ok", "answers")


def check_python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    return Check("python", "ok", f"{found} on {sys.platform}")


def check_sqlite() -> Check:
    """The library that the server would use: pysqlite3 where it is there."""
    try:
        from pysqlite3 import sqlite_version

        origin = "pysqlite3"
    except ImportError:
        from sqlite3 import sqlite_version

        origin = "the interpreter's own"
    found = f"{sqlite_version} ({origin})"
    if has_wal_fix(numbers(sqlite_version)):
        return Check("sqlite", "ok", found)
    return Check(
        "sqlite",
        "warning",
        f"{found}, without the fix of the WAL-reset fault (3.51.3, 3.50.7, 3.44.6)",
        "pip install 'pysqlite3>=0.6.1', or use PostgreSQL (TUNESMITH_DATABASE_URL)",
    )


def has_wal_fix(version: tuple[int, ...]) -> bool:
    """Fixed in 3.51.3 and, brought back, in 3.50.7 and 3.44.6."""
    series = version[:2]
    if series == (3, 50):
        return version >= (3, 50, 7)
    if series == (3, 44):
        return version >= (3, 44, 6)
    return version >= (3, 51, 3)


def check_package(package: Package) -> Check:
    from importlib.metadata import PackageNotFoundError, version

    install = f"pip install 'tunesmith[{package.extra}]'"
    try:
        found = version(package.name)
    except PackageNotFoundError:
        return Check(package.name, "warning", "not installed", f"{install}, where it is needed")
    if numbers(found) < package.floor:
        least = ".".join(map(str, package.floor))
        return Check(package.name, "error", f"{found}, under {least}", f"{install} --upgrade")
    return Check(package.name, "ok", found)


def check_cores(settings: "Settings") -> Check:
    cores = usable_cores()
    units = cpu_units()
    told = f"{cores} to use, {settings.slots} CPU jobs at once"
    told += f", {' '.join(units)}" if units else ""
    if sys.platform == "linux" and units and "avx2" not in units and "asimd" not in units:
        return Check("cores", "warning", told, "a processor with AVX2 trains several times faster")
    return Check("cores", "ok", told)


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_units() -> list[str]:
    """The vector units worth knowing, in Linux's words."""
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            line = next((row for row in file if row.lower().startswith(("flags", "features"))), "")
    except OSError:
        return []
    flags = set(line.partition(":")[2].split())
    return [unit for unit in wanted if unit in flags]


def check_memory(settings: "Settings") -> Check:
    free, size = memory_bytes()
    if size == 0:
        return Check("memory", "ok", "not known on this system")
    told = f"{bytes_text(free)} free of {bytes_text(size)}"
    if free < _LITTLE_MEMORY:
        least = bytes_text(settings.memory_reserve_bytes)
        return Check(
            "memory", "warning", told, f"jobs get what is free over {least}: end other programs"
        )
    return Check("memory", "ok", told)


def memory_bytes() -> tuple[int, int]:
    """Free and in all, within the container's limit; (0, 0) where it cannot be told."""
    try:
        rows = Path("/proc/meminfo").read_text("ascii").splitlines()
        found = {row.partition(":")[0]: int(row.split()[1]) * 1024 for row in rows}
        free, size = found["MemAvailable"], found["MemTotal"]
    except (OSError, ValueError, KeyError, IndexError):
        return 0, 0
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text("ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text("ascii"))
    except (OSError, ValueError):
        return free, size
    return min(free, max(0, limit - used)), min(size, limit)


def check_gpus() -> list[Check]:
    """One check a GPU, from the driver's own tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        if Path("/dev/nvidiactl").exists():
            return [Check("gpu", "warning", "a device without nvidia-smi", "install the driver")]
        return [Check("gpu", "ok", "none: jobs train on the CPU")]
    try:
        rows = _asked(
            [
                tool,
                "--query-gpu=index,name,memory.free,memory.total,driver_version",
                "--format=csv,noheader,nounits",
            ]
        )
    except OSError as error:
        advice = "look at `nvidia-smi` and the driver; jobs would train on the CPU"
        return [Check("gpu", "warning", f"nvidia-smi fails: {error}", advice)]
    return [_gpu(row) for row in rows] or [Check("gpu", "ok", "none: jobs train on the CPU")]


def _gpu(row: str) -> Check:
    index, name, free, size, driver = [part.strip() for part in row.split(",")][:5]
    return Check(f"gpu {index}", "ok", f"{name}, {free} of {size} MiB free, driver {driver}")


def _asked(command: list[str]) -> list[str]:
    """The lines that a tool prints. Raises OSError where it fails or hangs."""
    import subprocess

    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_NVIDIA_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"no answer within {_NVIDIA_SECONDS} seconds") from None
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise OSError(lines[0][:200] if lines else f"exit status {done.returncode}")
    return [line for line in done.stdout.splitlines() if line.count(",") >= 4]


def check_compiler() -> Check:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return Check("compiler", "ok", shutil.which(name) or name)
    return Check(
        "compiler", "warning", "none", "long jobs train faster with one: install g++ or clang"
    )


def check_workspace(settings: "Settings") -> Check:
    folder = settings.workspace.resolve()
    if not folder.is_dir():
        return Check("workspace", "error", f"{folder} is no folder", "make it, or name another")
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Check(
            "workspace",
            "error",
            f"{folder} cannot be written: {error.strerror}",
            "change its owner, or start elsewhere (--workspace, TUNESMITH_WORKSPACE)",
        )
    return Check("workspace", "ok", str(folder))


def check_disk(settings: "Settings") -> Check:
    try:
        free = shutil.disk_usage(settings.workspace.resolve()).free
    except OSError:
        return Check("disk", "error", "the workspace's disk cannot be read")
    told = f"{bytes_text(free)} free for the workspace"
    if free < _NO_DISK:
        return Check("disk", "error", told, "free some space: checkpoints need it")
    if free < _LITTLE_DISK:
        return Check("disk", "warning", told, "enough for small models only")
    return Check("disk", "ok", told)


def check_port(settings: "Settings", workspace: Path | None = None) -> Check:
    """Whether a server could listen; one of this very workspace is as good."""
    import socket

    told = f"{settings.host}:{settings.port}"
    own = own_server(home_of(settings, workspace))
    if own is not None:
        return Check("port", "ok", f"this workspace's server runs at {own.url}")
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as door:
            if os.name != "nt":
                door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            door.bind((settings.host, settings.port))
    except OSError as error:
        return Check(
            "port", "error", f"{told}: {error.strerror}", "take another one: tunesmith up --port N"
        )
    return Check("port", "ok", f"{told} is free")


def numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` → (2, 13, 0): the leading numbers."""
    found = []
    for part in version.partition("+")[0].split("."):
        digits = "".join(part[: len(part) - len(part.lstrip("0123456789"))])
        if not digits:
            break
        found.append(int(digits))
    return tuple(found)


def _sum_up(checks: list[Check]) -> None:
    errors = sum(check.level == "error" for check in checks)
    warnings = sum(check.level == "warning" for check in checks)
    if errors or warnings:
        tell(f"{errors} wrong, {warnings} to know")
    else:
        tell("all is well; next: tunesmith up")

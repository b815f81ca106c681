"""Runs a stranger's function, call after call: a process of its own, that can only compute.

    python -S -s -P -B confined_child.py PARENT ASKED TOLD MEMORY_BYTES

On the descriptor ASKED comes a line of JSON each: {"code", "name"}, then the arguments of a call.
On TOLD go {"refused"}, where this kernel cannot confine it, or {"confined"}; then {"ready"}
or {"error"}; then {"value"} or {"error"} for each call.

Before the stranger's first line runs, Landlock leaves nothing of the file system but the standard
library's folder, to be read, and seccomp only those system calls that computing needs: no socket,
no file written, no new process or thread, no signal to another.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import sysconfig
import traceback
from typing import Any, BinaryIO

MAX_ERROR = 500
PLACE = "<reward>"
READY_MODULES = (
    *("ast", "collections", "dataclasses", "datetime", "decimal", "difflib", "fractions"),
    *("functools", "hashlib", "itertools", "math", "random", "re", "statistics", "string"),
    *("textwrap", "typing", "unicodedata"),
)
"""Loaded before: some want libraries that lie outside of the standard library's folder."""

_X86_64 = """
read=0 write=1 close=3 fstat=5 lseek=8 pread64=17 readv=19 writev=20 mmap=9 mprotect=10 munmap=11
mremap=25 brk=12 madvise=28 rt_sigaction=13 rt_sigprocmask=14 rt_sigreturn=15 sigaltstack=131
futex=202 restart_syscall=219 openat=257 newfstatat=262 statx=332 getdents64=217 readlinkat=267
faccessat=269 faccessat2=439 getcwd=79 getpid=39 gettid=186 getppid=110 getuid=102
geteuid=107 getgid=104 getegid=108 clock_gettime=228 clock_getres=229 clock_nanosleep=230
nanosleep=35 gettimeofday=96 getrandom=318 getrusage=98 times=100 uname=63 sysinfo=99 sched_yield=24
sched_getaffinity=204 membarrier=324 poll=7 ppoll=271 select=23 pselect6=270 exit=60 exit_group=231
open=2 stat=4 lstat=6 access=21 readlink=89 getdents=78
"""
_AARCH64 = """
read=63 write=64 close=57 fstat=80 lseek=62 pread64=67 readv=65 writev=66 mmap=222 mprotect=226
munmap=215 mremap=216 brk=214 madvise=233 rt_sigaction=134 rt_sigprocmask=135 rt_sigreturn=139
sigaltstack=132 futex=98 restart_syscall=128 openat=56 newfstatat=79 statx=291 getdents64=61
readlinkat=78 faccessat=48 faccessat2=439 getcwd=17 getpid=172 gettid=178 getppid=173
getuid=174 geteuid=175 getgid=176 getegid=177 clock_gettime=113 clock_getres=114 clock_nanosleep=115
nanosleep=101 gettimeofday=169 getrandom=278 getrusage=165 times=153 uname=160 sysinfo=179
sched_yield=124 sched_getaffinity=123 membarrier=283 ppoll=73 pselect6=72 exit=93 exit_group=94
"""
_MACHINES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}
"""Their mark in seccomp's data, and the system calls that are left, by number."""
_PDEATHSIG, _DUMPABLE, _SECCOMP, _NO_NEW_PRIVILEGES, _FILTER = 1, 4, 22, 38, 2
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
"""By Landlock's version: kinds of access that it can deny; 16 from version 5 on."""
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_KILL, _REFUSE, _ALLOW = 0x80000000, 0x00050001, 0x7FFF0000
"""What seccomp does: end the process, answer EPERM, let it pass."""
_X32 = 0x40000000


class Unconfined(Exception):
    """This kernel lacks what confines: a sentence."""


def main(parent: int, asked: BinaryIO, told: BinaryIO, memory_bytes: int) -> None:
    given = json.loads(asked.readline())
    for name in READY_MODULES:
        __import__(name)
    try:
        confine(parent, memory_bytes)
    except Unconfined as unconfined:
        return _tell(told, {"refused": str(unconfined)})
    _tell(told, {"confined": True})
    try:
        function = _defined(given["code"], given["name"])
    except BaseException as error:
        return _tell(told, {"error": _sentence(error)})
    _tell(told, {"ready": True})
    for line in asked:
        _tell(told, _called(function, json.loads(line)))
    return None


def confine(parent: int, memory_bytes: int) -> None:
    """For good. Raises Unconfined."""
    machine = _MACHINES.get(platform.machine())
    if sys.platform != "linux" or machine is None or sys.maxsize < 1 << 32:
        raise Unconfined(f"{sys.platform} on {platform.machine()} has no such sandbox")
    library = ctypes.CDLL(None, use_errno=True)
    _limit(memory_bytes)
    if library.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0) or os.getppid() != parent:
        raise Unconfined("the process that asks is gone")
    library.prctl(_DUMPABLE, 0, 0, 0, 0)
    if library.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise Unconfined("the kernel keeps no process from new privileges")
    _close_files(library)
    _close_calls(library, *machine)


def _limit(memory_bytes: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    for which, most in limits.items():
        resource.setrlimit(which, (most, most))


def _close_files(library: Any) -> None:
    """Landlock: see landlock(7)."""
    version = library.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        raise Unconfined("the kernel has no Landlock (Linux 5.13 and later, switched on)")
    rights = (1 << _RIGHTS.get(version, 16)) - 1
    ruleset = library.syscall(_CREATE_RULESET, struct.pack("=Q", rights), 8, 0)
    folders = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    for folder in folders:
        place = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", _READ_FILE | _READ_DIR, place)
        if library.syscall(_ADD_RULE, ruleset, 1, rule, 0):
            raise Unconfined("Landlock takes no rule")
        os.close(place)
    if ruleset < 0 or library.syscall(_RESTRICT_SELF, ruleset, 0):
        raise Unconfined("Landlock cannot be switched on here")
    os.close(ruleset)


def _close_calls(library: Any, mark: int, table: str) -> None:
    """Seccomp: see seccomp(2). Another machine's calls end the process, others are refused."""
    numbers = [int(one.partition("=")[2]) for one in table.split()]
    steps = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, mark),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, len(numbers), 0, _X32),
        *((_EQUAL, len(numbers) - at, 0, number) for at, number in enumerate(numbers)),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    held = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(steps), ctypes.addressof(held))
    if library.prctl(_SECCOMP, _FILTER, program, 0, 0):
        raise Unconfined("the kernel has no seccomp filters")


def _defined(code: str, name: str) -> Any:
    names: dict[str, Any] = {"__name__": PLACE}
    exec(compile(code, PLACE, "exec"), names)
    function = names.get(name)
    if not callable(function):
        raise NameError(f"it defines no function `{name}`")
    return function


def _called(function: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        value = function(**arguments)
        if isinstance(value, bool | int | float):
            return {"value": float(value)}
        return {"error": f"it returned {_short(type(value).__name__)}, not a number"}
    except BaseException as error:
        return {"error": _sentence(error)}


def _sentence(error: BaseException) -> str:
    """What was raised, and at which line of the stranger's."""
    try:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == PLACE]
        if isinstance(error, SyntaxError):
            lines.append(error.lineno)
        where = f"its line {lines[-1]}: " if lines else ""
        return where + _short(f"{type(error).__name__}: {error}")
    except BaseException:
        return "it raised what cannot be told"


def _short(text: str) -> str:
    return text.encode("utf-8", "replace").decode()[:MAX_ERROR]


def _tell(told: BinaryIO, answer: dict[str, Any]) -> None:
    told.write(json.dumps(answer).encode() + b"\n")
    told.flush()


if __name__ == "__main__":
    _parent, _asked, _answers, _memory = map(int, sys.argv[1:5])
    main(_parent, os.fdopen(_asked, "rb"), os.fdopen(_answers, "wb"), _memory)

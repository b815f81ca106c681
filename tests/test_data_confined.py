"""A stranger's function can compute, and nothing else."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from tunesmith.data import confined_child
from tunesmith.data.confined import Confined, Failed, Unconfined

HEAD = "def reward(prompt, completion, reference, metadata):\n"
GIVEN = {"prompt": [], "completion": "강물", "reference": None, "metadata": {"kind": 1}}


def started(code: str, **over) -> Confined:
    return Confined(code, "reward", **({"memory_bytes": 256 << 20, "seconds": 1} | over))


def called(body: str, times: int = 1, **over) -> float:
    with started(HEAD + "".join(f"    {line}\n" for line in body.splitlines()), **over) as confined:
        return [confined.call(GIVEN) for _ in range(times)][-1]


def test_a_function_computes_with_the_standard_library() -> None:
    body = "import csv, statistics\nreturn statistics.mean([len(completion), metadata['kind']])"
    assert called(body, times=3) == 1.5
    assert called("return completion == '강물'") == 1
    assert called("print('junk' * 100_000)\nreturn 0.5", times=3) == 0.5


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("while True: pass", "ran for more than 0.2 s"),
        ("held = []\nwhile True: held.append('x' * 1_000_000)", "line 3: MemoryError"),
        ("import socket\nsocket.socket()", "line 3: PermissionError"),
        ("open('/etc/hostname').read()", "Permission denied: '/etc/hostname'"),
        ("import os\nos.listdir('/proc/self')", "Permission denied"),
        ("open('/dev/shm/left', 'w')", "Permission denied: '/dev/shm/left'"),
        ("import os\nwhile True: os.fork()", "line 3: PermissionError"),
        ("import subprocess\nsubprocess.run(['id'])", "line 3: PermissionError"),
        ("import threading\nthreading.Thread(target=print).start()", "start new thread"),
        ("import os\nos.kill(os.getppid(), 9)", "line 3: PermissionError"),
        ("import ctypes\nctypes.CDLL(None).kill(1, 0) and 1 / 0", "ZeroDivisionError"),
        ("import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1))", "not allowed to raise"),
        ("import os\nos._exit(0)", "its process ended"),
        ("import ctypes\nctypes.string_at(0)", "its process ended"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("def f(): f()\nf()", "RecursionError"),
        ("return '1'", "it returned str, not a number"),
        ("return None", "it returned NoneType"),
        ("raise ValueError('x' * 100_000)", "line 2: ValueError: xxx"),
    ],
)
def test_whatever_else_it_does_fails_with_a_sentence(body: str, why: str) -> None:
    seconds = 0.2 if "0.2" in why else 10
    with pytest.raises(Failed) as caught:
        called(body, seconds=seconds)
    assert why in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_pipe_that_it_owns_signals_nobody() -> None:
    """F_SETOWN, F_SETSIG and O_ASYNC have the kernel send any signal to any process of the user."""
    with subprocess.Popen(["sleep", "60"]) as other:
        asked = ((8, other.pid), (10, 9), (4, 0x2000))
        body = f"""import ctypes
call = ctypes.CDLL(None).fcntl
return sum(call(place, word, value) == 0 for place in range(3, 64) for word, value in {asked})"""
        try:
            assert called(body, times=2) == 0
            time.sleep(0.05)
            assert other.poll() is None
        finally:
            other.kill()


def test_a_number_beyond_all_bounds_is_no_answer() -> None:
    with pytest.raises(Failed, match="OverflowError"):
        called("return 10**400")
    body = """import os
for place in range(3, 4096):
    try: os.write(place, b'{"value": 1' + b'0' * 400 + b'}' + bytes([10]))
"""
    with pytest.raises(Failed, match="no answer"):
        called(body + "    except OSError: pass\nreturn 1")


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("def reward(:", "line 1: SyntaxError"),
        ("reward = 1", "defines no function `reward`"),
        ("import os\nos.environ['HOME']", "line 2: KeyError"),
        ("import numpy", "line 1: ModuleNotFoundError"),
        ("while True: pass", "ran for more than 0.2 s"),
    ],
)
def test_code_that_defines_nothing_of_use_is_told_of(code: str, why: str) -> None:
    with pytest.raises(Failed, match=why), started(code, seconds=0.2 if "0.2" in why else 10):
        pass


def test_junk_on_its_answers_way_is_no_answer() -> None:
    body = "import os\nfor place in range(3, 4096):\n    try: os.write(place, b'junk\\n')\n"
    with pytest.raises(Failed, match="no answer"):
        called(body + "    except OSError: pass\nreturn 1", times=2)


def test_it_is_not_run_where_the_kernel_cannot_confine_it(monkeypatch, tmp_path: Path) -> None:
    """As on a kernel without Landlock: the call that makes a rule set is unknown."""
    text = Path(confined_child.__file__).read_text("utf-8")
    child = tmp_path / "child.py"
    child.write_text(text.replace(" = 444, 445, 446", " = 99_999, 445, 446", 1), encoding="utf-8")
    monkeypatch.setattr(confined_child, "__file__", str(child))
    marker = tmp_path / "ran"
    with pytest.raises(Unconfined, match="no Landlock"), started(f"open({str(marker)!r}, 'w')"):
        pass
    assert not marker.exists()


def test_no_process_is_left_behind() -> None:
    with started(HEAD + "    return 1\n") as confined:
        assert confined.call(GIVEN) == 1
        child = confined._child
    assert child is not None
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)

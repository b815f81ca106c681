"""A side of a benchmark as a child process: questions on stdin, answers on stdout, a line each."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

QUIET = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Both sides wait passively: alone, this only makes the comparison fair on a busy machine."""


class Side:
    """A child that answers measurements; libraries stay imported between them."""

    def __init__(self, script: str, threads: int, python: str = sys.executable) -> None:
        self._script = script
        self._kernels = tempfile.TemporaryDirectory(prefix="tunesmith-bench-")  # compiled anew
        environment = os.environ | QUIET | {"OMP_NUM_THREADS": str(threads)}
        environment["TORCHINDUCTOR_CACHE_DIR"] = self._kernels.name
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name(script))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._script} ended; see above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._kernels.cleanup()


def answer_all(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """What a child runs. All that libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        out.write(json.dumps(answer(json.loads(line))) + "\n")
        out.flush()

"""An engine of another make (vLLM, say), started by a command, in the place of ours.

    python -m tunesmith.work.foreign --model PATH --model-name NAME --key-env NAME --command WORDS

In the command `{model}`, `{name}`, `{host}`, `{port}` and `{key}` are put in; the key is also in
VLLM_API_KEY and TUNESMITH_ENGINE_KEY. It says what our engine says: one line of JSON once it
answers at /health, or why it never will.
"""

import argparse
import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from tunesmith.work.session import die_with_parent

HOST = "127.0.0.1"
LOOK_SECONDS = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    """Until the command ends. Returns its exit status."""
    asked, _ = _parser().parse_known_args(argv)
    key = os.environ.get(asked.key_env, "")
    port = _free_port()
    told = {"model": asked.model, "name": asked.model_name, "host": HOST, "port": port, "key": key}
    try:
        child = subprocess.Popen(
            words(asked.command, told),
            env=os.environ | {"VLLM_API_KEY": key},
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            preexec_fn=die_with_parent,
        )
    except (OSError, ValueError) as error:
        _say({"type": "failed", "message": f"the engine's command cannot be started: {error}"})
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: child.terminate())
    while child.poll() is None:
        if _answers(port):
            _say({"type": "ready", "port": port, "pid": child.pid})
            return child.wait()
        time.sleep(LOOK_SECONDS)
    ended = f"the engine's command ended with status {child.returncode} before it answered"
    _say({"type": "failed", "message": f"{ended}; its log tells more"})
    return 1


def words(command: str, told: dict[str, object]) -> list[str]:
    """Raises ValueError where quotes are left open."""
    found = shlex.split(command)
    for name, value in told.items():
        found = [word.replace("{" + name + "}", str(value)) for word in found]
    return found


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


def _say(told: dict[str, object]) -> None:
    print(json.dumps(told), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tunesmith.work.foreign")
    for name in ("--model", "--model-name", "--command"):
        parser.add_argument(name, required=True)
    parser.add_argument("--key-env", default="")
    return parser


if __name__ == "__main__":
    sys.exit(main())

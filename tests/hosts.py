"""Training hosts that share nothing with the API but HTTP: each with a folder of its own."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from house import PATIENCE, QUICK


@dataclass
class Host:
    """A worker on its own; `prefix` puts it elsewhere, as into a network namespace."""

    folder: Path
    server: str
    token: str
    prefix: Sequence[str] = ()
    over: dict[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> "Host":
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("TUNESMITH_", "AWS_"))
        }
        environment |= QUICK | {"TUNESMITH_CPU_SLOTS": "1"} | self.over
        environment |= {"TUNESMITH_WORKER_TOKEN": self.token}
        with (self.folder / "worker.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(*self.prefix, sys.executable, "-m", "tunesmith.cli", "worker"),
                    *("--server", self.server, "--workspace", str(self.folder)),
                ],
                env=environment,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )
        return self

    @property
    def home(self) -> Path:
        return self.folder / ".tunesmith"

    @property
    def log(self) -> str:
        return (self.folder / "worker.log").read_text()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(PATIENCE)

    def kill(self) -> None:
        for process in [*self.trainers(), *self.all()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self.process is not None:
            self.process.wait(PATIENCE)

    def all(self) -> list[psutil.Process]:
        """The worker and all that came of it."""
        if self.process is None or self.process.poll() is not None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            return [*own.children(recursive=True), own]
        return []

    def trainers(self) -> list[psutil.Process]:
        """Processes with a file of this host's attempts open, or that were forked for one."""
        found = []
        for process in self.all():
            with contextlib.suppress(psutil.Error):
                is_zygote = "tunesmith.train.zygote" in " ".join(process.cmdline())
                is_forked = is_zygote and "zygote" in " ".join(process.parent().cmdline())
                if is_forked and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def end(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.stop()
        self.kill()

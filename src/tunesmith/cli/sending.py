"""The progress of an upload: a bar on a terminal, nothing elsewhere."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tunesmith.cli.text import is_terminal

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Sending:
    """`with Sending(name) as sending:` and `sending.take(bytes sent, bytes in all)`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if is_terminal(sys.stderr):
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

            columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=Console(stderr=True))
            self._task = self._progress.add_task("sending", total=None)
            self._progress.start()
        return self

    def take(self, sent: int, size: int) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=sent, total=size)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

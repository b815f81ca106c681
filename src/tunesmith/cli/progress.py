"""A job's progress as a reader sees it: a bar that moves on a terminal, plain lines elsewhere.

Used by `train`, `jobs watch` and the demo: `with Progress("title") as progress:
progress.take(event)` for each event, then `curve(values)` of `progress.course.curve`.
"""

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from tunesmith.cli.course import Course, words_of
from tunesmith.cli.curve import curve, spark
from tunesmith.cli.text import bytes_text, clean, duration_text, is_terminal

if TYPE_CHECKING:
    from rich.live import Live

__all__ = ["Course", "Progress", "bar", "curve", "details", "headline", "plain_line", "spark"]

_REDRAW_SECONDS = 0.1
_PLAIN_LINES = 20
"""About so many step lines for one job, where there is no terminal."""
_TOLD = {"notice", "requeued", "checkpoint_rejected", "reattached", "paused", "resumed"}


class Progress:
    """Takes events and shows them on `stream` (stderr), live where it is a terminal."""

    def __init__(
        self,
        title: str = "",
        stream: TextIO | None = None,
        *,
        is_live: bool | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.course = Course()
        self._title = clean(title)
        self._stream = stream or sys.stderr
        self._is_live = is_terminal(self._stream) if is_live is None else is_live
        self._now = now
        self._live: Live | None = None
        self._drawn_at = float("-inf")
        self._told_phase = "waiting"
        self._told_part = -1

    def __enter__(self) -> Self:
        if self._is_live:
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream, highlight=False)
            self._live = Live(console=console, auto_refresh=False, transient=False)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._draw()
            self._live.stop()
            self._live = None

    def take(self, event: Mapping[str, Any]) -> None:
        """Add one event, of a trainer (`{"type", …}`) or of a job (`{"type", "data"}`)."""
        kind, fields = words_of(event)
        self.course.take(event)
        if kind in _TOLD:
            self.say(_told(kind, fields))
        if self._live is None:
            self._tell(kind)
        elif self._now() - self._drawn_at >= _REDRAW_SECONDS or self.course.is_over:
            self._draw()

    def say(self, line: str) -> None:
        """One line above the bar."""
        if self._live is None:
            print(clean(line), file=self._stream, flush=True)
        else:
            self._live.console.print(clean(line), markup=False)

    def _draw(self) -> None:
        from rich.text import Text

        assert self._live is not None
        self._drawn_at = self._now()
        width = self._live.console.width
        lines = [headline(self.course, self._title, width), details(self.course, width)]
        self._live.update(
            Text("\n".join(line for line in lines if line), no_wrap=True, overflow="ellipsis"),
            refresh=True,
        )

    def _tell(self, kind: str) -> None:
        course = self.course
        part = int(course.share * _PLAIN_LINES)
        is_step = kind in {"step", "evaluated"} and (
            part > self._told_part or course.total_steps is None
        )
        if course.phase != self._told_phase or is_step:
            self._told_phase, self._told_part = course.phase, part
            print(plain_line(course, self._title), file=self._stream, flush=True)


def bar(share: float, width: int) -> str:
    """`width` characters, filled in proportion to `share` (0 to 1)."""
    filled = round(min(1.0, max(0.0, share)) * width)
    return "━" * filled + "─" * (width - filled)


def headline(course: Course, title: str, width: int = 80) -> str:
    left = " ".join(part for part in (title, course.phase) if part)
    right = f"{course.share:4.0%}  {_steps(course)}  ETA {duration_text(course.eta_seconds)}"
    room = max(8, min(40, width - len(left) - len(right) - 4))
    return f"{left} {bar(course.share, room)} {right}"


def details(course: Course, width: int = 80) -> str:
    """Loss with its curve, learning rate, speed and memory; empty before the first step."""
    parts = _numbers(course)
    if not parts:
        return ""
    line = "  ".join(parts)
    room = width - len(line) - 2
    return f"{line}  {spark(course.curve[1], min(32, room))}" if room >= 8 else line


def plain_line(course: Course, title: str = "") -> str:
    """The same on one line, for a log."""
    parts = [part for part in (title, course.phase) if part]
    if course.step:
        parts.append(f"step {_steps(course)}")
    parts += _numbers(course)
    if course.phase == "running" and course.eta_seconds is not None:
        parts.append(f"ETA {duration_text(course.eta_seconds)}")
    return "  ".join(parts)


def _numbers(course: Course) -> list[str]:
    found: list[tuple[str, float | None, str]] = [("lr", course.learning_rate, ".2e")]
    answered = [(word, value, ".3f") for word, value in course.answered.items()]
    if course.reward is not None:
        held = ("KL", course.divergence, ".4f")
        found = [("reward", course.reward, ".4f"), *answered, held, *found]
    else:
        losses = (("loss", course.loss, ".4f"), ("eval", course.eval_loss, ".4f"))
        found = [*losses, *answered, *found]
    parts = [f"{name} {value:{form}}" for name, value, form in found if value is not None]
    if course.tokens_per_second is not None:
        parts.append(f"{course.tokens_per_second:,.0f} tok/s")
    if course.peak_memory_bytes:
        parts.append(bytes_text(course.peak_memory_bytes))
    return parts


def _steps(course: Course) -> str:
    return f"{course.step}/{'?' if course.total_steps is None else course.total_steps}"


def _told(kind: str, fields: Mapping[str, Any]) -> str:
    message = fields.get("message") or fields.get("reason") or kind
    level = fields.get("level", "info")
    return f"{level}: {message}" if level != "info" else f"· {message}"

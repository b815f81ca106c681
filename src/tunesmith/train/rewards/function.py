"""Completions scored by a function that a user wrote, in a process that can only compute.

Each round has a process of its own, so that a round's scores do not hang on those before it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from tunesmith.data.asked import asked
from tunesmith.data.confined import Confined, Failed, Unconfined
from tunesmith.errors import FailureClass, JobFailure
from tunesmith.spec.rewards import PythonFunction
from tunesmith.train.batches import Interrupted
from tunesmith.train.rewarding import Judged

NAME = "reward"


class FunctionScoring:
    """See `Scorer`."""

    def __init__(self, source: PythonFunction, should_stop: Callable[[], bool]) -> None:
        """Raises JobFailure where the code fails, or cannot be run on this host."""
        self._source, self._should_stop = source, should_stop
        self.score([])

    def score(self, judged: Sequence[Judged]) -> list[float]:
        """Raises Interrupted at a stop."""
        try:
            with self._started() as confined:
                return [self._called(confined, one) for one in judged]
        except Unconfined as unconfined:
            raise JobFailure(
                FailureClass.USER_ERROR,
                f"a reward function cannot be run safely on this host: {unconfined}",
                "use rules, a model or a service for rewards, or a host that has Landlock and "
                "seccomp",
            ) from unconfined
        except Failed as failed:
            raise _failure(f"the code of the reward function failed: {failed}") from failed

    def _started(self) -> Confined:
        source = self._source
        memory_bytes, seconds = source.memory_mb << 20, source.timeout_seconds
        return Confined(source.code, NAME, memory_bytes=memory_bytes, seconds=seconds)

    def _called(self, confined: Confined, judged: Judged) -> float:
        if self._should_stop():
            raise Interrupted
        try:
            return confined.call(_arguments(judged))
        except Failed as failed:
            message = f"the reward function failed on a completion of line {judged.row.line}"
            raise _failure(f"{message}: {failed}") from failed


def _arguments(judged: Judged) -> dict[str, Any]:
    return {
        "prompt": judged.prompt,
        "completion": judged.completion,
        "reference": asked(judged.row).reference,
        "metadata": judged.row.metadata,
    }


def _failure(message: str) -> JobFailure:
    return JobFailure(
        FailureClass.USER_ERROR,
        message,
        "right is `def reward(prompt, completion, reference, metadata):` that returns a finite "
        "number in time, with the standard library alone",
    )

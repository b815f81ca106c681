"""The plan as it stands: where memory does not suffice for a pass, all that follow are smaller."""

from dataclasses import dataclass

from tunesmith.spec.pipe import Plan


@dataclass
class Standing:
    """One for all that a process trains, so that a change holds everywhere at once."""

    plan: Plan

    @property
    def micro_batch_tokens(self) -> int:
        return self.plan.micro_batch_tokens

    def narrow(self, tokens: int) -> None:
        """Passes of at most so many tokens from here on."""
        self.plan = self.plan.model_copy(update={"micro_batch_tokens": tokens})

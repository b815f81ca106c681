"""What the next attempt does otherwise where the kernel killed one for memory: smaller passes.

A trainer that is refused memory halves its passes by itself; one that is killed cannot.
"""

from dataclasses import dataclass

from tunesmith.spec.pipe import Notice, Plan, Replanned, Started, Step, TrainerEvent


@dataclass
class Lighter:
    """Listens to a trainer."""

    plan: Plan | None = None
    tokens: int | None = None
    """Of its last step that was told, on each process."""

    def hear(self, event: TrainerEvent) -> None:
        match event:
            case Started() | Replanned():
                self.plan = event.plan
            case Step() if self.plan is not None:
                self.tokens = -(-event.tokens // self.plan.processes)

    def words(self) -> list[TrainerEvent]:
        """What is to be said in the trainer's place. Nothing where no pass can be smaller."""
        if self.plan is None or self.plan.device != "cpu":
            return []
        before = self.plan.micro_batch_tokens
        largest = before if not self.tokens else min(before, self.tokens)
        if largest < 2:
            return []
        after = largest // 2
        message = (
            f"the kernel killed the trainer for memory: passes of the next attempt have up to "
            f"{after:,} tokens, not {before:,}; they make the same updates"
        )
        return [
            Replanned(plan=self.plan.model_copy(update={"micro_batch_tokens": after})),
            Notice(level="warning", code="passes_halved", message=message),
        ]

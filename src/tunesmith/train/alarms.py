"""What is said when a policy seems to collapse: too short, too sure of itself, too far away."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SHORT = 0.2
"""Of the first round's mean length."""
CUT_OFF = 0.9
"""Share of completions that reach the longest length, where at first less did."""
SURE = 0.05
"""Of the first round's entropy."""
FAR = 5.0
"""Times the target; without one, nats a token."""
EVEN_ROUNDS = 3
"""In a row without a difference between rewards."""


@dataclass
class Memory:
    """Kept in every checkpoint."""

    first: dict[str, float] = field(default_factory=dict)
    even_rounds: int = 0
    raised: list[str] = field(default_factory=list)
    """Alarms that hold; each is told once, until it is over."""


@dataclass
class Alarms:
    notice: Callable[[str, str], None]
    """Told a code and a sentence."""
    kl_target: float | None = None
    memory: Memory = field(default_factory=Memory)

    def recall(self, memory: Mapping[str, Any]) -> None:
        self.memory = Memory(**memory)

    def look(self, told: Mapping[str, float]) -> None:
        """At a round's metrics."""
        memory = self.memory
        memory.first = memory.first or dict(told)
        memory.even_rounds = memory.even_rounds + 1 if told["reward/std"] == 0 else 0
        found = self._found(told)
        for code, message in found.items():
            if code not in memory.raised:
                self.notice(code, message)
        memory.raised = sorted(found)

    def _found(self, told: Mapping[str, float]) -> dict[str, str]:
        first, found = self.memory.first, {}
        length, entropy, far = told["episode_length"], told["entropy"], told["kl_divergence"]
        if length < SHORT * first["episode_length"]:
            found["length_collapsed"] = (
                f"completions have {length:.1f} tokens, at first {first['episode_length']:.1f}: "
                "look at what they say, a reward may favour saying nothing"
            )
        if told["truncated"] > CUT_OFF > first["truncated"]:
            found["length_exploded"] = (
                f"{told['truncated']:.0%} of completions are cut off, at first "
                f"{first['truncated']:.0%}: the policy no longer ends its answers"
            )
        if entropy < SURE * first["entropy"]:
            found["entropy_collapsed"] = (
                f"an entropy of {entropy:.3g} nats a token, at first {first['entropy']:.3g}: "
                "completions hardly differ any more; lower the learning rate or raise beta"
            )
        bound = FAR * (self.kl_target or 1.0)
        if far > bound:
            found["kl_exceeded"] = (
                f"{far:.3g} nats a token away from the model as it was opened, over {bound:.3g}: "
                "lower the learning rate or raise beta"
            )
        if self.memory.even_rounds >= EVEN_ROUNDS:
            found["rewards_even"] = (
                f"{self.memory.even_rounds} rounds without any difference between rewards: there "
                "is nothing to learn from them"
            )
        return found

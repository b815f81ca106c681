"""What divergence from the model as it was opened costs, adapted to hold it at a target."""

from dataclasses import dataclass


@dataclass
class Leash:
    """beta grows where the divergence is above the target, and shrinks below it (Ziegler et al.
    2019, arXiv:1909.08593, section 2.2). Without a target it stays."""

    beta: float
    target: float | None = None
    gain: float = 0.1

    def follow(self, divergence: float) -> None:
        """After a round, with its nats a token."""
        if self.target is None:
            return
        error = min(max(divergence / self.target - 1, -0.2), 0.2)
        self.beta *= 1 + self.gain * error

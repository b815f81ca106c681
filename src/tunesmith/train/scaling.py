"""Loss scaling, so that small gradients of fp16 do not vanish (Micikevicius et al. 2018,
arXiv:1710.03740, section 3.2).

As torch's GradScaler: halved where a gradient overflows, doubled after many steps without. But the
step is then made again, so that none of its rows is lost, and the scale is part of each checkpoint.
"""

from dataclasses import dataclass

FIRST = 65536.0
HIGHEST = 2.0**24
DOUBLED_AFTER = 2000
"""Updates in a row."""


@dataclass
class LossScale:
    """A power of two, which changes no digit of what it multiplies; 1 where there is none."""

    value: float
    good_steps: int = 0

    @classmethod
    def of(cls, precision: str) -> "LossScale":
        return cls(FIRST if precision == "fp16" else 1.0)

    def lower(self) -> bool:
        """After an overflow. False where it is no fault of the scale."""
        self.good_steps = 0
        if self.value <= 1:
            return False
        self.value /= 2
        return True

    def count(self) -> None:
        """After an update."""
        self.good_steps += 1
        if self.value > 1 and self.good_steps >= DOUBLED_AFTER:
            self.value, self.good_steps = min(2 * self.value, HIGHEST), 0

"""What a completion may be rewarded for. Pure data."""

from typing import Literal

from pydantic import Field

from tunesmith.spec.strict import Strict


class Weighed(Strict):
    weight: float = Field(1.0, ge=-1000, le=1000)
    """What the reward counts in the sum of all; below 0 it is a penalty."""


class ExactMatch(Weighed):
    """1 where the completion is the row's reference, outer white space aside, else 0."""

    kind: Literal["exact_match"] = "exact_match"


RewardSource = ExactMatch

"""What rewards completions, one file a kind of source."""

from collections.abc import Sequence

from tunesmith.spec.rewards import RewardSource
from tunesmith.train.rewarding import Rewarder
from tunesmith.train.rewards.matching import Matching


def open_rewarders(sources: Sequence[RewardSource]) -> Rewarder:
    """All sources as one."""
    return Matching(tuple(sources))

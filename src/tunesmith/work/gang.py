"""One job on several nodes: the first has the worker, and all meet at its address under torchrun.

The nodes see the workspace's folder at one path: every process reads its inputs there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

ELSEWHERE = 1 << 16
"""From here on, an index stands for a GPU of another node of the gang."""
MODULE = "tunesmith.train.launch"


@dataclass(frozen=True)
class Gang:
    """Of one node, where a job has all it needs on one."""

    nodes: int = 1
    endpoint: str = ""
    """host:port of the first node."""

    def gpus(self, here: Sequence[int]) -> tuple[int, ...]:
        """The GPUs of all nodes, which have as many as this one."""
        others = range(ELSEWHERE, ELSEWHERE + len(here) * (self.nodes - 1))
        return (*here, *others)

    def arguments(self, job_id: str, processes: int, node: int = 0) -> list[str]:
        """Of `tunesmith.train.launch` on one of the nodes; `processes` is the number on all."""
        here = ["--processes", str(max(1, processes // self.nodes))]
        if self.nodes == 1:
            return here
        there = ["--nodes", str(self.nodes), "--node", str(node), "--endpoint", self.endpoint]
        return [*here, *there, "--id", job_id]


def here(gpus: Sequence[int]) -> list[int]:
    """Those of this node."""
    return [index for index in gpus if index < ELSEWHERE]


def split(gpus: int, nodes: Sequence[int]) -> int:
    """Over how many nodes, with the same number on each, a job's GPUs go; 0 where they can't.

    `nodes` are the GPUs that each node has. The fewest nodes that do.
    """
    for count in range(1, len(nodes) + 1):
        share = gpus // count
        if gpus % count == 0 and sum(has >= share for has in nodes) >= count:
            return count
    return 0

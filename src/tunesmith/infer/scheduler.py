"""Who runs in the next step, and how far: plain Python, no torch.

Iteration-level scheduling (Yu et al., Orca, OSDI 2022, section 3) with prompts cut into chunks
(Agrawal et al., Sarathi-Serve, OSDI 2024, section 4), so that a long prompt stalls nobody.
"""

from collections import deque
from collections.abc import Sequence as Many
from dataclasses import dataclass

from tunesmith.errors import RateLimitError
from tunesmith.infer.sequence import Sequence


@dataclass(frozen=True)
class Limits:
    """What a step and the cache may hold."""

    running: int = 32
    """Sequences that hold cache at once."""
    waiting: int = 512
    """Sequences in the line; more is refused."""
    step_tokens: int = 512
    """Tokens of one step while only prompts are being read."""
    mixed_tokens: int = 64
    """Prompt tokens of one step while somebody waits for a next token."""
    block_tokens: int = 64
    """Tokens of one cache block, the unit of room."""
    blocks: int = 1024
    """Cache blocks in all."""

    @property
    def cache_tokens(self) -> int:
        return self.blocks * self.block_tokens


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions `start` to `end` of a sequence, to go through the model in this step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        """Whether a token can be sampled after it."""
        return self.end == self.sequence.length

    @property
    def rows(self) -> range:
        """Positions after which the model's output is wanted."""
        if self.sequence.wants_rows(self.start):
            return range(self.start, self.end)
        return range(self.end - 1, self.end) if self.is_last else range(0)


class Scheduler:
    """A line of waiting sequences, a set of running ones, and the room in the cache.

    A sequence is admitted when the cache has room for its prompt. Where the room runs out later,
    the youngest goes back to the head of the line and is read again from its tokens; so whoever
    came first always moves on.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """Oldest first."""
        self.free_blocks = limits.blocks
        self._evicted: list[Sequence] = []

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequences: Many[Sequence]) -> None:
        """Put all of a request's sequences in the line, or none: RateLimitError when it is full."""
        if len(self.waiting) + len(sequences) > self.limits.waiting:
            error = RateLimitError(
                f"the engine is full: {len(self.running)} sequences run and "
                f"{len(self.waiting)} of at most {self.limits.waiting} wait; try again later",
                error_code="engine_overloaded",
            )
            error.retry_after = 1
            raise error
        self.waiting.extend(sequences)

    def plan(self) -> list[Chunk]:
        """Choose the next step: one token for each that is generating, then prompts in order.

        Every chunk it returns has room in the cache. Empty only when nothing is to be done.
        """
        self._drop_cancelled()
        chunks = self._decodes()
        budget = self.limits.mixed_tokens if chunks else self.limits.step_tokens
        for sequence in self.running:
            if sequence.pending > 1 and budget > 0:
                chunks.append(self._chunk(sequence, budget))
                budget -= chunks[-1].end - chunks[-1].start
        while budget > 0 and (newcomer := self._admit()):
            chunks.append(self._chunk(newcomer, budget))
            budget -= chunks[-1].end - chunks[-1].start
        return chunks

    def finish(self, sequence: Sequence) -> None:
        """Give back the place and the room of a sequence that has ended."""
        self.running.remove(sequence)
        self._give_back(sequence)

    def evicted(self) -> list[Sequence]:
        """Sequences that lost their room since the last call: their cache must be dropped."""
        lost, self._evicted = self._evicted, []
        return lost

    def clear(self) -> list[Sequence]:
        """Forget everything and return what was forgotten."""
        lost = [*self.running, *self.waiting]
        for sequence in self.running:
            self._give_back(sequence)
        self.running.clear()
        self.waiting.clear()
        return lost

    def _decodes(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in [each for each in self.running if each.pending == 1]:
            while sequence in self.running and not self._extend(sequence):
                self._evict(self.running[-1])
        for sequence in self.running:
            if sequence.pending == 1:
                chunks.append(self._chunk(sequence, 1))
        return chunks

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        end = min(sequence.computed + budget, sequence.length)
        return Chunk(sequence, sequence.computed, end)

    def _admit(self) -> Sequence | None:
        if not self.waiting or len(self.running) >= self.limits.running:
            return None
        if not self._extend(self.waiting[0]):
            return None
        sequence = self.waiting.popleft()
        self.running.append(sequence)
        return sequence

    def _extend(self, sequence: Sequence) -> bool:
        """Promise room for all the tokens that a sequence has now."""
        missing = -(-sequence.length // self.limits.block_tokens) - sequence.blocks
        if missing > self.free_blocks:
            return False
        if missing > 0:
            self.free_blocks -= missing
            sequence.blocks += missing
        return True

    def _evict(self, sequence: Sequence) -> None:
        self.finish(sequence)
        self.waiting.appendleft(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.free_blocks += sequence.blocks
        sequence.blocks = 0
        sequence.computed = 0
        self._evicted.append(sequence)

    def _drop_cancelled(self) -> None:
        for sequence in [each for each in self.running if each.is_cancelled]:
            self.finish(sequence)
        if any(each.is_cancelled for each in self.waiting):
            self.waiting = deque(each for each in self.waiting if not each.is_cancelled)

"""Who runs in the next step, and how far: plain Python, no torch.

Iteration-level scheduling (Yu et al., Orca, OSDI 2022, section 3) with prompts cut into chunks
(Agrawal et al., Sarathi-Serve, OSDI 2024, section 4), so that a long prompt stalls nobody.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence as Many
from dataclasses import dataclass

from tunesmith.errors import RateLimitError
from tunesmith.infer.prefixes import BLOCK, Prefixes
from tunesmith.infer.rooms import room
from tunesmith.infer.sequence import Sequence


@dataclass(frozen=True)
class Limits:
    """What a step and the cache may hold."""

    running: int = 32
    """Sequences that hold cache at once."""
    waiting: int = 512
    """Sequences in the line; more is refused."""
    step_tokens: int = 256
    """Tokens of one step while only prompts are being read."""
    mixed_tokens: int = 64
    """Prompt tokens of one step while somebody waits for a next token, before it is known how long
    they take: see `pace`."""
    block_tokens: int = 64
    """Tokens of one cache block, the unit of room."""
    blocks: int = 1024
    """Cache blocks in all."""
    longest: int = 1 << 20
    """Tokens that a sequence can have."""
    has_doubling_rooms: bool = False
    """Whether a sequence's room is a power of two: see `rooms`."""
    kept: int = 64
    """Sequences that have ended whose cache is kept while nobody wants the room, for prompts that
    begin alike. 0 keeps none."""

    @property
    def cache_tokens(self) -> int:
        return self.blocks * self.block_tokens

    def blocks_of(self, tokens: int) -> int:
        """That so many tokens of one sequence take."""
        if self.has_doubling_rooms:
            tokens = room(tokens, self.longest)
        return -(-tokens // self.block_tokens)


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
    def is_next(self) -> bool:
        """Whether it is what was sampled last, not a part of a prompt."""
        return self.start >= len(self.sequence.prompt)

    @property
    def rows(self) -> range:
        """Positions after which the model's output is wanted."""
        if self.sequence.wants_rows(self.start):
            return range(self.start, self.end)
        return range(self.end - 1, self.end) if self.is_last else range(0)


@dataclass(frozen=True, slots=True)
class Drop:
    """A sequence's cache goes."""

    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Keep:
    """A sequence has ended, its cache stays."""

    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Adopt:
    """A sequence begins with a copy of another's first tokens."""

    sequence: Sequence
    source: Sequence
    tokens: int


Move = Drop | Keep | Adopt


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
        self.mixed_tokens = limits.mixed_tokens
        """As in `Limits`; whoever knows how long steps take may change it."""
        self._moves: list[Move] = []
        self._kept: OrderedDict[Sequence, None] = OrderedDict()
        """Those used longest ago first."""
        self._prefixes = Prefixes()

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def available_blocks(self) -> int:
        """Free ones, and those that are only kept."""
        return self.free_blocks + sum(each.blocks for each in self._kept)

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
        budget = self._budget(len(chunks))
        for sequence in self.running:
            if sequence.pending > 1 and budget > 0:
                chunks.append(self._chunk(sequence, budget))
                budget -= chunks[-1].end - chunks[-1].start
        while budget > 0 and (newcomer := self._admit()):
            chunks.append(self._chunk(newcomer, budget))
            budget -= chunks[-1].end - chunks[-1].start
        return chunks

    def _budget(self, decoding: int) -> int:
        """Prompt tokens of the next step. The more prompts there are beside those that wait for a
        next token, the more it is in the interest of all to read on: a step that reads little costs
        nearly as much as one that reads more."""
        if not decoding:
            return self.limits.step_tokens
        reading = len(self.waiting) + sum(each.pending > 1 for each in self.running)
        most = self.limits.step_tokens
        if reading > 1:
            return max(self.mixed_tokens, most * reading // (reading + decoding))
        return min(self.mixed_tokens, most)

    def finish(self, sequence: Sequence) -> None:
        """Give back the place of a sequence that has ended; its room is kept while it may serve a
        prompt that begins alike."""
        self.running.remove(sequence)
        if not self._is_worth_keeping(sequence):
            self._give_back(sequence)
            return
        self._prefixes.note(sequence)
        self._kept[sequence] = None
        self._moves.append(Keep(sequence))
        while len(self._kept) > self.limits.kept:
            self._let_go()

    def read(self, chunks: Many[Chunk]) -> None:
        """These have been computed: prompts among them can be taken by others."""
        for chunk in chunks:
            sequence = chunk.sequence
            if chunk.end >= len(sequence.prompt) > chunk.start and self._can_share(sequence):
                self._prefixes.note(sequence)

    def moves(self) -> list[Move]:
        """What is to be done to the cache, in this order, before anything else is computed."""
        moves, self._moves = self._moves, []
        return moves

    def clear(self) -> list[Sequence]:
        """Forget everything and return what was forgotten."""
        lost = [*self.running, *self.waiting]
        for sequence in self.running:
            self._give_back(sequence)
        while self._kept:
            self._let_go()
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
        self._adopt(sequence)
        return sequence

    def _adopt(self, sequence: Sequence) -> None:
        """Begin with what another has of the same beginning."""
        found = self._prefixes.find(sequence) if self._can_share(sequence) else None
        if found is None:
            return
        source, tokens = found
        if source in self._kept:
            self._kept.move_to_end(source)
        self._moves.append(Adopt(sequence, source, tokens))
        sequence.computed = sequence.reused = tokens

    def _can_share(self, sequence: Sequence) -> bool:
        return self.limits.kept > 0 and sequence.reader is None

    def _is_worth_keeping(self, sequence: Sequence) -> bool:
        return self._can_share(sequence) and sequence.computed >= BLOCK

    def _let_go(self) -> None:
        """Of the cache that was kept and not used for longest."""
        sequence, _ = self._kept.popitem(last=False)
        self._give_back(sequence)

    def _extend(self, sequence: Sequence) -> bool:
        """Promise room for all the tokens that a sequence has now; what is kept makes way."""
        missing = self.limits.blocks_of(sequence.length) - sequence.blocks
        while missing > self.free_blocks and self._kept:
            self._let_go()
        if missing > self.free_blocks:
            return False
        if missing > 0:
            self.free_blocks -= missing
            sequence.blocks += missing
        return True

    def _evict(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)
        self.waiting.appendleft(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.free_blocks += sequence.blocks
        sequence.blocks = 0
        sequence.computed = 0
        self._prefixes.forget(sequence)
        self._moves.append(Drop(sequence))

    def _drop_cancelled(self) -> None:
        for sequence in [each for each in self.running if each.is_cancelled]:
            self.finish(sequence)
        if any(each.is_cancelled for each in self.waiting):
            self.waiting = deque(each for each in self.waiting if not each.is_cancelled)

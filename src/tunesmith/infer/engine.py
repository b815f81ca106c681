"""The loop that turns prompts into tokens, on one thread of its own."""

import asyncio
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

import torch

from tunesmith.errors import BadRequestError, ServerError, TuningAPIError
from tunesmith.infer.guide import Guide
from tunesmith.infer.pace import Pace
from tunesmith.infer.runner import Next, Runner
from tunesmith.infer.sampler import Pick, sample
from tunesmith.infer.scheduler import Chunk, Limits, Scheduler
from tunesmith.infer.sequence import Finish, Reader, Sequence, Token
from tunesmith.spec.chat import Sampling

log = logging.getLogger(__name__)

Item = Token | Exception
T = TypeVar("T")


@dataclass(frozen=True)
class Ask:
    """One prompt, to be continued `count` times."""

    prompt: list[int]
    sampling: Sampling
    stop_ids: frozenset[int] = frozenset()
    adapter: str | None = None
    """By its public name."""
    count: int = 1
    guide: Callable[[], Guide] | None = None
    """Makes what holds each continuation to a grammar."""
    read: Callable[[], Reader] | None = None
    """Makes what reads the prompt of each continuation."""


class Stream:
    """The tokens of a request's sequences, as they are sampled."""

    def __init__(self, asks: Many[Ask]) -> None:
        self._out: asyncio.Queue[Item] = asyncio.Queue()
        self.asks = asks
        self.sequences = _sequences(asks, self._out.put_nowait)

    async def next(self) -> Token:
        """The next token of any of them, `index` counting through the asks.

        Raises what went wrong in the engine.
        """
        item = await self._out.get()
        if isinstance(item, Exception):
            raise item
        return item

    def drop(self, index: int) -> None:
        """Cancel one sequence: its place is free within a step."""
        self.sequences[index].is_cancelled = True

    def close(self) -> None:
        """Cancel them all."""
        for sequence in self.sequences:
            sequence.is_cancelled = True


class Engine:
    """Knows sequences, not text: rendering and detokenizing belong to `chat`.

    The thread owns scheduler and runner. Everything else reaches it through one queue of calls,
    made between two steps.
    """

    def __init__(self, runner: Runner, limits: Limits, threads: int = 1) -> None:
        self.runner = runner
        self.limits = limits
        self.scheduler = Scheduler(limits)
        self._pace = Pace(limits.mixed_tokens, limits.step_tokens)
        self.steps = 0
        self._threads = threads
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._outbox: list[tuple[Sequence, Item]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._guarded_run, name="engine", daemon=True)

    @property
    def context_length(self) -> int:
        """Tokens of prompt and continuation together: the model's limit, or the cache's."""
        return min(self.runner.model.shape.context_length, self.limits.cache_tokens)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread; tokens are delivered on `loop`."""
        self._loop = loop
        self._thread.start()

    def close(self) -> None:
        self._calls.put(None)
        self._thread.join()

    async def open(self, asks: Many[Ask]) -> Stream:
        """Put the asks in the line. The stream must be closed by whoever opened it.

        Raises RateLimitError before anything runs where the line is full, NotFoundError where an
        adapter has gone.
        """
        for ask in asks:
            self._check_ids(ask)
        stream = Stream(asks)
        try:
            await self.call(lambda: self._add(stream))
        except BaseException:
            stream.close()
            raise
        return stream

    def _check_ids(self, ask: Ask) -> None:
        """Raises BadRequestError for an id beyond the vocabulary."""
        vocabulary = self.runner.model.shape.vocabulary
        sampling = ask.sampling
        told = {"logit_bias": sampling.logit_bias, "stop_token_ids": sampling.stop_token_ids}
        for param, ids in told.items():
            if ids and max(ids) >= vocabulary:
                raise BadRequestError(
                    f"{param}: token id {max(ids)} is not in the vocabulary of {vocabulary}",
                    param=param,
                )

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Raises BadRequestError where it is no adapter of this base."""
        await self.call(lambda: self.runner.model.adapters.load(name, folder))

    async def unload_adapter(self, name: str) -> None:
        """Take the name away at once; sequences under way end with the weights they began with."""
        await self.call(lambda: self.runner.model.adapters.retire(name))

    async def call(self, work: Callable[[], T]) -> T:
        """Run `work` on the engine's thread between two steps, and return what it returns."""
        assert self._loop is not None, "the engine has been started"
        future: asyncio.Future[T] = self._loop.create_future()
        self._calls.put(lambda: self._answer(future, work))
        return await future

    def step(self) -> None:
        """Run one scheduler step: every planned chunk through the model, a token for each."""
        self.scheduler.mixed_tokens = self._pace.tokens()
        chunks = self.scheduler.plan()
        self._move()
        if chunks:
            found = self._forward(chunks)
            self.scheduler.read(chunks)
            self._sample(found)
            for sequence in [each.sequence for each in chunks if each.is_last]:
                if sequence.sampling.max_tokens == 0:
                    self._end(sequence, Token(sequence.index, None, "length"))
            self.steps += 1
        self._move()

    def _forward(self, chunks: list[Chunk]) -> Next:
        began = time.perf_counter()
        found = self.runner.forward(chunks)
        prompts = sum(each.end - each.start for each in chunks if not each.is_next)
        if any(each.is_next for each in chunks):
            self._pace.note(prompts, time.perf_counter() - began)
        return found

    def run(self, sequences: Many[Sequence]) -> None:
        """All of them to their ends, on this thread, in a process that serves nobody."""
        self.scheduler.add(sequences)
        while not self.scheduler.is_idle:
            self.step()
            items, self._outbox = self._outbox, []
            _emit(items)

    def _guarded_run(self) -> None:
        """An engine without its thread would keep every client waiting: it ends instead."""
        try:
            self._run()
        except BaseException:
            log.critical("the engine's thread has failed; the process ends", exc_info=True)
            logging.shutdown()
            os._exit(70)

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        while True:
            while self.scheduler.is_idle or not self._calls.empty():
                work = self._calls.get()
                if work is None:
                    return
                work()
            try:
                self._sweep_adapters()
                self.step()
            except Exception as error:
                log.exception("a step failed; %d sequences are lost", len(self.scheduler.running))
                self._fail_all(error)
            self._deliver()

    def _add(self, stream: Stream) -> None:
        names = [ask.adapter for ask in stream.asks for _ in range(ask.count)]
        for sequence, name in zip(stream.sequences, names, strict=True):
            if name is not None:
                sequence.adapter = self.runner.model.adapters.key(name)
        self.scheduler.add(stream.sequences)

    def _sample(self, found: Next) -> None:
        """Of those that want a token."""
        logits_BV, sequences = found.logits_BV, found.sequences
        wanting = [place for place, each in enumerate(sequences) if each.sampling.max_tokens > 0]
        if len(wanting) < len(sequences):
            sequences = [sequences[place] for place in wanting]
            logits_BV = logits_BV[wanting]
        if not sequences:
            return
        picks = sample(logits_BV, [each.draw for each in sequences])
        for sequence, pick in zip(sequences, picks, strict=True):
            self._append(sequence, pick)

    def _append(self, sequence: Sequence, pick: Pick) -> None:
        if pick.id is None or pick.error is not None:
            self._end(sequence, pick.error or ServerError("no token could be sampled"))
            return
        sequence.generated.append(pick.id)
        finish: Finish | None = None
        is_end = pick.id in sequence.stop_ids
        if is_end or pick.is_last:
            finish = "stop"
        elif len(sequence.generated) >= sequence.sampling.max_tokens:
            finish = "length"
        token = Token(sequence.index, pick.id, finish, is_end, pick.score)
        if finish:
            self._end(sequence, token)
        else:
            self._outbox.append((sequence, token))

    def _end(self, sequence: Sequence, item: Item) -> None:
        self.scheduler.finish(sequence)
        self._outbox.append((sequence, item))

    def _fail_all(self, error: Exception) -> None:
        shown = error if isinstance(error, TuningAPIError) else ServerError("the engine failed")
        self._outbox += [(sequence, shown) for sequence in self.scheduler.clear()]
        self._move()

    def _move(self) -> None:
        for move in self.scheduler.moves():
            self.runner.apply(move)

    def _sweep_adapters(self) -> None:
        held = [*self.scheduler.running, *self.scheduler.waiting]
        self.runner.model.adapters.sweep({sequence.adapter for sequence in held})

    def _deliver(self) -> None:
        """Hand a whole step's tokens to the event loop at one go: one wake-up a step."""
        if not self._outbox:
            return
        items, self._outbox = self._outbox, []
        self._post(lambda: _emit(items))

    def _answer(self, future: "asyncio.Future[T]", work: Callable[[], T]) -> None:
        try:
            result = work()
        except Exception as error:
            refusal = error
            self._post(lambda: None if future.done() else future.set_exception(refusal))
        else:
            self._post(lambda: None if future.done() else future.set_result(result))

    def _post(self, deliver: Callable[[], object]) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(deliver)


def _emit(items: list[tuple[Sequence, Item]]) -> None:
    for sequence, item in items:
        if not sequence.is_cancelled:
            sequence.emit(item)


def _sequences(asks: Many[Ask], emit: Callable[[Item], None]) -> list[Sequence]:
    sequences: list[Sequence] = []
    for ask in asks:
        for choice in range(ask.count):
            seed = ask.sampling.seed
            sequences.append(
                Sequence(
                    prompt=ask.prompt,
                    sampling=ask.sampling,
                    emit=emit,
                    index=len(sequences),
                    stop_ids=ask.stop_ids,
                    guide=ask.guide() if ask.guide else None,
                    reader=ask.read() if ask.read else None,
                    random=Random() if seed is None else Random(f"{seed}/{choice}"),
                )
            )
    return sequences

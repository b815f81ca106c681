"""Text in, text out: the engine's human-readable face."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from tokenizers import Tokenizer

from tunesmith.errors import BadRequestError
from tunesmith.infer.calls import CallPart
from tunesmith.infer.engine import Ask, Engine, Stream
from tunesmith.infer.gauges import Pace
from tunesmith.infer.guide import Grammar
from tunesmith.infer.logprobs import Said
from tunesmith.infer.voices import Voice
from tunesmith.infer.writer import Writer
from tunesmith.spec.chat import Delta, Message, Sampling

T = TypeVar("T")

_SHORT_TEXT = 4096
"""Characters that are tokenized on the event loop; longer texts go to a thread."""
_MESSAGE_COST = 200
"""What rendering a message costs beside its text, in characters."""
_SHRINKAGE = 4
_readers = ThreadPoolExecutor(2, thread_name_prefix="reader")


@dataclass(frozen=True, slots=True)
class Piece:
    """A delta of the `index`-th sequence."""

    index: int
    delta: Delta
    said: tuple[Said, ...] = ()
    """The tokens whose text begins in it, where log-probabilities were asked for."""
    calls: tuple[CallPart, ...] = ()


async def read_messages(
    voice: Voice,
    messages: Sequence[Message],
    engine: Engine,
    tools: Sequence[dict[str, Any]] = (),
) -> list[int]:
    """Render a conversation up to where the answer begins."""
    characters = sum(len(each.content or "") for each in messages)
    told = len(msgspec.json.encode(tools)) if tools else 0
    refuse_hopeless(voice, characters + told, engine, "messages")
    size = characters + told + _MESSAGE_COST * len(messages)
    return await off_loop(size, lambda: list(voice.renderer.prompt_ids(messages, tools)))


async def read_text(voice: Voice, text: str, engine: Engine, param: str = "prompt") -> list[int]:
    """The ids of a plain prompt."""
    refuse_hopeless(voice, len(text), engine, param)
    return await off_loop(len(text), lambda: list(voice.renderer.encode_text(text)))


def refuse_hopeless(voice: Voice, characters: int, engine: Engine, param: str) -> None:
    """Refuse, before any work is done on it, a text that no tokenization could make fit.

    Raises BadRequestError (`context_length_exceeded`). A tokenizer may drop blanks or merge
    characters first; the allowance for that is generous.
    """
    least = characters // (voice.longest_token * _SHRINKAGE)
    if least > engine.context_length:
        raise BadRequestError(
            f"the context holds {engine.context_length} tokens; the prompt has {characters} "
            f"characters, which are more than {least}",
            error_code="context_length_exceeded",
            param=param,
        )


def fit(prompt: Sequence[int], asked: int | None, default: int, engine: Engine, param: str) -> int:
    """Tokens to generate: what was asked, or the default as far as the context goes.

    Raises BadRequestError (`context_length_exceeded`) with the numbers where it does not fit.
    """
    limit = engine.context_length
    room = limit - len(prompt)
    if not prompt:
        raise BadRequestError("the prompt has no tokens; give at least one", param=param)
    if room < (1 if asked is None else asked):
        wanted = f" and asks for {asked} more" if asked else ", which leaves no room for an answer"
        raise BadRequestError(
            f"the context holds {limit} tokens; the prompt has {len(prompt)}{wanted}",
            error_code="context_length_exceeded",
            param=param,
        )
    return min(default, room) if asked is None else asked


def ask(
    voice: Voice,
    prompt: list[int],
    sampling: Sampling,
    count: int,
    grammar: Grammar | None = None,
) -> Ask:
    own = frozenset() if sampling.ignore_eos else voice.renderer.stop_ids
    stop_ids = own | {*sampling.stop_token_ids}
    guide = None if grammar is None else grammar.guide
    return Ask(prompt, sampling, stop_ids, voice.adapter, count, guide)


async def reply(
    stream: Stream, tokenizer: Tokenizer, marks: Mapping[int, str] | None = None
) -> AsyncGenerator[Piece, None]:
    """Yield the stream's text as it becomes certain; the last of each sequence has `finish`.

    Every token brings a piece, if with empty text. Closing it closes the stream. `marks`: special
    tokens that are shown all the same.
    """
    writers = [Writer(tokenizer, each.sampling, marks or {}) for each in stream.sequences]
    open_ones, pace = set(range(len(writers))), Pace(len(writers))
    try:
        while open_ones:
            token = await stream.next()
            pace.mark(token.index)
            if token.index not in open_ones:
                continue
            delta, said = writers[token.index].write(token)
            if delta.finish is not None:
                open_ones.discard(token.index)
                stream.drop(token.index)
            yield Piece(token.index, delta, said)
    finally:
        stream.close()


async def off_loop(size: int, work: Callable[[], T]) -> T:
    return work() if size <= _SHORT_TEXT else await in_reader(work)


async def in_reader(work: Callable[[], T]) -> T:
    """Run what takes long, two at a time."""
    return await asyncio.get_running_loop().run_in_executor(_readers, work)

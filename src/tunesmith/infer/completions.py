"""OpenAI's completions: a request's body in, the answer out, whole or as a stream."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

from fastapi import FastAPI, Request, Response

from tunesmith.errors import BadRequestError, TuningAPIError
from tunesmith.infer import openai, refused
from tunesmith.infer.answers import Choice, Form, Usage
from tunesmith.infer.body import read_json, validate
from tunesmith.infer.calling import Calling, called
from tunesmith.infer.chat import (
    Piece,
    ask,
    fit,
    in_reader,
    off_loop,
    read_messages,
    read_text,
    reply,
)
from tunesmith.infer.constraints import grammar_of
from tunesmith.infer.door import error_body
from tunesmith.infer.echo import Echo, echoed, spell
from tunesmith.infer.engine import Ask
from tunesmith.infer.house import House, Served
from tunesmith.infer.lexicon import lexicon_of
from tunesmith.infer.logprobs import PromptScores
from tunesmith.infer.streams import EventStream, frame, to_json, unless_gone
from tunesmith.infer.voices import Voice
from tunesmith.spec.chat import MODEL_HEADER


def add_completions(app: FastAPI, house: House) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await read_json(request, house.max_body_bytes)
        return await chat(await house.take(request), request, body)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await read_json(request, house.max_body_bytes)
        return await complete(await house.take(request), request, body)


async def chat(served: Served, request: Request, body: dict[str, Any]) -> Response:
    refused.refuse(body, refused.CHAT)
    asked = validate(openai.ChatRequest, body)
    voice = served.voices.get(asked.model)
    messages = [each.message() for each in asked.messages]
    is_parallel = asked.parallel_tool_calls is not False
    calling = Calling.of(voice, asked.tools, asked.tool_choice, is_parallel)
    tools = [each.wire() for each in calling.tools] if calling else []
    prompt = await read_messages(voice, messages, served.engine, tools)
    default = openai.DEFAULT_CHAT_TOKENS
    room = fit(prompt, *_wanted(asked, asked.asked_tokens, default), served.engine, "messages")
    vocabulary = served.engine.runner.model.shape.vocabulary
    grammar = await grammar_of(asked, voice, vocabulary, calling)
    asks = [ask(voice, prompt, asked.sampling(room), asked.count, grammar)]
    return await _answer(served, request, asked, voice, asks, calling=calling)


async def complete(served: Served, request: Request, body: dict[str, Any]) -> Response:
    refused.refuse(body, refused.COMPLETIONS)
    asked = validate(openai.CompletionRequest, body)
    if len(asked.prompt) * asked.count > openai.MAX_SEQUENCES:
        raise BadRequestError(
            f"prompts times n is {len(asked.prompt) * asked.count}; at most {openai.MAX_SEQUENCES}",
            param="n",
        )
    voice = served.voices.get(asked.model)
    grammar = await grammar_of(asked, voice, served.engine.runner.model.shape.vocabulary)
    asks: list[Ask] = []
    echoes: list[Echo] = []
    for given in asked.prompt:
        prompt = await ids_of(served, voice, given, "prompt")
        default = openai.DEFAULT_COMPLETION_TOKENS
        room = fit(prompt, *_wanted(asked, asked.max_tokens, default), served.engine, "prompt")
        plain = ask(voice, prompt, asked.sampling(room), asked.count, grammar)
        asks.append(replace(plain, read=_scores_of(prompt, asked)))
        if asked.echo:
            echoes += [await _echo(voice, given, prompt, asked)] * asked.count
    return await _answer(served, request, asked, voice, asks, echoes)


def _wanted(asked: openai.Options, tokens: int | None, default: int) -> tuple[int | None, int]:
    """Tokens that must fit into the context, and how many are wanted where none must."""
    return (None, tokens or default) if asked.x_fit_tokens else (tokens, default)


async def ids_of(served: Served, voice: Voice, given: str | list[int], param: str) -> list[int]:
    """Raises BadRequestError naming `param` where it is too long, or no ids of this model."""
    if isinstance(given, str):
        return await read_text(voice, given, served.engine, param)
    vocabulary = served.engine.runner.model.shape.vocabulary
    if given and max(given) >= vocabulary:
        raise BadRequestError(
            f"token id {max(given)} is not in the vocabulary of {vocabulary}", param=param
        )
    return given


def _scores_of(
    prompt: list[int], asked: openai.CompletionRequest
) -> Callable[[], PromptScores] | None:
    top = asked.top_count
    if not asked.echo or top is None:
        return None
    return lambda: PromptScores(prompt, top)


async def _echo(
    voice: Voice, given: str | list[int], ids: list[int], asked: openai.CompletionRequest
) -> Echo:
    if isinstance(given, str) and asked.top_count is None:
        return Echo(given)
    return await off_loop(len(ids), lambda: spell(voice.renderer.tokenizer, ids))


async def _answer(
    served: Served,
    request: Request,
    asked: openai.Options,
    voice: Voice,
    asks: list[Ask],
    echoes: Sequence[Echo] = (),
    calling: Calling | None = None,
) -> Response:
    """Run the asks; whole or as a stream. The first token comes before the status does."""
    _bound_scores(asks)
    request.state.usage = usage = Usage(sum(len(each.prompt) for each in asks))
    form = await _form(served, request, asked, voice)
    stream = await served.engine.open(asks)
    marks = calling.marks(voice) if calling else None
    pieces = reply(stream, voice.renderer.tokenizer, marks)
    if echoes:
        pieces = echoed(pieces, stream, echoes)
    if calling:
        pieces = called(pieces, calling, len(stream.sequences))
    try:
        if asked.stream:
            first = await unless_gone(request, anext(pieces))
            return EventStream(_frames(form, first, pieces, usage, asked.has_usage_chunk))
        return await unless_gone(request, _whole(form, pieces, len(stream.sequences), usage))
    except BaseException:
        stream.close()
        raise


def _bound_scores(asks: Sequence[Ask]) -> None:
    """Raises BadRequestError where an answer could have more log-probabilities than memory."""
    scores = 0
    for each in asks:
        top = each.sampling.top_logprobs
        tokens = each.sampling.max_tokens + (len(each.prompt) if each.read else 0)
        scores += 0 if top is None else tokens * each.count * (top + 1)
    if scores > openai.MAX_SCORES:
        raise BadRequestError(
            f"{scores} log-probabilities are asked for, of at most {openai.MAX_SCORES}; "
            "ask for fewer tokens, answers or alternatives",
            param="logprobs",
        )


async def _form(served: Served, request: Request, asked: openai.Options, voice: Voice) -> Form:
    lexicon = None
    if asked.top_count is not None:
        vocabulary = served.engine.runner.model.shape.vocabulary
        lexicon = await in_reader(lambda: lexicon_of(voice.renderer, vocabulary))
    name = unquote(request.headers.get(MODEL_HEADER, "")) or asked.model
    return Form.new(request.state.id, name, isinstance(asked, openai.ChatRequest), lexicon)


async def _whole(
    form: Form, pieces: AsyncGenerator[Piece, None], count: int, usage: Usage
) -> Response:
    choices = [Choice() for _ in range(count)]
    async for piece in pieces:
        usage.count(piece.delta)
        choices[piece.index].add(piece)
    return Response(to_json(form.whole(choices, usage)), media_type="application/json")


async def _frames(
    form: Form,
    first: Piece,
    pieces: AsyncGenerator[Piece, None],
    usage: Usage,
    has_usage_chunk: bool,
) -> AsyncGenerator[bytes, None]:
    """Server-sent events: a chunk for each piece of text, and what ends the stream."""
    opened: set[int] = set()
    async with aclosing(pieces):
        try:
            async for piece in _after(first, pieces):
                delta = piece.delta
                usage.count(delta)
                if form.is_chat and piece.index not in opened:
                    opened.add(piece.index)
                    yield frame(form.first(piece.index))
                if delta.text or delta.finish or piece.calls:
                    yield frame(form.piece(piece))
        except TuningAPIError as error:
            yield frame(error_body(error))
            return
        if has_usage_chunk:
            yield frame(form.usage(usage))
        yield b"data: [DONE]\n\n"


async def _after(first: Piece, rest: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
    yield first
    async for piece in rest:
        yield piece

"""An export against the model that it was made of."""

from pathlib import Path

from tunesmith.data.parity import ADAPTER, first_difference
from tunesmith.data.render import Renderer
from tunesmith.infer.exports.asking import TEXTS
from tunesmith.infer.exports.llamacpp import Answered, LlamaCpp
from tunesmith.infer.gate import judge_all
from tunesmith.infer.unlike import Unlike, shown
from tunesmith.infer.voices import renderer_of
from tunesmith.spec.parity import Limit, Spoken, Verdict, Witnessed, limit_of

_FORMATS = {"f32": "fp32", "f16": "fp16", "q8_0": "q8_0"}


def check_folder(out: Path, witnessed: Witnessed, format: str) -> Verdict:
    """Of a model's folder, through the gate that a trained one goes through."""
    facts = {name: one for name, one in witnessed.facts.items() if not name.startswith(ADAPTER)}
    expected = witnessed.model_copy(update={"precision": format, "facts": facts})
    return judge_all(out, [expected])


def check_gguf(file: Path, source: Path, witnessed: Witnessed, kind: str, threads: int) -> Verdict:
    """By llama.cpp. Raises BadRequestError where it does not load the file."""
    renderer = renderer_of(source)
    name, limit = limit_of(_FORMATS[kind], witnessed.precision)
    llama = LlamaCpp(file, threads)
    tokens = sum(len(one.answer) for one in witnessed.spoken)
    worst, cause = 0.0, None
    try:
        _compare_ids(renderer, llama)
        worst = _compare_answers(renderer, witnessed, llama, limit)
        message = (
            f"llama.cpp says the same: ids of {len(TEXTS)} texts, and {tokens} tokens of answers "
            f"with log-probabilities within {worst:.2g} ({name}: {limit.most:g} at most)"
        )
    except Unlike as unlike:
        cause, worst, message = unlike.cause, unlike.worst, str(unlike)
    finally:
        llama.close()
    return Verdict(
        has_passed=cause is None,
        format=kind,
        conversations=len(witnessed.spoken),
        tokens=tokens,
        worst=worst,
        limit=limit.most,
        cause=cause,
        message=message[:4000],
    )


def _compare_ids(renderer: Renderer, llama: LlamaCpp) -> None:
    for text in TEXTS:
        ours, theirs = renderer.encode_text(text), llama.ids(text, has_specials=True)
        place = first_difference(ours, theirs)
        if place is None:
            continue
        told = [
            shown(renderer, row[place]) if place < len(row) else "nothing" for row in (ours, theirs)
        ]
        where = f"{text[:40]!r}, token {place + 1}: {told[0]} here, {told[1]} by llama.cpp"
        raise Unlike("tokenizer", where)


def _compare_answers(
    renderer: Renderer, witnessed: Witnessed, llama: LlamaCpp, limit: Limit
) -> float:
    """The largest difference of a log-probability, as far as answers go together: near ties may
    part them."""
    apart: list[float] = []
    for number, one in enumerate(witnessed.spoken, 1):
        answered = llama.answer(one.question, len(one.answer))
        where = f"conversation {number}, token {{}} of the answer"
        at = first_difference(one.answer[: len(answered.ids)], answered.ids)
        if at is not None and (at >= len(one.answer) or one.margins[at] > 2 * limit.most):
            told = [shown(renderer, row[at]) for row in (one.answer, answered.ids)]
            text = f"{where.format(at + 1)}: {told[0]} here, {told[1]} by llama.cpp"
            raise Unlike("weights", text, max(apart, default=0.0))
        is_cut = len(answered.ids) < len(one.answer)
        if at is None and is_cut and not {*witnessed.stop_ids} & {*answered.ids[-1:]}:
            raise Unlike("tokenizer", f"conversation {number}: llama.cpp ends the answer early")
        for place, difference in _numbers(one, answered, at):
            apart.append(difference)
            if difference > limit.most:
                text = f"{where.format(place + 1)}: log-probabilities are {difference:.3g} apart"
                raise Unlike("weights", text, difference)
    if apart and sum(apart) / len(apart) > limit.mean:
        raise Unlike("precision", f"answers differ by {sum(apart) / len(apart):.3g} on average")
    return max(apart, default=0.0)


def _numbers(one: Spoken, answered: Answered, end: int | None) -> list[tuple[int, float]]:
    """Place and difference of each token before `end` that llama.cpp told a number of.

    It does not say which those are: of all ways to find its ids among ours, the nearest is taken.
    """
    told, most = answered.numbers, len(one.answer[:end])
    found: dict[int, tuple[float, list[tuple[int, float]]]] = {0: (0.0, [])}
    for place, (id_, expected) in enumerate(zip(one.answer, one.answer_log_probs, strict=True)):
        for known in sorted(found, reverse=True):
            if known == len(told) or told[known][0] != id_:
                continue
            difference = abs(expected - told[known][1])
            cost, before = found[known]
            if known + 1 not in found or cost + difference < found[known + 1][0]:
                found[known + 1] = (cost + difference, [*before, (place, difference)])
    return [pair for pair in found[max(found)][1] if pair[0] < most]

"""Where trainer and engine part, and what that looks like. No torch: numbers against numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.data.parity import ADAPTER, Rendered, first_difference, rendered
from tunesmith.data.render import Renderer
from tunesmith.errors import ValidationError
from tunesmith.infer.hearing import Heard
from tunesmith.spec.parity import Cause, Limit, Spoken, Witnessed

_POSITIONS = ("rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "layer_types")
_NAMED: dict[Cause, str] = {
    "template": "the chat template",
    "tokenizer": "the tokenizer",
    "weights": "the weights, or how they were merged",
    "adapter": "the adapter's configuration: its scale, or where it is put",
    "adapter_missing": "the adapter, which is not applied",
    "configuration": "the model's configuration",
    "position": "attention: its positions (RoPE), its window, or how q and k lie",
    "precision": "the precision that it is held or computed in",
}


class Unlike(Exception):
    """The engine does not say what the trainer said."""

    def __init__(self, cause: Cause, where: str, worst: float = 0.0) -> None:
        super().__init__(
            f"the engine does not say what was trained: {where}; the likely cause is "
            f"{_NAMED[cause]}"
        )
        self.cause, self.worst = cause, worst


@dataclass(frozen=True)
class Place:
    conversation: int
    token: int
    is_answer: bool
    """Of the greedy answer, not of the row."""


def compare_rendered(renderer: Renderer, witnessed: Witnessed) -> None:
    """Raises Unlike at the first token that a row is turned into and was not in training."""
    for number, one in enumerate(witnessed.spoken):
        try:
            longest = max(len(one.ids), len(one.question))
            found = rendered(renderer, one.told, longest)
        except ValidationError as error:
            raise Unlike("template", f"conversation {number + 1}: {error.message}") from None
        _compare_rows(renderer, one, found, number)
    missing = set(witnessed.stop_ids) - renderer.stop_ids
    if missing:
        token = shown(renderer, min(missing))
        raise Unlike("tokenizer", f"{token} ended answers in training and ends none now")


def _compare_rows(renderer: Renderer, one: Spoken, found: Rendered, number: int) -> None:
    cause: Cause = "tokenizer" if found.text_sha256 == one.text_sha256 else "template"
    rows = [
        (one.ids, found.ids[: len(one.ids)]),
        (one.question, found.question[-len(one.question) :]),
    ]
    for trained, served in rows:
        place = first_difference(trained, served)
        if place is not None:
            ids = [
                shown(renderer, row[place]) if place < len(row) else "nothing"
                for row in (trained, served)
            ]
            where = f"conversation {number + 1}, token {place + 1}"
            raise Unlike(cause, f"{where}: {ids[0]} in training, {ids[1]} here")
    if cause == "template":
        raise Unlike(cause, f"conversation {number + 1} is written in another way")


def differences(spoken: Sequence[Spoken], heard: Heard) -> list[list[float]]:
    """Of each row's log-probabilities, in nats."""
    return [
        [abs(a - b) for a, b in zip(one.log_probs, own, strict=True)]
        for one, own in zip(spoken, heard.log_probs, strict=True)
    ]


def first_apart(spoken: Sequence[Spoken], heard: Heard, limit: Limit) -> Place | None:
    """The first token beyond the limit; of answers, where no near tie explains another token."""
    apart = differences(spoken, heard)
    flat = [one for row in apart for one in row]
    is_far = bool(flat) and sum(flat) / len(flat) > limit.mean
    for conversation, row in enumerate(apart):
        for token, one in enumerate(row, 1):
            if one > limit.most or (is_far and one > limit.mean):
                return Place(conversation, token, is_answer=False)
    return next(_other_answers(spoken, heard, limit), None)


def _other_answers(spoken: Sequence[Spoken], heard: Heard, limit: Limit) -> Iterator[Place]:
    for conversation, (one, own) in enumerate(zip(spoken, heard.answers, strict=True)):
        token = first_difference(one.answer, own)
        if token is None:
            continue
        if token >= len(one.margins) or one.margins[token] > 2 * limit.most:
            yield Place(conversation, token, is_answer=True)


def described(renderer: Renderer, spoken: Sequence[Spoken], heard: Heard, place: Place) -> str:
    one = spoken[place.conversation]
    where = f"conversation {place.conversation + 1}"
    if place.is_answer:
        served = heard.answers[place.conversation][place.token]
        return (
            f"{where}, answered with {shown(renderer, one.answer[place.token])} at token "
            f"{place.token + 1} in training, with {shown(renderer, served)} here"
        )
    trained, served_at = one.log_probs[place.token - 1], heard.log_probs[place.conversation]
    return (
        f"{where}, token {place.token + 1} ({shown(renderer, one.ids[place.token])}): "
        f"log-probability {trained:.4f} in training, {served_at[place.token - 1]:.4f} here"
    )


def changed_fact(trained: dict[str, Any], served: dict[str, Any]) -> tuple[Cause, str] | None:
    """What of the configuration is not as it was, with the cause that this makes likely."""
    for name, value in trained.items():
        if served.get(name) != value:
            what = f"{name} was {value!r} in training and is {served.get(name)!r}"
            if name.startswith(ADAPTER):
                return "adapter", what
            return ("position" if name in _POSITIONS else "configuration"), what
    return None


def guessed(spoken: Sequence[Spoken], heard: Heard, limit: Limit, is_exact: bool) -> Cause:
    """By where differences begin: at position 0 nothing turns and nothing else is looked at."""
    apart = [row for row in differences(spoken, heard) if row]
    begins_later = all(row[0] <= limit.mean for row in apart)
    if begins_later and any(max(row) > limit.most for row in apart):
        return "position"
    return "weights" if is_exact else "precision"


def shown(renderer: Renderer, token: int) -> str:
    """For a message."""
    return f"{renderer.decode([token], skip_special=False)[:40]!r} (id {token})"

"""Completions drawn from the model in training, many side by side, in the trainer's own process.

B sequences of a batch, A of them still going on, V vocabulary entries.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tunesmith.nn.language import LanguageModel
from tunesmith.nn.past import Decoding
from tunesmith.nn.sampling import keep_top_k, keep_top_p, pick, tempered, uniforms
from tunesmith.train.batches import Interrupted

_COPIES = 1 << 20
"""More than there are completions of one prompt: each has random numbers of its own."""
_NUMBERS = 64
"""Random numbers made at once for each sequence."""


@dataclass(frozen=True)
class Wish:
    """How completions are drawn."""

    max_new_tokens: int
    stop_ids: frozenset[int]
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""


@dataclass(frozen=True)
class Completion:
    prompt: int
    """Place of what it answers among the prompts."""
    ids: tuple[int, ...]
    """At least one; the last is a stop id where `finish` is `stop`."""
    log_probs: tuple[float, ...]
    """Of each id, by the model at the temperature (1 where greedy) before top-k and top-p: what the
    training's forward pass gives it."""
    entropies: tuple[float, ...]
    """Of the same distributions, in nats."""
    finish: Literal["stop", "length"]


@dataclass(frozen=True)
class Rollouts:
    """A sampler over a model whose weights may change between two calls."""

    model: LanguageModel
    device: str = "cpu"
    cache_tokens: int = 1 << 16
    """Of keys and values held at once, prompts and what may become of them together."""
    should_stop: Callable[[], bool] = lambda: False

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        wish: Wish,
        *,
        n: int = 1,
        seed: int = 0,
        places: Sequence[int] | None = None,
    ) -> list[Completion]:
        """`n` for each prompt, prompt after prompt.

        The random number of a token hangs on the seed, its prompt's place (of the `places` given,
        else among the prompts), which of the n it belongs to, and its index. A prompt has at least
        one token, and leaves the context room for another. Raises Interrupted at a stop.
        """
        found: dict[int, list[Completion]] = {}
        for batch in self._batches(prompts, wish, n):
            going = _Going(self, [prompts[at] for at in batch], n, wish)
            streams = [
                (places[at] if places else at) * _COPIES + i for at in batch for i in range(n)
            ]
            going.run(seed, torch.tensor(streams, device=self.device))
            ended = going.completions([at for at in batch for _ in range(n)])
            for number, at in enumerate(batch):
                found[at] = ended[number * n : (number + 1) * n]
        return [one for at in range(len(prompts)) for one in found[at]]

    def _batches(self, prompts: Sequence[Sequence[int]], wish: Wish, n: int) -> Iterator[list[int]]:
        """Prompts of about the same length, as many as the cache holds with all that may come."""
        batch: list[int] = []
        for at in sorted(range(len(prompts)), key=lambda at: len(prompts[at])):
            tokens = (len(batch) + 1) * n * (len(prompts[at]) + wish.max_new_tokens)
            if batch and tokens > self.cache_tokens:
                yield batch
                batch = []
            batch.append(at)
        if batch:
            yield batch


class _Going:
    """One batch, from its prompts to its last token."""

    def __init__(
        self, rollouts: Rollouts, prompts: Sequence[Sequence[int]], n: int, wish: Wish
    ) -> None:
        context = rollouts.model.context_length
        limits = [min(wish.max_new_tokens, context - len(one)) for one in prompts]
        assert min(limits) > 0, "a prompt leaves no room in the context"
        device = rollouts.device
        self._wish, self._should_stop = wish, rollouts.should_stop
        self._decoding = Decoding(rollouts.model, prompts, n, device)
        self._stop_ids = torch.tensor(sorted(wish.stop_ids), device=device, dtype=torch.int64)
        self._limits_A = torch.tensor(limits, device=device).repeat_interleave(n)
        self._rows_A = torch.arange(len(prompts) * n, device=device)
        """Which sequences of the batch go on."""
        self._steps: list[tuple[Tensor, Drawn]] = []
        """Their rows, and what was drawn for them."""

    def run(self, seed: int, streams_B: Tensor) -> None:
        while not self._should_stop():
            at = len(self._steps)
            if at % _NUMBERS == 0:
                numbers_BC = uniforms(seed, streams_B, at, _NUMBERS)
            uniform_A = numbers_BC[self._rows_A, at % _NUMBERS]
            drawn = draw(self._decoding.logits_AV, self._wish, uniform_A)
            self._steps.append((self._rows_A, drawn))
            is_over_A = torch.isin(drawn.ids, self._stop_ids) | (self._limits_A == at + 1)
            if is_over_A.all():
                return
            self._decoding.step(drawn.ids, ~is_over_A)
            self._rows_A, self._limits_A = self._rows_A[~is_over_A], self._limits_A[~is_over_A]
        raise Interrupted

    def completions(self, prompts: Sequence[int]) -> list[Completion]:
        """Of all the batch's sequences, in order; `prompts` are the places of what they answer."""
        ids: list[list[int]] = [[] for _ in prompts]
        log_probs: list[list[float]] = [[] for _ in prompts]
        entropies: list[list[float]] = [[] for _ in prompts]
        for rows_A, drawn in self._steps:
            told = (rows_A.tolist(), drawn.ids.tolist(), *drawn.numbers())
            for row, id_, log_prob, entropy in zip(*told, strict=True):
                ids[row].append(id_)
                log_probs[row].append(log_prob)
                entropies[row].append(entropy)
        return [
            Completion(
                prompt,
                tuple(ids[row]),
                tuple(log_probs[row]),
                tuple(entropies[row]),
                "stop" if ids[row][-1] in self._wish.stop_ids else "length",
            )
            for row, prompt in enumerate(prompts)
        ]


@dataclass(frozen=True)
class Drawn:
    """The next token of each sequence."""

    ids: Tensor
    log_probs: Tensor
    entropies: Tensor

    def numbers(self) -> tuple[list[float], list[float]]:
        return self.log_probs.tolist(), self.entropies.tolist()


def draw(logits_AV: Tensor, wish: Wish, uniform_A: Tensor) -> Drawn:
    """See `Completion` for what the numbers are of."""
    tempered_AV = tempered(logits_AV, wish.temperature or 1.0)
    log_probs_AV = tempered_AV.log_softmax(-1)
    probs_AV = log_probs_AV.exp()
    ids_A = _chosen(tempered_AV, probs_AV, wish, uniform_A)
    return Drawn(
        ids=ids_A,
        log_probs=log_probs_AV.gather(1, ids_A[:, None])[:, 0],
        entropies=-(probs_AV * log_probs_AV.clamp(min=-1e4)).sum(-1),
    )


def _chosen(tempered_AV: Tensor, probs_AV: Tensor, wish: Wish, uniform_A: Tensor) -> Tensor:
    if wish.temperature == 0:
        return tempered_AV.argmax(-1)
    if not wish.top_k and wish.top_p == 1:
        return pick(probs_AV, uniform_A)
    if wish.top_k:
        tempered_AV = keep_top_k(
            tempered_AV, uniform_A.new_full(uniform_A.shape, wish.top_k).long()
        )
    if wish.top_p < 1:
        tempered_AV = keep_top_p(tempered_AV, torch.full_like(uniform_A, wish.top_p))
    return pick(tempered_AV.softmax(-1), uniform_A)

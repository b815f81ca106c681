"""What was drawn for a round of prompts and what is to be learnt from it, as tensors and samples.

G prompts, N completions (n of each prompt, one after the other), T tokens of all completions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, groupby, pairwise

import torch
from torch import Tensor

from tunesmith.nn.forks import Fork, ForkBatch, flatten_forks
from tunesmith.nn.language import LanguageModel
from tunesmith.train.batches import split
from tunesmith.train.objective import Ground


@dataclass(frozen=True)
class Episodes:
    prompts: Sequence[Sequence[int]]
    completions: Sequence[Sequence[int]]
    by_token: Mapping[str, Tensor]
    """(T,) each: `old`, the log-probabilities with which they were drawn; `reference`, those of the
    model as it was opened, where it is asked; `advantage`; and what a method has beside."""
    is_learnt_N: Tensor
    beta: float
    """What divergence costs in this round."""

    @property
    def copies(self) -> int:
        return len(self.completions) // len(self.prompts)

    @property
    def sizes(self) -> list[int]:
        return [len(one) for one in self.completions]

    @property
    def sizes_N(self) -> Tensor:
        return torch.tensor(self.sizes)

    def per_completion(self, values_T: Tensor) -> Tensor:
        """Sums, (N,)."""
        sizes_N = self.sizes_N
        owners_T = torch.arange(len(sizes_N)).repeat_interleave(sizes_N)
        return values_T.new_zeros(len(sizes_N)).index_add(0, owners_T, values_T)

    def spread(self, values_N: Tensor) -> Tensor:
        """Each completion's value for all its tokens, (T,)."""
        return values_N.repeat_interleave(self.sizes_N)

    def bundles(self, order: Sequence[int], budget_tokens: int) -> list["Bundle"]:
        """Completions, in an order, as samples: neighbours share their prompt as far as a pass
        holds them."""
        bounds = list(accumulate(self.sizes, initial=0))
        found = []
        for prompt, numbers in groupby(order, key=lambda number: number // self.copies):
            ids = self.prompts[prompt]
            for part in _parts(list(numbers), self.sizes, budget_tokens - len(ids)):
                places_T = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in part])
                fork = Fork(ids, tuple(_answer(self.completions[i]) for i in part))
                values = {name: values_T[places_T] for name, values_T in self.by_token.items()}
                found.append(Bundle(fork, places_T, values, self.beta))
        return found

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """All of it, as tensors."""
        return {
            "prompts": _joined(self.prompts),
            "prompt_sizes": torch.tensor([len(one) for one in self.prompts]),
            "completions": _joined(self.completions),
            "sizes": self.sizes_N,
            "is_learnt": self.is_learnt_N,
            "beta": torch.tensor(self.beta, dtype=torch.float64),
            **{f"by_token/{name}": values_T for name, values_T in self.by_token.items()},
        }

    @classmethod
    def restore(cls, state: Mapping[str, Tensor]) -> "Episodes":
        prefix = "by_token/"
        return cls(
            prompts=_parted(state["prompts"], state["prompt_sizes"]),
            completions=_parted(state["completions"], state["sizes"]),
            by_token={
                name.removeprefix(prefix): values_T
                for name, values_T in state.items()
                if name.startswith(prefix)
            },
            is_learnt_N=state["is_learnt"],
            beta=float(state["beta"]),
        )


@dataclass(frozen=True, slots=True)
class Bundle:
    """Completions of one prompt that are learnt from in one step, as a sample of the loop."""

    fork: Fork
    places_T: Tensor
    """Of its tokens among all of the round."""
    by_token: Mapping[str, Tensor]
    beta: float

    @property
    def tokens(self) -> int:
        return self.fork.tokens

    @property
    def labels(self) -> int:
        return len(self.places_T)

    @property
    def completions(self) -> int:
        return len(self.fork.answers)


@dataclass(frozen=True)
class Laid:
    """A pass's bundles, with their values in the order of its label rows."""

    batch: ForkBatch
    by_token: Mapping[str, Tensor]

    @classmethod
    def out(cls, ground: Ground[LanguageModel], bundles: Sequence[Bundle]) -> "Laid":
        forks = [bundle.fork for bundle in bundles]
        batch = flatten_forks(forks, ground.device, is_shared=ground.model.can_share_prompts)
        values = {
            name: torch.cat([bundle.by_token[name] for bundle in bundles]).to(ground.device)
            for name in bundles[0].by_token
        }
        return cls(batch, values)


def measure(
    ground: Ground[LanguageModel],
    episodes: Episodes,
    read: Callable[[ForkBatch], Tensor],
    numbers: Sequence[int] | None = None,
) -> Tensor:
    """(T,) what `read` gives for the label rows of all completions, or of those of some numbers;
    not a number elsewhere. Nothing is differentiated."""
    found_T = torch.full((sum(episodes.sizes),), torch.nan)
    chosen = range(len(episodes.completions)) if numbers is None else numbers
    bundles = episodes.bundles(chosen, ground.micro_batch_tokens)
    with torch.no_grad():
        for part in split(bundles, ground.micro_batch_tokens):
            values_R = read(Laid.out(ground, part).batch)
            found_T[torch.cat([bundle.places_T for bundle in part])] = values_R.float().cpu()
    return found_T


def _parts(numbers: Sequence[int], sizes: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Neighbours of at most so many tokens together, at least one."""
    part: list[int] = []
    for number in numbers:
        if part and sum(sizes[one] for one in part) + sizes[number] > budget:
            yield part
            part = []
        part.append(number)
    yield part


def _answer(ids: Sequence[int]) -> tuple[Sequence[int], Sequence[bool]]:
    return ids, [True] * len(ids)


def _joined(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64)


def _parted(ids: Tensor, sizes: Tensor) -> list[list[int]]:
    bounds = [0, *sizes.cumsum(0).tolist()]
    return [ids[start:end].tolist() for start, end in pairwise(bounds)]

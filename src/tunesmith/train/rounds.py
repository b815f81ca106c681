"""Rounds of reinforcement: completions drawn, rewarded, and handed out for one or more updates.

G prompts, n completions of each, N of all, T tokens of all completions, K sources of rewards.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import msgspec
import torch
from torch import Tensor

from tunesmith.data.asked import asked
from tunesmith.data.holdout import Rows
from tunesmith.data.render import Renderer
from tunesmith.errors import FailureClass, JobFailure
from tunesmith.nn.forks import ForkBatch
from tunesmith.nn.language import LanguageModel
from tunesmith.spec.train import Grpo, Reinforcing
from tunesmith.train.alarms import Alarms
from tunesmith.train.batches import Feed, Shuffle
from tunesmith.train.episodes import Bundle, Episodes, measure
from tunesmith.train.frozen import Frozen
from tunesmith.train.leash import Leash
from tunesmith.train.objective import Ground
from tunesmith.train.prompts import Prompt
from tunesmith.train.rewarding import Judged, Rewarder
from tunesmith.train.rollout import Completion, Rollouts, Wish
from tunesmith.train.source import read_row
from tunesmith.train.surrogate import k3

LOOKED_AT = 8
"""Completions of a round whose divergence is measured where it costs nothing and has no target."""
_EMPTY_ROUNDS = 100
"""In a row, before it is given up to look for something to learn from."""
_COMPLETIONS = msgspec.msgpack.Decoder(tuple[list[Completion], list[list[float]]])

Estimate = Callable[[Episodes, Tensor], Mapping[str, Tensor]]
"""From a round's episodes and rewards (N,) to values by token (T,), `advantage` among them."""


@dataclass(frozen=True)
class Drawer:
    """What turns prompts into rewarded completions."""

    rollouts: Rollouts
    wish: Wish
    rewarder: Rewarder
    rows: Rows
    renderer: Renderer

    def draw(
        self, prompts: Sequence[Prompt], n: int, seed: int
    ) -> tuple[list[Completion], list[list[float]]]:
        """Completions, prompt after prompt, and of each every source's reward."""
        found = self.rollouts.sample(
            [prompt.ids for prompt in prompts],
            self.wish,
            n=n,
            seed=seed,
            places=[prompt.place for prompt in prompts],
        )
        judged = [self._judged(prompts[one.prompt], one) for one in found]
        scores = self.rewarder.score(judged) if judged else []
        return found, [self._checked(each) for each in scores]

    def total(self, scores_NK: Tensor) -> Tensor:
        return scores_NK @ torch.tensor(self.rewarder.weights, dtype=scores_NK.dtype)

    def _judged(self, prompt: Prompt, completion: Completion) -> Judged:
        row = read_row(self.rows, prompt.place)
        ids = completion.ids[:-1] if completion.finish == "stop" else completion.ids
        return Judged(row, asked(row).plain, self.renderer.decode(ids), completion.ids)

    def _checked(self, scores: Sequence[float]) -> list[float]:
        for name, score in zip(self.rewarder.names, scores, strict=True):
            if not math.isfinite(score):
                raise JobFailure(
                    FailureClass.USER_ERROR,
                    f"the reward {name} gave {score}, which is no finite number",
                    "a reward has to be a finite number for every completion",
                )
        return list(scores)


@dataclass
class Rounds:
    """Makes a round of prompts. What it is given is left as it is, but for `leash`."""

    spec: Reinforcing
    ground: Ground[LanguageModel]
    drawer: Drawer
    frozen: Frozen
    estimate: Estimate
    leash: Leash
    is_exact: bool = True
    """Whether the sampler's log-probabilities are taken for training's; else they are measured."""

    def make(self, number: int, prompts: Sequence[Prompt]) -> tuple[Episodes, dict[str, float]]:
        """The episodes of a round, and what is told of it."""
        prompts, drawn, scores = self._drawn(number, prompts)
        rewards_N = self.drawer.total(torch.tensor(scores, dtype=torch.float64)).float()
        by_token = {"old": torch.tensor([value for one in drawn for value in one.log_probs])}
        episodes = Episodes(
            prompts=[prompt.ids for prompt in prompts],
            completions=[one.ids for one in drawn],
            by_token=by_token,
            is_learnt_N=self._is_learnt(drawn, rewards_N),
            beta=self.leash.beta,
        )
        if not self.is_exact:
            by_token["old"] = measure(self.ground, episodes, self._log_probs)
        divergence = self._look_back(episodes, by_token)
        by_token |= self.estimate(episodes, rewards_N)
        told = self._told(drawn, scores, rewards_N, divergence)
        self.leash.follow(divergence)
        return episodes, told

    def stand_ins(self, prompts: Sequence[Prompt]) -> list[Bundle]:
        """Samples of a step as long as there can be, where nothing is drawn: for a probe."""
        copies, longest = self.spec.num_generations, self.spec.max_completion_length
        zeros_T = torch.zeros(len(prompts) * copies * longest)
        names = ("old", "reference", "advantage", "value", "return")
        episodes = Episodes(
            prompts=[prompt.ids for prompt in prompts],
            completions=[[0] * longest] * (len(prompts) * copies),
            by_token=dict.fromkeys(names, zeros_T),
            is_learnt_N=torch.ones(len(prompts) * copies, dtype=torch.bool),
            beta=self.leash.beta,
        )
        return episodes.bundles(range(len(episodes.completions)), self.ground.micro_batch_tokens)

    def _drawn(
        self, number: int, prompts: Sequence[Prompt]
    ) -> tuple[list[Prompt], list[Completion], list[list[float]]]:
        """Each process draws for its share of the prompts; all have all."""
        group, seed = self.ground.group, self.spec.optim.seed
        mine = prompts[group.rank :: group.size]
        round_seed = (seed << 32) + number
        found = self.drawer.draw(mine, self.spec.num_generations, round_seed)
        parts = [
            _COMPLETIONS.decode(part) for part in group.exchange(msgspec.msgpack.encode(found))
        ]
        ordered = [one for rank in range(group.size) for one in prompts[rank :: group.size]]
        return (
            ordered,
            [one for part, _ in parts for one in part],
            [one for _, part in parts for one in part],
        )

    def _is_learnt(self, drawn: Sequence[Completion], rewards_N: Tensor) -> Tensor:
        is_learnt_N = torch.ones(len(drawn), dtype=torch.bool)
        if self.spec.mask_truncated:
            is_learnt_N &= torch.tensor([one.finish == "stop" for one in drawn])
        if isinstance(self.spec, Grpo) and self.spec.drop_even_groups:
            is_even_G = rewards_N.view(-1, self.spec.num_generations).std(1) == 0
            is_learnt_N &= ~is_even_G.repeat_interleave(self.spec.num_generations)
        return is_learnt_N

    def _look_back(self, episodes: Episodes, by_token: dict[str, Tensor]) -> float:
        """Nats a token between the policy and the model as it was opened.

        The latter's log-probabilities are kept where divergence costs anything.
        """
        is_wanted = episodes.beta > 0 or self.leash.target is not None
        numbers = None if is_wanted else range(min(LOOKED_AT, len(episodes.completions)))
        with self.frozen.again():
            reference_T = measure(self.ground, episodes, self._log_probs, numbers)
        if is_wanted:
            by_token["reference"] = reference_T
        return float(k3(by_token["old"], reference_T).nanmean())

    def _log_probs(self, batch: ForkBatch) -> Tensor:
        return self.ground.model.log_probs(batch.flat, self.spec.temperature)

    def _told(
        self,
        drawn: Sequence[Completion],
        scores: Sequence[Sequence[float]],
        rewards_N: Tensor,
        divergence: float,
    ) -> dict[str, float]:
        entropies = [value for one in drawn for value in one.entropies]
        by_source = zip(*scores, strict=True)
        told = {
            "reward/mean": float(rewards_N.mean()),
            "reward/std": float(rewards_N.std(unbiased=False)),
            "kl_divergence": divergence,
            "kl_coefficient": self.leash.beta,
            "episode_length": sum(len(one.ids) for one in drawn) / len(drawn),
            "entropy": sum(entropies) / len(entropies),
            "truncated": sum(one.finish == "length" for one in drawn) / len(drawn),
        }
        for name, values in zip(self.drawer.rewarder.names, by_source, strict=True):
            told[f"reward/{name}"] = sum(values) / len(values)
        if self.spec.num_generations > 1:
            spread_G = rewards_N.view(-1, self.spec.num_generations).std(1)
            told["even_groups"] = float((spread_G == 0).float().mean())
        return told


def steps_of(spec: Reinforcing, prompts: float, a_round: int, completions_a_step: int) -> int:
    """That so many prompts come to."""

    def updates(prompts: float) -> int:
        """Of one pass over a round of so many prompts."""
        return math.ceil(round(prompts, 6) * spec.num_generations / completions_a_step)

    rounds, rest = divmod(prompts, a_round)
    return max(1, (int(rounds) * updates(a_round) + updates(rest)) * spec.update_epochs)


class Beside(Protocol):
    """What is trained beside the model."""

    def kept(self) -> Mapping[str, Tensor]: ...

    def take(self, kept: Mapping[str, Tensor]) -> None: ...


@dataclass
class RoundFeed:
    """See `Steps`: a round is made when its first step is asked for.

    What is drawn hangs on the weights at that moment, so a round that was begun is kept with a
    checkpoint, and gone on with.
    """

    prompts: Feed[Prompt]
    rounds: Rounds
    completions_a_step: int
    alarms: Alarms
    beside: Beside | None = None
    """What else checkpoints are to hold."""
    told: dict[str, float] = field(default_factory=dict)
    _number: int = 0
    _at: int = 0
    _began: Mapping[str, Any] | None = None
    """Where the round's prompts were taken from."""
    _episodes: Episodes | None = None
    _orders: list[list[int]] = field(default_factory=list)
    """Of each step of the round, its completions."""

    def take(self) -> list[Bundle]:
        for _ in range(_EMPTY_ROUNDS):
            if self._is_under_way:
                break
            self._begin()
        if not self._is_under_way or self._episodes is None:
            raise _nothing_to_learn()
        self._at += 1
        return self._last()

    def lines(self, since: Mapping[str, Any]) -> list[int]:
        """Of all the round's prompts; none where the round was begun before the job went on."""
        return [] if self._began is None else self.prompts.lines(self._began)

    def lay_anew(self, samples: Sequence[Bundle]) -> Sequence[Bundle]:
        return self._last()

    def _last(self) -> list[Bundle]:
        """Of the step that was taken last, for the passes that there are now."""
        assert self._episodes is not None
        order = self._orders[self._at - 1]
        return self._episodes.bundles(order, self.rounds.ground.micro_batch_tokens)

    @property
    def _is_under_way(self) -> bool:
        return self._at < len(self._orders)

    def _begin(self) -> None:
        self._began = self.prompts.state()
        prompts = self.prompts.take()
        episodes, self.told = self.rounds.make(self._number + 1, prompts)
        self._number += 1
        self._set(episodes, 0)
        self.alarms.look(self.told)

    def _set(self, episodes: Episodes, at: int) -> None:
        self._episodes, self._at = episodes, at
        spec = self.rounds.spec
        self._orders = []
        for epoch in range(spec.update_epochs):
            shuffle = Shuffle(
                len(episodes.prompts), spec.optim.seed, self._number * spec.update_epochs + epoch
            )
            copies = episodes.copies
            order = [at * copies + i for at in shuffle for i in range(copies)]
            order = [one for one in order if episodes.is_learnt_N[one]]
            size = self.completions_a_step
            self._orders += [order[start : start + size] for start in range(0, len(order), size)]

    @property
    def epoch(self) -> int:
        return self.prompts.epoch - (self.prompts.is_between_epochs and self._is_under_way)

    @property
    def epoch_samples(self) -> int | None:
        return self.prompts.epoch_samples

    @property
    def is_between_epochs(self) -> bool:
        return self.prompts.is_between_epochs and not self._is_under_way

    @property
    def progress(self) -> float:
        left = 1 - self._at / len(self._orders) if self._orders else 0.0
        return max(0.0, self.prompts.progress - left / self.prompts.steps_an_epoch)

    @property
    def steps_an_epoch(self) -> int:
        prompts, a_round = self.prompts.samples_an_epoch, self.prompts.samples_a_step
        return steps_of(self.rounds.spec, prompts, a_round, self.completions_a_step)

    def state(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts.state(),
            "number": self._number,
            "at": self._at,
            "beta": self.rounds.leash.beta,
            "told": self.told,
            "alarms": asdict(self.alarms.memory),
        }

    def kept(self) -> Mapping[str, Tensor]:
        """Of a round under way, all of it."""
        kept = {} if self.beside is None else self.beside.kept()
        beside = {f"beside/{name}": one for name, one in kept.items()}
        if self._episodes is None or not self._is_under_way:
            return beside
        return beside | {f"round/{name}": one for name, one in self._episodes.state.items()}

    def seek(self, state: dict[str, Any], kept: Mapping[str, Tensor]) -> None:
        self.prompts.seek(state["prompts"])
        self._number, self.told = state["number"], state["told"]
        self.rounds.leash.beta = state["beta"]
        self.alarms.recall(state["alarms"])
        if self.beside is not None:
            self.beside.take(_under("beside/", kept))
        episodes = _under("round/", kept)
        self._episodes, self._orders, self._at, self._began = None, [], 0, None
        if episodes:
            self._set(Episodes.restore(episodes), state["at"])


def _under(prefix: str, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in kept.items()
        if name.startswith(prefix)
    }


def _nothing_to_learn() -> JobFailure:
    return JobFailure(
        FailureClass.USER_ERROR,
        f"{_EMPTY_ROUNDS} rounds in a row held no completion to learn from",
        "rewards that are all the same, or completions that are all cut off, teach nothing: look "
        "at the rewards, raise max_completion_length, or leave out what drops completions",
    )

"""Completions scored by a reward model, which stays as it is.

It reads what it was trained on: its own tokenizer and template make an answered conversation of
prompt and completion, and the score is that of the last token.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

import torch

from tunesmith.data.asked import asked
from tunesmith.data.render import Encoded, Renderer
from tunesmith.data.row import Row
from tunesmith.errors import FailureClass, JobFailure, ValidationError
from tunesmith.nn.folder import open_folder
from tunesmith.nn.forks import Fork, flatten_ends
from tunesmith.nn.language import LanguageModel, ScoringModel, open_scorer, open_scorer_over
from tunesmith.nn.opening import Opening, is_reward_model
from tunesmith.spec.chat import Message
from tunesmith.spec.pipe import Plan
from tunesmith.train.pairs import fork_of
from tunesmith.train.rewarding import Judged


class ModelScoring:
    """See `Scorer`."""

    def __init__(
        self,
        folder: str,
        plan: Plan,
        format: str,
        warn: Callable[[str, str], None],
        policy: LanguageModel | None = None,
    ) -> None:
        """`format` is that of the rows, for a model without a template. An adapter over the weights
        that the policy's adapter stands on shares them.

        Raises JobFailure(user_error).
        """
        self._model = open_reward_model(folder, plan, policy)
        self._renderer = Renderer.load(folder).with_fallback(format)
        self._plan, self._warn, self._has_cut = plan, warn, False

    @torch.no_grad()
    def score(self, judged: Sequence[Judged]) -> list[float]:
        found: list[float] = []
        for forks in _passes(self._forks(judged), self._plan.micro_batch_tokens):
            is_shared = self._model.can_share_prompts
            batch = flatten_ends(forks, self._plan.device, is_shared=is_shared)
            found += self._model.scores(batch).tolist()
        return found

    def _forks(self, judged: Sequence[Judged]) -> Iterator[Fork]:
        """In order; neighbours that answer one prompt share it, as far as a pass holds them."""
        for _, same in groupby(judged, key=lambda one: one.row.line):
            part: list[Encoded] = []
            for one in map(self._encode, same):
                tokens = sum(len(each.ids) for each in (*part, one))
                if part and tokens > self._plan.micro_batch_tokens:
                    yield fork_of(part)
                    part = []
                part.append(one)
            yield fork_of(part)

    def _encode(self, judged: Judged) -> Encoded:
        try:
            found = self._renderer.encode(answered(judged))
        except ValidationError as error:
            raise JobFailure(
                FailureClass.DATA_ERROR,
                f"line {judged.row.line}: the reward model cannot read it: {error.message}",
            ) from error
        limit = self._model.context_length
        if len(found.ids) > limit and not self._has_cut:
            self._has_cut = True
            self._warn(
                "reward_cut",
                f"a reward model has a context of {limit:,} tokens: of longer conversations it "
                "reads the end only",
            )
        ids, mask = found.ids[-limit:], list(found.mask[-limit:])
        return Encoded(ids, mask if any(mask) else [*mask[:-1], True])


def answered(judged: Judged) -> Row:
    """The row with the completion for its answer."""
    found, line = asked(judged.row), judged.row.line
    if found.prompt is not None:
        return Row(line, prompt=found.prompt, completion=judged.completion)
    answer = Message(role="assistant", content=judged.completion)
    return Row(line, messages=(*found.messages, answer), tools=found.tools)


def open_reward_model(folder: str, plan: Plan, policy: LanguageModel | None = None) -> ScoringModel:
    """Frozen; an adapter is merged into its base, unless that is the policy's, too.

    Raises JobFailure(user_error).
    """
    if not is_reward_model(open_folder(folder)):
        raise JobFailure(
            FailureClass.USER_ERROR,
            f"{folder} is no reward model: it gives tokens and no score",
            "train one with method: reward",
        )
    opening = Opening(lora=None, precision=plan.precision, device=plan.device, has_dropout=False)
    shared = None if policy is None else open_scorer_over(policy, folder)
    model = open_scorer(folder, opening) if shared is None else shared
    for one in model.trainable().values():
        one.requires_grad_(False)
    model.eval()
    return model


def _passes(forks: Iterable[Fork], budget: int) -> Iterator[list[Fork]]:
    """Neighbours of at most so many tokens together, at least one."""
    part: list[Fork] = []
    for fork in forks:
        if part and sum(one.tokens for one in part) + fork.tokens > budget:
            yield part
            part = []
        part.append(fork)
    if part:
        yield part

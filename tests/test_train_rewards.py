"""What completions are rewarded for, in the trainer: models that score, and rules."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rl_fixtures import ASKED, guessing
from train_fixtures import Place, preferences, run_here, tuned, write_rows
from tunesmith.data import verify
from tunesmith.data.render import Renderer
from tunesmith.data.row import Row
from tunesmith.errors import FailureClass, JobFailure
from tunesmith.nn.batch import flatten
from tunesmith.nn.forks import Fork, flatten_ends
from tunesmith.nn.language import open_model, open_scorer
from tunesmith.nn.opening import Opening
from tunesmith.spec.chat import Message
from tunesmith.spec.pipe import Inputs, Plan
from tunesmith.spec.rewards import RewardModel
from tunesmith.spec.train import Grpo, Lora, Reward, Rloo, Run
from tunesmith.train.rewarding import Judged
from tunesmith.train.rewards import Bench, open_rewarders
from tunesmith.train.rewards.scoring import ModelScoring

EACH_STEP = Run(save_steps=1, keep_checkpoints=100, save_seconds=3600)
SHORT = {"max_completion_length": 6, "max_length": 32, "rollout_batch_size": 4, "batch_size": 16}
MODEL = {"kind": "model", "model": "rm"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return guessing(tmp_path_factory.mktemp("rewards"), epochs=5)


@pytest.fixture(scope="module", params=[None, Lora(rank=4)], ids=["full", "lora"])
def reward_model(place: Place, request):
    pairs = write_rows(place.folder / "pairs.jsonl", preferences(24))
    inputs = Inputs(model=str(place.model), dataset=str(pairs))
    spec = tuned(Reward, lora=request.param, max_steps=4, learning_rate=1e-2)
    return run_here(place.task(spec, inputs=inputs)).last["artifact"]


def rewarded(place: Place, folder: str) -> Inputs:
    return Inputs(model=str(place.model), dataset=str(place.dataset), reward_models={"rm": folder})


def opened(inputs: Inputs, budget: int = 4096, said: list[str] | None = None):
    plan = Plan(threads=1, micro_batch_tokens=budget)
    warned = [] if said is None else said
    bench = Bench(inputs.reward_models, plan, "prompts", lambda code, _: warned.append(code))
    return open_rewarders([RewardModel(model="rm")], bench)


def completed(prompt: str, *told: str) -> list[Judged]:
    asked = Row(1, messages=(Message(role="user", content=prompt),))
    return [Judged(asked, [{"role": "user", "content": prompt}], one, ()) for one in told]


@pytest.mark.parametrize("budget", [4096, 24])
def test_a_reward_model_scores_what_it_was_trained_to_read(place, reward_model, budget):
    given = [*completed("river", "stone", "night 빛 stone"), *completed("夜", "水")]
    found = opened(rewarded(place, reward_model), budget).score(given)
    model = open_scorer(reward_model, Opening(lora=None, has_dropout=False))
    renderer = Renderer.load(reward_model)
    for one, (score,) in zip(given, found, strict=True):
        said = (*one.row.messages, Message(role="assistant", content=one.completion))
        ids = renderer.encode(Row(1, messages=said)).ids
        with torch.no_grad():
            [expected] = model.scores(flatten_ends([Fork((), ((ids, [True] * len(ids)),))]))
        assert score == pytest.approx(expected.item(), abs=1e-5)


def test_an_adapter_over_the_policys_weights_shares_them_and_scores_the_same(place, reward_model):
    policy = open_model(str(place.model), lora=Lora(rank=2), has_dropout=False)
    batch = flatten([(ids := list(range(5, 25)), [True] * len(ids))])
    before = policy.log_probs(batch)
    plan = Plan(threads=1)
    shared, alone = (
        ModelScoring(reward_model, plan, "prompts", print, one) for one in (policy, None)
    )
    given = completed("river", "stone", "night 빛 stone")
    assert shared.score(given) == pytest.approx(alone.score(given), abs=1e-5)
    assert torch.equal(policy.log_probs(batch), before)
    is_adapter = (Path(reward_model) / "adapter_config.json").exists()
    held = [one._model._stack is policy._stack for one in (shared, alone)]
    assert held == [is_adapter, False]


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda:0",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_a_reward_model_in_half_precision_scores_nearly_the_same(place, reward_model, device):
    given = completed("river", "stone", "night 빛 stone")
    exact = ModelScoring(reward_model, Plan(threads=1), "prompts", print).score(given)
    halved = Plan(threads=1, precision="bf16", device=device)
    found = ModelScoring(reward_model, halved, "prompts", print).score(given)
    assert found == pytest.approx(exact, abs=0.05)


def test_a_reward_model_reads_the_end_of_what_its_context_does_not_hold(place, reward_model):
    said: list[str] = []
    rewarder = opened(rewarded(place, reward_model), said=said)
    scores = rewarder.score(completed(" ".join(ASKED * 60), "stone", "stone", "night"))
    assert scores[0] == pytest.approx(scores[1])
    assert said == ["reward_cut"]


def test_a_policy_learns_from_a_model_and_goes_on_to_the_same_bits(place, reward_model):
    rewards = [MODEL, {"kind": "exact_match"}]
    spec = tuned(Grpo, **SHORT, rewards=rewards, max_steps=4, run=EACH_STEP)
    inputs = rewarded(place, reward_model)
    whole = run_here(place.task(spec, inputs=inputs))
    told = whole.of("step")[0]["metrics"]
    total = told["reward/model"] + told["reward/exact_match"]
    assert told["reward/mean"] == pytest.approx(total)
    saved = {event["step"]: event["path"] for event in whole.of("checkpointed")}
    again = run_here(place.task(spec, inputs=inputs, resume_from=saved[3]))
    assert again.losses.items() <= whole.losses.items()
    expected, found = (
        load_file(Path(events.last["artifact"]) / "model.safetensors") for events in (whole, again)
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_model_without_a_score_is_refused_as_a_reward(place):
    spec = tuned(Rloo, **SHORT, rewards=[MODEL], max_steps=1)
    with pytest.raises(JobFailure, match="is no reward model") as caught:
        run_here(place.task(spec, inputs=rewarded(place, str(place.model))))
    assert caught.value.failure_class is FailureClass.USER_ERROR


def scores(source: dict, reference: str | None, *told: str, said: list[str] | None = None):
    warned = [] if said is None else said
    bench = Bench({}, Plan(threads=1), "prompts", lambda code, _: warned.append(code))
    spec = tuned(Rloo, **SHORT, rewards=[source])
    row = Row(3, prompt="river", reference=reference)
    found = open_rewarders(spec.rewards, bench).score([Judged(row, [], one, ()) for one in told])
    return [score for (score,) in found]


@pytest.mark.parametrize(
    ("source", "reference", "expected"),
    [
        ({"kind": "numeric"}, "#### 1,000", {"so it is 1000.0": 1, "1001": 0, "many": 0}),
        ({"kind": "numeric", "relative_tolerance": 0.01}, "1000", {"1009": 1, "1011": 0}),
        ({"kind": "regex", "pattern": r"^\d+$"}, None, {"12": 1, "a12": 0}),
        ({"kind": "json_schema", "json_schema": {"type": "array"}}, None, {"[1]": 1, "1": 0}),
        ({"kind": "rouge"}, "물이 흐른다", {"물이 흐른다": 1, "물은 흐른다": 0.8, "돌": 0}),
    ],
)
def test_rules_reward_what_they_say(source, reference, expected):
    assert scores(source, reference, *expected) == pytest.approx(list(expected.values()))


WORDS_SHARED = """
def reward(prompt, completion, reference, metadata):
    return len(set(completion.split()) & set(reference.split())) / (metadata or 1)
"""


def test_a_function_rewards_as_it_says():
    source = {"kind": "python", "code": WORDS_SHARED}
    assert scores(source, "river stone", "stone river", "stone", "night") == [2, 1, 0]


@pytest.mark.parametrize(
    ("source", "reference", "why"),
    [
        ({"kind": "python", "code": "def reward(:"}, None, "the code, line 1: invalid syntax"),
        ({"kind": "python", "code": WORDS_SHARED}, None, "of line 3: its line 3: AttributeError"),
        ({"kind": "python", "code": "x = 1"}, None, "defines no function `reward`"),
        ({"kind": "numeric"}, "many", "line 3: its reference holds no number"),
        ({"kind": "rouge"}, None, "line 3: no reference"),
        ({"kind": "regex", "pattern": "("}, None, "the pattern cannot be read"),
    ],
)
def test_a_rule_that_cannot_be_applied_fails_with_its_reason(source, reference, why):
    with pytest.raises(JobFailure, match=why):
        scores(source, reference, "x")


def test_a_slow_pattern_is_told_of_once(monkeypatch):
    monkeypatch.setattr(verify, "SECONDS", 0.05)
    said: list[str] = []
    slow = {"kind": "regex", "pattern": r"(a|aa)+$"}
    assert scores(slow, None, "a" * 60 + "!", "a" * 61 + "!", said=said) == [0, 0]
    assert said == ["reward_slow"]


def test_sources_of_one_kind_have_names_of_their_own():
    sources = [
        {"kind": "regex", "pattern": "a"},
        {"kind": "rouge"},
        {"kind": "regex", "pattern": "b"},
    ]
    found = open_rewarders(
        tuned(Rloo, **SHORT, rewards=sources).rewards,
        Bench({}, Plan(threads=1), "prompts", lambda code, _: None),
    )
    assert found.names == ("regex", "rouge", "regex_2")

"""A reward service: what it is asked, and what becomes of one that fails, hangs, talks nonsense."""

import json
from collections.abc import Iterator

import pytest

from receivers import Receiver, Say
from rl_fixtures import ASKED
from train_fixtures import Place, make_model, run_here, tuned, write_rows
from tunesmith.data.formats import parse
from tunesmith.data.row import Row
from tunesmith.errors import FailureClass, JobFailure
from tunesmith.spec.pipe import Inputs
from tunesmith.spec.rewards import RewardService
from tunesmith.spec.train import Grpo, Run
from tunesmith.train.batches import Interrupted
from tunesmith.train.rewarding import Judged
from tunesmith.train.rewards.service import MAX_ANSWER_BYTES, Service

HERE = ("127.0.0.0/8",)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


def service(receiver: Receiver, **over) -> tuple[Service, list[float]]:
    """With the seconds that it waited, none of which pass."""
    waited: list[float] = []
    source = RewardService(url=receiver.url("/score"), **({"tries": 3} | over))
    return Service(source, HERE, lambda: False, waited.append), waited


def told(*scores: object, **over) -> Say:
    return Say(200, body=json.dumps({"scores": scores}).encode(), **over)


def completed(count: int) -> list[Judged]:
    row = parse(b'{"prompt": "2+2?", "answer": 4, "metadata": {"kind": "sum"}}', "prompts", 1)
    said = [{"role": "user", "content": "2+2?"}]
    return [Judged(row, said, f"it is {at}", ()) for at in range(count)]


def test_completions_are_sent_in_batches_with_all_that_is_known(receiver: Receiver) -> None:
    receiver.answers["/score"] = [told(1, 0.5), told(-2)]
    asked, _ = service(receiver, batch_size=2)
    assert asked.score(completed(3)) == [1, 0.5, -2]
    first, second = (json.loads(one.body)["items"] for one in receiver.at("/score"))
    assert [len(first), len(second)] == [2, 1]
    assert first[0] == {
        "prompt": [{"role": "user", "content": "2+2?"}],
        "completion": "it is 0",
        "reference": "4",
        "metadata": {"kind": "sum"},
    }


def test_one_that_is_away_is_asked_again_after_longer_and_longer_waits(receiver: Receiver) -> None:
    receiver.answers["/score"] = [Say(503), Say(429, {"retry-after": "7"}), told(1)]
    asked, waited = service(receiver)
    assert asked.score(completed(1)) == [1]
    assert sum(waited) == pytest.approx(8)


def test_one_that_stays_away_fails_the_job_so_that_it_is_tried_again(receiver: Receiver) -> None:
    receiver.answers["/score"] = [Say(500)] * 3
    asked, waited = service(receiver)
    with pytest.raises(JobFailure, match="did not answer in 3 tries: it answered 500") as caught:
        asked.score(completed(1))
    assert caught.value.failure_class.is_retryable
    assert sum(waited) == pytest.approx(3)


@pytest.mark.parametrize("is_dripping", [False, True])
def test_one_that_hangs_is_let_go_of(receiver: Receiver, is_dripping: bool) -> None:
    if is_dripping:
        receiver.answers["/score"] = [Say(200, endless=True)]
    else:
        receiver.holding.add("/score")
    asked, _ = service(receiver, tries=1, timeout_seconds=0.3)
    with pytest.raises(JobFailure):
        asked.score(completed(1))


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (told(1), "answered 1 scores for 2 completions"),
        (told(1, float("nan")), "gave nan for a score"),
        (told(1, True), "gave True for a score"),
        (told(1, "1"), "gave 1 for a score"),
        (told(1, 1e300), "gave 1e+300 for a score"),
        (Say(200, body=b"[1, 2]"), "no list of scores"),
        (Say(200, body=b"<html>"), "something else than JSON"),
        (Say(200, body=b" " * (MAX_ANSWER_BYTES + 1)), "over 1,048,576 bytes"),
        (Say(302, {"location": "http://127.0.0.1/"}), "302; redirects are not followed"),
        (Say(401), "answered 401"),
    ],
)
def test_nonsense_fails_the_job_at_once(receiver: Receiver, answer: Say, why: str) -> None:
    receiver.answers["/score"] = [answer]
    asked, waited = service(receiver)
    with pytest.raises(JobFailure) as caught:
        asked.score(completed(2))
    assert why in str(caught.value)
    assert caught.value.failure_class is FailureClass.USER_ERROR
    assert waited == []


def test_an_address_that_is_not_open_is_not_asked(receiver: Receiver) -> None:
    source = RewardService(url=receiver.url("/score"))
    with pytest.raises(JobFailure, match="may not be asked"):
        Service(source, (), lambda: False).score(completed(1))
    everywhere = RewardService(url="http://169.254.169.254/latest")
    with pytest.raises(JobFailure, match="is never open"):
        Service(everywhere, ("0.0.0.0/0",), lambda: False).score(completed(1))
    assert receiver.heard == []


def test_a_stop_while_it_is_waited_for_is_heeded(receiver: Receiver) -> None:
    receiver.answers["/score"] = [Say(503)] * 9
    stops = iter([False, False, True])
    asked = Service(
        RewardService(url=receiver.url("/score")), HERE, lambda: next(stops), lambda _: None
    )
    with pytest.raises(Interrupted):
        asked.score(completed(1))


def test_a_policy_is_rewarded_by_a_service_and_no_round_is_scored_twice(
    receiver: Receiver, tmp_path
) -> None:
    rows = write_rows(tmp_path / "asked.jsonl", [{"prompt": word} for word in ASKED[:4]])
    place = Place(tmp_path, make_model(tmp_path / "model"), rows)
    receiver.answers["/score"] = [told(*range(32)), told(*range(32))]
    spec = tuned(
        Grpo,
        rewards=[{"kind": "url", "url": receiver.url("/score")}],
        **{"max_completion_length": 6, "max_length": 32, "rollout_batch_size": 4},
        **{"batch_size": 16, "epochs": 2},
        run=Run(save_steps=1, keep_checkpoints=9, save_seconds=3600),
    )
    inputs = Inputs(model=str(place.model), dataset=str(rows), networks=HERE)
    whole = run_here(place.task(spec, inputs=inputs))
    assert whole.of("step")[0]["metrics"]["reward/url"] == pytest.approx(15.5)
    assert len(receiver.at("/score")) == 2
    saved = whole.of("checkpointed")[0]["path"]
    receiver.answers["/score"] = [told(*range(32))]
    again = run_here(place.task(spec, inputs=inputs, resume_from=saved))
    assert again.losses.items() <= whole.losses.items()
    assert len(receiver.at("/score")) == 3


def test_rows_keep_their_metadata_and_are_the_same_without() -> None:
    line = b'{"prompt": "a", "chosen": "b", "rejected": "c", "metadata": {"rater": 1}}'
    found = parse(line, "preference", 1)
    assert found.metadata == {"rater": 1}
    assert found == parse(line.replace(b"rater", b"other"), "preference", 1)
    assert Row(1).metadata is None

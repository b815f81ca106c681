"""The table of states, row by row, and who may not move what."""

import math
from functools import partial
from typing import Any

import pytest

from store_fixtures import (
    LEASE,
    PLAN,
    SHA,
    Ledger,
    checkpointed,
    failed,
    new_ask,
    new_job,
    started,
    step,
    succeeded,
)
from tunesmith.errors import (
    AuthenticationError,
    ConflictError,
    FailureClass,
    FencedError,
    NotFoundError,
    RateLimitError,
)
from tunesmith.spec.estimate import Estimate
from tunesmith.spec.pipe import Plan
from tunesmith.spec.records import Job, JobState, Needs, Outcome, StopMode
from tunesmith.store import endings, events, jobs, rows

STOPPED = Outcome(kind="stopped", step=3)


def check_history(ledger: Ledger, job_id: str) -> None:
    """No gap in the numbers, nothing after a final event, fences that only grow."""
    told = ledger.events(job_id)
    job = ledger.get(job_id)
    assert [event.seq for event in told] == list(range(1, job.last_seq + 1))
    assert [event.fence for event in told] == sorted(event.fence for event in told)
    finals = [event.seq for event in told if event.type in {"succeeded", "failed", "cancelled"}]
    assert finals == ([job.last_seq] if job.state.is_final else [])


# – → queued


def test_a_submitted_job_waits_and_is_what_a_reader_sees(ledger: Ledger) -> None:
    job = ledger.submit(request={"이름": "값 🙂"}, label="조각", priority=5)
    assert job == ledger.get(job.id)
    assert job.state is JobState.QUEUED
    assert job.output_dir == f"/ws/outputs/{job.id}"
    assert job.created_at == ledger.clock.now
    assert ledger.words(job.id) == ["queued"]


def test_an_id_that_no_database_keeps_is_not_there(ledger: Ledger) -> None:
    """PostgreSQL refuses a NUL even in a question."""
    for look in (lambda tx: jobs.get(tx, "a\0b"), lambda tx: rows.lock(tx, "a\0\ud800b")):
        with pytest.raises(NotFoundError, match="no job"):
            ledger.write(look)


def test_text_that_no_database_keeps_is_made_harmless(ledger: Ledger) -> None:
    assert ledger.submit(label="a\0b\ud800").label == "a\ufffdb?"


def test_two_unfinished_jobs_do_not_share_a_folder(ledger: Ledger) -> None:
    first = ledger.submit(output_dir="/ws/outputs/모델")
    with pytest.raises(ConflictError, match=first.id) as refusal:
        ledger.submit(output_dir="/ws/outputs/모델")
    assert refusal.value.param == "output_dir"
    ledger.stop(first.id)
    assert ledger.submit(output_dir="/ws/outputs/모델").id != first.id


def test_the_limit_of_unfinished_jobs_counts_for_each_owner(ledger: Ledger) -> None:
    mine = [ledger.submit(max_unfinished=2) for _ in range(2)]
    with pytest.raises(RateLimitError, match="limit"):
        ledger.submit(max_unfinished=2)
    ledger.submit(max_unfinished=2, owner="other")
    ledger.stop(mine[0].id)
    ledger.submit(max_unfinished=2)
    with pytest.raises(RateLimitError):
        ledger.submit(max_unfinished=2)


def test_an_unknown_job_and_one_of_another_owner_look_the_same(ledger: Ledger) -> None:
    job = ledger.submit()
    for job_id, owner in [("00000000", None), ("x" * 10_000, None), (job.id, "someone")]:
        with pytest.raises(NotFoundError, match="GET /jobs"):
            ledger.store.read(partial(jobs.get, job_id=job_id, owner=owner))
    assert ledger.store.read(lambda tx: jobs.get(tx, job.id, "소유자")).id == job.id


def test_jobs_are_listed_newest_first(ledger: Ledger) -> None:
    made = [ledger.submit(owner=f"o{number % 2}").id for number in range(5)]
    ledger.stop(made[4])
    listed = ledger.store.read(lambda tx: jobs.list_jobs(tx))
    assert [job.id for job in listed] == made[::-1]
    page = ledger.store.read(lambda tx: jobs.list_jobs(tx, owner="o0", limit=1, offset=1))
    assert [job.id for job in page] == [made[2]]
    queued = ledger.store.read(lambda tx: jobs.list_jobs(tx, states=[JobState.QUEUED]))
    assert [job.id for job in queued] == made[3::-1]
    counts = ledger.store.read(lambda tx: jobs.count_by_state(tx))
    assert counts[JobState.QUEUED] == 4
    assert counts[JobState.CANCELLED] == 1
    assert counts[JobState.RUNNING] == 0


def test_the_place_in_the_queue_follows_priority_then_age(ledger: Ledger) -> None:
    old, young = ledger.submit(), ledger.submit()
    urgent = ledger.submit(priority=1)
    places = [
        ledger.store.read(partial(jobs.queue_place, job_id=job.id)) for job in (urgent, old, young)
    ]
    assert places == [1, 2, 3]
    ledger.stop(old.id)
    assert ledger.store.read(lambda tx: jobs.queue_place(tx, old.id)) == 0


# queued → starting


def test_claims_go_by_priority_then_age(ledger: Ledger) -> None:
    made = [ledger.submit(priority=priority).id for priority in (0, 5, 5, -1)]
    taken = [claimed.job.id for _ in range(4) if (claimed := ledger.claim())]
    assert taken == [made[1], made[2], made[0], made[3]]
    assert ledger.claim() is None


def test_a_claim_raises_the_fence_and_opens_an_attempt(ledger: Ledger) -> None:
    job = ledger.submit()
    claimed = ledger.claim()
    assert claimed is not None
    assert (claimed.fence, claimed.job.fence, claimed.job.attempts) == (1, 1, 1)
    assert claimed.job.state is JobState.STARTING
    assert claimed.job.lease_until == ledger.clock.now + LEASE
    assert ledger.words(job.id) == ["queued", "claimed"]


def test_a_job_is_not_claimed_before_its_data_was_checked(ledger: Ledger) -> None:
    job = ledger.submit(is_validated=False)
    assert ledger.claim() is None
    assert [one.id for one in ledger.store.read(jobs.to_validate)] == [job.id]
    ledger.write(lambda tx: jobs.mark_validated(tx, job.id, {"rows": 3}))
    ledger.write(lambda tx: jobs.mark_validated(tx, job.id, {"rows": 3}))
    assert ledger.claim() is not None
    assert ledger.words(job.id) == ["queued", "validated", "claimed"]


def test_a_claim_sent_again_brings_the_same_attempt_and_token(ledger: Ledger) -> None:
    ledger.submit()
    ledger.submit()
    ask = new_ask()
    answers = [ledger.write(lambda tx: jobs.claim(tx, ask, lease_seconds=LEASE)) for _ in range(3)]
    assert answers[0] is not None
    assert answers[0] == answers[1] == answers[2]
    counts = ledger.store.read(lambda tx: jobs.count_by_state(tx))
    assert (counts[JobState.STARTING], counts[JobState.QUEUED]) == (1, 1)


def test_a_claim_sent_again_after_the_attempt_is_over_brings_nothing(ledger: Ledger) -> None:
    job = ledger.submit()
    ask = new_ask()
    ledger.write(lambda tx: jobs.claim(tx, ask, lease_seconds=LEASE))
    ledger.finish(job.id, 1, failed())
    ledger.clock.pass_by(10)
    assert ledger.write(lambda tx: jobs.claim(tx, ask, lease_seconds=LEASE)) is None
    assert ledger.get(job.id).fence == 1


def test_only_what_fits_is_claimed(ledger: Ledger) -> None:
    big = ledger.submit(needs=Needs(memory_bytes=8 << 30))
    small = ledger.submit(needs=Needs(memory_bytes=1 << 30))
    on_gpus = ledger.submit(needs=Needs(gpus=2))
    first = ledger.claim(memory_bytes=2 << 30, gpus=(0,))
    assert first is not None
    assert first.job.id == small.id
    second = ledger.claim(slots=0, gpus=(1, 3, 4))
    assert second is not None
    assert second.job.id == on_gpus.id
    assert second.gpus == (1, 3)
    assert ledger.claim(slots=0) is None
    third = ledger.claim()
    assert third is not None
    assert third.job.id == big.id


def test_devices_have_one_holder_whatever_the_worker_says(ledger: Ledger) -> None:
    jobs_made = [ledger.submit(needs=Needs(gpus=1)) for _ in range(3)]
    gpus = [claimed.gpus for _ in range(3) if (claimed := ledger.claim(gpus=(0, 1), max_gpus=2))]
    assert gpus == [(0,), (1,)]
    ledger.finish(jobs_made[0].id, 1, succeeded())
    again = ledger.claim(gpus=(0, 1))
    assert again is not None
    assert again.gpus == (0,)


def test_slots_and_memory_that_are_reserved_are_not_given_twice(ledger: Ledger) -> None:
    for _ in range(3):
        ledger.submit(needs=Needs(memory_bytes=3 << 30))
    size: dict[str, Any] = {
        "slots": 8,
        "max_slots": 8,
        "memory_bytes": 7 << 30,
        "max_memory_bytes": 7 << 30,
    }
    assert [ledger.claim(**size) is not None for _ in range(3)] == [True, True, False]
    assert ledger.claim("w2", slots=1, max_slots=1) is not None


def test_a_need_that_no_known_worker_meets_is_known(ledger: Ledger) -> None:
    needs = Needs(memory_bytes=1 << 40)
    assert not ledger.store.read(lambda tx: jobs.unfit(tx, needs))
    ledger.claim()
    assert ledger.store.read(lambda tx: jobs.unfit(tx, needs))
    assert ledger.store.read(lambda tx: jobs.unfit(tx, Needs(gpus=1)))
    assert not ledger.store.read(lambda tx: jobs.unfit(tx, Needs(memory_bytes=1 << 20)))
    ledger.clock.pass_by(1000)
    assert not ledger.store.read(lambda tx: jobs.unfit(tx, needs))


def test_a_token_opens_its_own_attempt_only(ledger: Ledger) -> None:
    ledger.submit()
    ledger.submit()
    one, two = ledger.claim(), ledger.claim()
    assert one is not None
    assert two is not None
    ledger.store.read(lambda tx: jobs.check_token(tx, one.job.id, 1, one.token))
    for job_id, fence, token in [
        (one.job.id, 1, two.token),
        (one.job.id, 2, one.token),
        (one.job.id, 1, ""),
        ("00000000", 1, one.token),
        (one.job.id, 1, "토큰"),
    ]:
        with pytest.raises(AuthenticationError):
            ledger.store.read(partial(jobs.check_token, job_id=job_id, fence=fence, token=token))


# starting → running → running


def test_a_beat_extends_the_lease_and_starts_the_job(ledger: Ledger) -> None:
    job = ledger.submit()
    ledger.claim()
    ledger.clock.pass_by(50)
    orders = ledger.beat(job.id, 1)
    assert orders.stop is None
    running = ledger.get(job.id)
    assert running.state is JobState.RUNNING
    assert running.lease_until == ledger.clock.now + LEASE
    assert running.started_at == ledger.clock.now
    ledger.beat(job.id, 1)
    assert ledger.words(job.id) == ["queued", "claimed", "running"]


def test_a_beat_of_another_worker_or_fence_is_refused(ledger: Ledger) -> None:
    job = ledger.start()
    for fence, worker_id in [(0, "w1"), (2, "w1"), (1, "w2")]:
        with pytest.raises(FencedError):
            ledger.beat(job.id, fence, worker_id)


def test_a_checkpoint_asked_for_is_ordered_until_one_came(ledger: Ledger) -> None:
    job = ledger.start()
    ledger.write(lambda tx: jobs.request_checkpoint(tx, job.id))
    assert ledger.beat(job.id, 1).should_checkpoint
    assert ledger.beat(job.id, 1).should_checkpoint
    ledger.say(job.id, 1, started(), checkpointed(2))
    assert not ledger.beat(job.id, 1).should_checkpoint


# lapse, reattach, another attempt


def test_a_lapsed_job_waits_again_and_the_next_attempt_owns_it(ledger: Ledger) -> None:
    job = ledger.start()
    ledger.clock.pass_by(LEASE - 1)
    assert ledger.reap() == []
    ledger.clock.pass_by(2)
    assert [one.id for one in ledger.reap()] == [job.id]
    lapsed = ledger.get(job.id)
    assert (lapsed.state, lapsed.requeue_reason, lapsed.lapses) == (JobState.QUEUED, "lapse", 1)
    assert ledger.claim("w2") is None
    ledger.clock.pass_by(1.1)
    claimed = ledger.claim("w2")
    assert claimed is not None
    assert claimed.fence == 2
    with pytest.raises(FencedError):
        ledger.beat(job.id, 1)
    with pytest.raises(FencedError):
        ledger.say(job.id, 1, started())
    with pytest.raises(FencedError):
        ledger.finish(job.id, 1, succeeded())
    assert ledger.get(job.id).worker_id == "w2"
    check_history(ledger, job.id)


def test_a_worker_that_comes_back_before_another_claim_goes_on(ledger: Ledger) -> None:
    job = ledger.start(needs=Needs(memory_bytes=1 << 30))
    ledger.clock.pass_by(LEASE + 1)
    ledger.reap()
    ledger.clock.pass_by(100)
    ledger.beat(job.id, 1)
    back = ledger.get(job.id)
    assert (back.state, back.fence, back.attempts) == (JobState.RUNNING, 1, 1)
    assert ledger.claim("w2") is None
    assert ledger.finish(job.id, 1, succeeded()).state is JobState.SUCCEEDED
    assert "reattached" in ledger.words(job.id)
    check_history(ledger, job.id)


def test_a_worker_that_comes_back_is_refused_where_its_memory_was_given_away(
    ledger: Ledger,
) -> None:
    large = Needs(memory_bytes=9 << 30)
    back = ledger.start(needs=large)
    ledger.clock.pass_by(LEASE + 1)
    ledger.reap()
    other = ledger.submit(needs=large, priority=5)
    claimed = ledger.claim()
    assert claimed is not None
    assert claimed.job.id == other.id
    with pytest.raises(FencedError):
        ledger.beat(back.id, 1)
    assert ledger.get(back.id).state is JobState.QUEUED
    ledger.beat(other.id, 1)
    ledger.finish(other.id, 1, succeeded())
    ledger.beat(back.id, 1)
    assert ledger.get(back.id).state is JobState.RUNNING
    check_history(ledger, back.id)


def test_a_receipt_that_comes_after_the_lapse_counts(ledger: Ledger) -> None:
    job = ledger.start()
    ledger.clock.pass_by(LEASE + 1)
    ledger.reap()
    assert ledger.finish(job.id, 1, succeeded()).state is JobState.SUCCEEDED
    assert ledger.claim() is None
    check_history(ledger, job.id)


def test_after_three_lapses_without_a_checkpoint_a_job_fails(ledger: Ledger) -> None:
    job = ledger.submit()
    for fence in (1, 2, 3):
        ledger.clock.pass_by(100)
        claimed = ledger.claim()
        assert claimed is not None
        assert claimed.fence == fence
        ledger.clock.pass_by(LEASE + 1)
        ledger.reap()
    lost = ledger.get(job.id)
    assert lost.state is JobState.FAILED
    assert lost.failure_class is FailureClass.INFRA_LOST
    assert lost.hint
    check_history(ledger, job.id)


def test_a_new_checkpoint_makes_earlier_lapses_forgotten(ledger: Ledger) -> None:
    job = ledger.submit()
    for fence in range(1, 7):
        ledger.clock.pass_by(1000)
        assert ledger.claim() is not None
        ledger.say(job.id, fence, started(), checkpointed(fence, fence))
        ledger.clock.pass_by(LEASE + 1)
        ledger.reap()
    assert ledger.get(job.id).state is JobState.QUEUED
    ledger.clock.pass_by(1000)
    claimed = ledger.claim()
    assert claimed is not None
    assert [row.step for row in claimed.checkpoints] == [6, 5, 4, 3, 2, 1]


def test_an_old_checkpoint_said_again_forgets_no_lapse(ledger: Ledger) -> None:
    job = ledger.submit()
    for fence in (1, 2, 3, 4):
        ledger.clock.pass_by(1000)
        if ledger.claim() is None:
            break
        ledger.say(job.id, fence, started(), checkpointed(5, fence))
        ledger.clock.pass_by(LEASE + 1)
        ledger.reap()
    assert ledger.get(job.id).state is JobState.FAILED


def test_the_wait_after_a_lapse_doubles(ledger: Ledger) -> None:
    job = ledger.submit()
    waits = []
    for _ in range(4):
        ledger.clock.pass_by(1000)
        assert ledger.claim() is not None
        ledger.clock.pass_by(LEASE + 1)
        ledger.reap(max_lapses=9)
        waits.append(ledger.get(job.id).not_before - ledger.clock.now)
    assert waits == [1, 2, 4, 8]


def test_an_api_that_was_away_gives_leases_time(ledger: Ledger) -> None:
    job = ledger.start()
    ledger.clock.pass_by(10_000)
    assert ledger.write(lambda tx: jobs.grant_grace(tx, LEASE)) == 1
    assert ledger.reap() == []
    assert ledger.beat(job.id, 1).lease_seconds == LEASE


def test_a_worker_that_started_anew_gives_up_what_it_no_longer_holds(ledger: Ledger) -> None:
    held, lost, other = ledger.submit(), ledger.submit(), ledger.submit()
    ledger.claim()
    ledger.claim()
    ledger.claim("w2")
    taken = ledger.write(lambda tx: jobs.forget_boot(tx, "w1", {(held.id, 1), (lost.id, 7)}))
    assert [(job.id, job.state) for job in taken] == [(lost.id, JobState.QUEUED)]
    states = [ledger.get(job.id).state for job in (held, other)]
    assert states == [JobState.STARTING, JobState.STARTING]


def test_an_idle_worker_writes_only_now_and_then(ledger: Ledger) -> None:
    ask = new_ask()
    look = partial(jobs.may_claim, ask=ask)
    assert ledger.store.read(look)
    assert ledger.write(lambda tx: jobs.claim(tx, ask, lease_seconds=LEASE)) is None
    assert not ledger.store.read(look)
    job = ledger.submit()
    assert ledger.store.read(look)
    ledger.stop(job.id)
    assert not ledger.store.read(look)
    ledger.clock.pass_by(16)
    assert ledger.store.read(look)


# the user's stop


@pytest.mark.parametrize("mode", [StopMode.CANCEL, StopMode.FORCE])
def test_a_waiting_job_is_cancelled_at_once_and_never_starts(
    ledger: Ledger, mode: StopMode
) -> None:
    job = ledger.submit()
    assert ledger.stop(job.id, mode).state is JobState.CANCELLED
    assert ledger.claim() is None
    check_history(ledger, job.id)


def test_a_running_job_is_asked_to_stop_with_a_deadline(ledger: Ledger) -> None:
    job = ledger.start()
    stopping = ledger.stop(job.id, grace_seconds=30)
    assert (stopping.state, stopping.stop_mode) == (JobState.STOPPING, StopMode.CANCEL)
    ledger.clock.pass_by(10)
    orders = ledger.beat(job.id, 1)
    assert (orders.stop, orders.stop_in_seconds) == (StopMode.CANCEL, 20)
    assert ledger.finish(job.id, 1, STOPPED).state is JobState.CANCELLED
    check_history(ledger, job.id)


def test_a_stop_asked_for_again_changes_nothing_unless_it_is_stronger(ledger: Ledger) -> None:
    job = ledger.start()
    once = ledger.stop(job.id)
    ledger.clock.pass_by(5)
    assert ledger.stop(job.id) == once
    forced = ledger.stop(job.id, StopMode.FORCE)
    assert (forced.stop_mode, forced.stop_deadline) == (StopMode.FORCE, ledger.clock.now)
    assert ledger.stop(job.id) == forced
    assert ledger.words(job.id).count("stopping") == 2


def test_a_job_that_has_ended_is_not_stopped(ledger: Ledger) -> None:
    job = ledger.start()
    ended = ledger.finish(job.id, 1, succeeded())
    with pytest.raises(ConflictError, match="succeeded"):
        ledger.stop(job.id)
    assert ledger.get(job.id) == ended


def test_a_cancel_that_was_acknowledged_stays_one(ledger: Ledger) -> None:
    job = ledger.start()
    ledger.stop(job.id)

    def never(job: Job) -> str:
        raise AssertionError("promoted")

    assert ledger.finish(job.id, 1, succeeded(), promote=never).state is JobState.CANCELLED
    kept = ledger.store.read(lambda tx: events.checkpoints(tx, job.id))
    assert [(row.step, row.path) for row in kept] == [(10, "/ws/artifact")]
    assert ledger.get(job.id).artifact is None


def test_a_paused_job_frees_its_devices_and_goes_on_when_asked(ledger: Ledger) -> None:
    job = ledger.start(needs=Needs(gpus=0, memory_bytes=5))
    ledger.stop(job.id, StopMode.PAUSE)
    assert ledger.finish(job.id, 1, STOPPED).state is JobState.PAUSED
    assert ledger.claim() is None
    assert ledger.stop(job.id, StopMode.PAUSE).state is JobState.PAUSED
    ledger.write(lambda tx: jobs.resume(tx, job.id))
    claimed = ledger.claim()
    assert claimed is not None
    assert claimed.fence == 2
    assert ledger.words(job.id)[-4:] == ["stopping", "paused", "resumed", "claimed"]
    with pytest.raises(ConflictError, match="not paused"):
        ledger.write(lambda tx: jobs.resume(tx, job.id))


def test_a_paused_job_can_be_cancelled_and_a_waiting_one_paused(ledger: Ledger) -> None:
    job = ledger.submit()
    assert ledger.stop(job.id, StopMode.PAUSE).state is JobState.PAUSED
    assert ledger.stop(job.id).state is JobState.CANCELLED
    check_history(ledger, job.id)


def test_a_pause_becomes_a_cancel_but_not_the_other_way(ledger: Ledger) -> None:
    job = ledger.start()
    ledger.stop(job.id, StopMode.PAUSE)
    assert ledger.stop(job.id, StopMode.CANCEL).stop_mode is StopMode.CANCEL
    with pytest.raises(ConflictError, match="cancelled"):
        ledger.stop(job.id, StopMode.PAUSE)


def test_a_job_that_finished_while_it_was_to_pause_has_succeeded(ledger: Ledger) -> None:
    job = ledger.start()
    ledger.stop(job.id, StopMode.PAUSE)
    assert ledger.finish(job.id, 1, succeeded()).state is JobState.SUCCEEDED


@pytest.mark.parametrize(
    ("mode", "state"),
    [(StopMode.CANCEL, JobState.CANCELLED), (StopMode.PAUSE, JobState.PAUSED)],
)
def test_a_stopping_job_whose_worker_is_gone_is_ended_not_run_again(
    ledger: Ledger, mode: StopMode, state: JobState
) -> None:
    job = ledger.start()
    ledger.stop(job.id, mode)
    ledger.clock.pass_by(LEASE + 1)
    ledger.reap()
    assert ledger.get(job.id).state is state
    with pytest.raises(FencedError):
        ledger.beat(job.id, 1)
    check_history(ledger, job.id)


def test_a_job_that_should_have_stopped_long_ago_is_taken_from_its_worker(
    ledger: Ledger,
) -> None:
    job = ledger.start()
    ledger.stop(job.id, StopMode.FORCE)
    for _ in range(3):
        ledger.clock.pass_by(25)
        ledger.beat(job.id, 1)
    assert ledger.reap() != []
    assert ledger.get(job.id).state is JobState.CANCELLED


# the worker's end


def test_success_is_promoted_under_the_fence_and_only_once(ledger: Ledger) -> None:
    promoted: list[str] = []

    def promote(job: Job) -> str:
        promoted.append(job.id)
        return job.output_dir

    job = ledger.start()
    ended = [ledger.finish(job.id, 1, succeeded(), promote=promote) for _ in range(3)]
    assert ended[0].state is JobState.SUCCEEDED
    assert ended[0].artifact == job.output_dir
    assert ended[0] == ended[1] == ended[2]
    assert promoted == [job.id]
    check_history(ledger, job.id)


def test_a_promotion_that_fails_leaves_the_job_as_it_was(ledger: Ledger) -> None:
    def refuse(job: Job) -> str:
        raise ConflictError("occupied")

    job = ledger.start()
    with pytest.raises(ConflictError, match="occupied"):
        ledger.finish(job.id, 1, succeeded(), promote=refuse)
    assert ledger.get(job.id).state is JobState.RUNNING
    assert ledger.words(job.id)[-1] == "running"
    assert ledger.finish(job.id, 1, succeeded()).state is JobState.SUCCEEDED


def test_another_outcome_of_an_attempt_that_ended_is_refused(ledger: Ledger) -> None:
    job = ledger.start()
    ledger.finish(job.id, 1, succeeded())
    with pytest.raises(FencedError):
        ledger.finish(job.id, 1, failed())
    assert ledger.get(job.id).state is JobState.SUCCEEDED


def test_success_without_an_artifact_is_a_failure(ledger: Ledger) -> None:
    job = ledger.start()
    ended = ledger.finish(job.id, 1, Outcome(kind="succeeded"))
    assert (ended.state, ended.failure_class) == (JobState.FAILED, FailureClass.NO_ARTIFACT)


def test_a_trainer_that_stopped_unasked_goes_on_elsewhere_at_once(ledger: Ledger) -> None:
    job = ledger.start()
    waiting = ledger.finish(job.id, 1, STOPPED)
    assert (waiting.state, waiting.lapses) == (JobState.QUEUED, 0)
    with pytest.raises(FencedError):
        ledger.beat(job.id, 1)
    claimed = ledger.claim("w2")
    assert claimed is not None
    assert claimed.fence == 2


def test_a_job_whose_host_ran_out_of_memory_is_tried_once_more(ledger: Ledger) -> None:
    """Whatever else happened between: a neighbour may have taken the memory, once."""
    job = ledger.submit()
    for fence, failure in enumerate((FailureClass.OOM_HOST, FailureClass.SIGNAL), 1):
        ledger.claim()
        assert ledger.finish(job.id, fence, failed(failure)).state is JobState.QUEUED
        ledger.clock.pass_by(600)
    ledger.claim()
    ended = ledger.finish(job.id, 3, failed(FailureClass.OOM_HOST), max_lapses=9)
    assert ended.state is JobState.FAILED
    assert ended.failure_class is FailureClass.OOM_HOST
    check_history(ledger, job.id)


def test_memory_that_runs_out_at_the_last_try_is_the_end(ledger: Ledger) -> None:
    """One more try is granted, but not beyond those that any job has."""
    job = ledger.submit()
    for fence, failure in enumerate((FailureClass.SIGNAL, FailureClass.OOM_HOST), 1):
        ledger.claim()
        ended = ledger.finish(job.id, fence, failed(failure), max_lapses=2)
        ledger.clock.pass_by(600)
    assert (ended.state, ended.failure_class) == (JobState.FAILED, FailureClass.OOM_HOST)


def test_a_job_that_kills_every_attempt_is_given_up_in_words(ledger: Ledger) -> None:
    job = ledger.submit()
    for fence in (1, 2, 3):
        ledger.claim()
        ended = ledger.finish(job.id, fence, failed(FailureClass.SIGNAL))
        ledger.clock.pass_by(600)
    assert ended.state is JobState.FAILED
    assert ended.attempts == 3
    assert ended.failure_class is FailureClass.SIGNAL
    assert ended.error is not None
    assert ended.error.startswith("💥 실패 (3 attempts in a row failed without a new checkpoint")


@pytest.mark.parametrize("failure", list(FailureClass))
def test_only_failures_worth_it_are_tried_again(ledger: Ledger, failure: FailureClass) -> None:
    job = ledger.submit()
    ledger.claim()
    ended = ledger.finish(job.id, 1, failed(failure))
    is_tried_again = failure.is_retryable or failure is FailureClass.OOM_HOST
    assert (ended.state is JobState.QUEUED) == is_tried_again
    if not is_tried_again:
        assert ended.failure_class is failure
        assert ended.error == "💥 실패"
        assert ended.hint == failure.hint
    check_history(ledger, job.id)


def test_a_success_that_comes_after_the_job_s_end_is_fenced(ledger: Ledger) -> None:
    """What an ended job's attempt made is not even looked at: it is promoted nowhere."""
    job = ledger.start()
    ledger.stop(job.id)
    ledger.clock.pass_by(600)
    [ended] = ledger.reap()
    assert ended.state is JobState.CANCELLED
    with pytest.raises(FencedError):
        ledger.finish(job.id, 1, succeeded(), promote=None)
    assert ledger.get(job.id) == ended


def test_the_next_lapse_is_known_before_it_comes(ledger: Ledger) -> None:
    assert ledger.store.read(endings.next_lapse) == math.inf
    first = ledger.start()
    ledger.clock.pass_by(20)
    ledger.start()
    assert ledger.store.read(endings.next_lapse) == pytest.approx(LEASE - 20)
    ledger.beat(first.id, 1)
    assert ledger.store.read(endings.next_lapse) == pytest.approx(LEASE)
    ledger.clock.pass_by(LEASE + 1)
    assert ledger.store.read(endings.next_lapse) == math.inf  # what has lapsed is reaped at once


def test_retries_end(ledger: Ledger) -> None:
    job = ledger.submit()
    for fence in (1, 2, 3):
        ledger.clock.pass_by(1000)
        assert ledger.claim() is not None
        ledger.finish(job.id, fence, failed(FailureClass.SIGNAL))
    assert ledger.get(job.id).state is JobState.FAILED
    assert ledger.get(job.id).attempts == 3


def test_a_finish_recorded_for_an_earlier_attempt_is_repeated_without_effect(
    ledger: Ledger,
) -> None:
    job = ledger.start()
    ledger.finish(job.id, 1, failed())
    ledger.clock.pass_by(10)
    ledger.claim("w2")
    assert ledger.finish(job.id, 1, failed()).fence == 2
    assert ledger.get(job.id).state is JobState.STARTING


def test_a_job_can_fail_before_it_is_claimed(ledger: Ledger) -> None:
    job = ledger.submit(is_validated=False)
    ended = ledger.write(
        lambda tx: jobs.fail_queued(tx, job.id, FailureClass.DATA_ERROR, "line 3: 틀림")
    )
    assert (ended.state, ended.failure_class) == (JobState.FAILED, FailureClass.DATA_ERROR)
    running = ledger.start()
    left = ledger.write(
        lambda tx: jobs.fail_queued(tx, running.id, FailureClass.DATA_ERROR, "late")
    )
    assert left.state is JobState.RUNNING


def test_every_end_gives_its_place_in_the_quota_back(ledger: Ledger) -> None:
    def end_all() -> None:
        one = ledger.start()
        ledger.finish(one.id, 1, succeeded())
        ledger.stop(ledger.submit().id)
        two = ledger.start()
        ledger.finish(two.id, 1, failed(FailureClass.USER_ERROR))
        three = ledger.start()
        ledger.stop(three.id)
        ledger.clock.pass_by(LEASE + 1)
        ledger.reap()

    end_all()
    end_all()
    ledger.submit(max_unfinished=1)
    with pytest.raises(RateLimitError):
        ledger.submit(max_unfinished=1)


# what a trainer says


def test_events_change_the_row_and_are_told_in_order(ledger: Ledger) -> None:
    job = ledger.submit()
    ledger.claim()
    said = [started(), step(1), step(2), {"type": "evaluated", "step": 2, "metrics": {"정확도": 1}}]
    assert ledger.say(job.id, 1, *said) == 4
    row = ledger.get(job.id)
    assert (row.state, row.step, row.total_steps) == (JobState.RUNNING, 2, 10)
    assert row.progress == 0.2
    assert row.plan is not None
    assert row.metrics["loss"] == 1.0
    assert row.metrics["정확도"] == 1
    assert row.eta_seconds == 8.0
    words = ["queued", "claimed", "started", "running", "step", "step", "evaluated"]
    assert ledger.words(job.id) == words
    check_history(ledger, job.id)


def test_a_batch_sent_twice_is_stored_once(ledger: Ledger) -> None:
    job = ledger.start()
    assert ledger.say(job.id, 1, started(), step(1)) == 2
    assert ledger.say(job.id, 1, started(), step(1), step(2)) == 3
    assert ledger.words(job.id)[3:] == ["started", "step", "step"]
    assert ledger.beat(job.id, 1).accepted_n == 3


def test_nothing_is_taken_behind_a_gap(ledger: Ledger) -> None:
    job = ledger.start()
    assert ledger.say(job.id, 1, started()) == 1
    assert ledger.say(job.id, 1, step(3), first_n=3) == 1
    assert ledger.say(job.id, 1, step(2), step(3), first_n=2) == 3


def test_the_first_plan_stays(ledger: Ledger) -> None:
    job = ledger.start()
    ledger.say(job.id, 1, started(plan={"threads": 2}))
    ledger.finish(job.id, 1, failed())
    ledger.clock.pass_by(10)
    claimed = ledger.claim()
    assert claimed is not None
    assert claimed.job.plan is not None
    ledger.say(job.id, 2, started(plan={"threads": 4}))
    plan = ledger.get(job.id).plan
    assert plan is not None
    assert plan.threads == 2


def test_a_plan_that_memory_changed_is_the_next_attempts(ledger: Ledger) -> None:
    job = ledger.start()
    ledger.say(job.id, 1, started(), {"type": "replanned", "plan": {**PLAN, "threads": 3}})
    with pytest.raises(FencedError):
        ledger.say(job.id, 0, {"type": "replanned", "plan": PLAN})
    ledger.finish(job.id, 1, failed())
    ledger.clock.pass_by(10)
    claimed = ledger.claim()
    assert claimed is not None
    assert claimed.job.plan == Plan.model_validate({**PLAN, "threads": 3})


@pytest.mark.parametrize(
    "nonsense",
    [
        {},
        {"type": "unknown"},
        {"type": "step", "step": -1},
        {"type": ["step"]},
        {"type": "notice", "code": "x", "message": "y" * 5000},
        {"type": "notice", "code": "x", "message": "y", "detail": {"z": "很" * 40_000}},
    ],
)
def test_nonsense_becomes_a_notice_and_holds_nothing_up(
    ledger: Ledger, nonsense: dict[str, Any]
) -> None:
    job = ledger.start()
    assert ledger.say(job.id, 1, started(), nonsense, step(1)) == 3
    notice = ledger.events(job.id)[-2]
    assert notice.type == "notice"
    assert notice.data["code"] == "bad_event"
    assert ledger.get(job.id).step == 1


def test_events_are_paged_by_number(ledger: Ledger) -> None:
    job = ledger.start()
    ledger.say(job.id, 1, started(), *[step(number) for number in range(1, 11)])
    page = ledger.store.read(lambda tx: events.after(tx, job.id, 5, 4))
    assert [event.seq for event in page] == [6, 7, 8, 9]


def test_a_stop_order_wakes_whoever_watches(ledger: Ledger) -> None:
    woken: list[frozenset[str]] = []
    job = ledger.start()
    ledger.store.on_commit(woken.append)
    ledger.stop(job.id)
    ledger.write(lambda tx: None)
    assert woken == [frozenset({f"job:{job.id}", "queue"})]


def test_the_checkpoint_of_a_refused_attempt_is_not_listed(ledger: Ledger) -> None:
    job = ledger.start()
    ledger.finish(job.id, 1, failed())
    with pytest.raises(FencedError):
        ledger.say(job.id, 1, started(), checkpointed(9))
    assert ledger.store.read(lambda tx: events.checkpoints(tx, job.id)) == []


ESTIMATE = Estimate(
    parameters=10,
    trainable_parameters=5,
    rows=3,
    samples=3,
    steps=2,
    tokens=1 << 40,
    label_tokens=7,
    longest_sample_tokens=9,
    is_exact=True,
    seconds=1.5,
    seconds_from="guess",
    peak_memory_bytes=1 << 60,
    checkpoint_bytes=60,
    disk_bytes=100,
)


def test_what_was_asked_for_comes_back_unchanged(ledger: Ledger) -> None:
    new = new_job(
        request={"learning_rate": 2e-5, "深": {"입": ["🙂", None, True]}},
        eval_dataset={"name": "e", "path": "/ws/e", "sha256": SHA},
        retry_of="0123abcd",
        resume_from="/ws/체크포인트",
        estimate=ESTIMATE,
        warnings=("2 rows say what others say 🙂",),
    )
    job = ledger.submit(**dict(new))
    for name in type(new).model_fields:
        if name not in ("output_dir", "estimate", "warnings"):
            assert getattr(ledger.get(job.id), name) == getattr(new, name)
    [first] = ledger.store.read(lambda tx: events.after(tx, job.id))
    told = {"estimate": ESTIMATE.model_dump(mode="json"), "warnings": list(new.warnings)}
    assert first.data == told

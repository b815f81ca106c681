"""Many hands at once: one attempt a job, one end a job."""

import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from store_fixtures import LEASE, Ledger, new_ask, succeeded
from tunesmith.errors import ConflictError, FencedError
from tunesmith.spec.records import Job, JobState, StopMode
from tunesmith.store import jobs


def in_threads(number: int, work: Callable[[int], None]) -> None:
    gate = threading.Barrier(number)
    failures: list[BaseException] = []

    def run(which: int) -> None:
        gate.wait()
        try:
            work(which)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(which,)) for which in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_fifty_claimers_never_take_the_same_job(ledger: Ledger) -> None:
    made = {ledger.submit().id for _ in range(200)}
    taken: list[str] = []

    def claim_all(which: int) -> None:
        for number in range(1000):
            ask = new_ask(f"w{which}", f"{which}-{number}")
            claimed = ledger.write(partial(jobs.claim, ask=ask, lease_seconds=LEASE))
            if claimed is None:
                return
            taken.append(claimed.job.id)

    in_threads(50, claim_all)
    assert sorted(taken) == sorted(made)
    found = ledger.store.read(jobs.list_jobs)
    assert {(job.attempts, job.fence, job.state) for job in found} == {(1, 1, JobState.STARTING)}


def test_a_cancel_and_a_finish_at_once_make_one_end(ledger: Ledger) -> None:
    chance = random.Random(7)
    for _ in range(100):
        job = ledger.start()
        promoted: list[str] = []

        def promote(job: Job, promoted: list[str] = promoted) -> str:
            promoted.append(job.id)
            return job.output_dir

        acts: list[Callable[[Any], Job]] = [
            partial(jobs.request_stop, job_id=job.id, mode=StopMode.CANCEL, grace_seconds=30),
            partial(jobs.finish, job_id=job.id, fence=1, outcome=succeeded(), promote=promote),
        ]
        chance.shuffle(acts)
        futures: list[Future[Job]] = [ledger.store.write(act) for act in acts]
        answers = [future.exception(timeout=60) for future in futures]
        ended = ledger.get(job.id)
        assert ended.state.is_final
        assert (ended.state is JobState.SUCCEEDED) == bool(promoted)
        assert all(one is None or isinstance(one, ConflictError) for one in answers)
        words = ledger.words(job.id)
        assert sum(words.count(word) for word in ("succeeded", "cancelled")) == 1


def test_a_cancel_and_a_claim_at_once_never_leave_a_cancelled_job_running(
    ledger: Ledger,
) -> None:
    made = [ledger.submit() for _ in range(60)]

    def act(which: int) -> None:
        for number, job in enumerate(made):
            if which:
                ask = new_ask("w1", f"c{number}")
                ledger.write(partial(jobs.claim, ask=ask, lease_seconds=LEASE))
            else:
                ledger.stop(job.id)

    in_threads(2, act)
    for job in made:
        now = ledger.get(job.id)
        assert (now.state, now.attempts) in [(JobState.CANCELLED, 0), (JobState.STOPPING, 1)]


def test_the_same_finish_from_many_threads_is_recorded_once(ledger: Ledger) -> None:
    job = ledger.start()
    answers: list[Job] = []
    in_threads(16, lambda which: answers.append(ledger.finish(job.id, 1, succeeded())))
    assert len({answer.finished_at for answer in answers}) == 1
    assert ledger.words(job.id).count("succeeded") == 1


def test_a_beat_and_the_reaper_at_once_agree(ledger: Ledger) -> None:
    for _ in range(30):
        job = ledger.start()
        ledger.clock.pass_by(LEASE + 1)
        reaped = ledger.store.write(lambda tx: jobs.reap(tx))
        beat = ledger.store.write(
            partial(jobs.heartbeat, job_id=job.id, fence=1, worker_id="w1", lease_seconds=LEASE)
        )
        assert not isinstance(beat.exception(timeout=60), FencedError)
        reaped.result(timeout=60)
        assert ledger.get(job.id).state is JobState.RUNNING
        ledger.finish(job.id, 1, succeeded())


def test_submissions_at_once_keep_to_the_limit_and_have_ids_of_their_own(ledger: Ledger) -> None:
    made: list[str] = []
    refused: list[Exception] = []

    def submit_some(which: int) -> None:
        for _ in range(10):
            try:
                job = ledger.submit(max_unfinished=100)
                made.append(job.id)
            except Exception as error:
                refused.append(error)

    in_threads(16, submit_some)
    assert len(made) == len(set(made)) == 100
    assert len(refused) == 60

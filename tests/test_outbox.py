"""Messages owed: written with the state that they tell of, given out in order, never lost."""

import random
from typing import Any

import pytest
from sqlalchemy import event, text, update

from store_fixtures import LEASE, Ledger, failed, new_ask, succeeded
from tunesmith.errors import BadRequestError, ConflictError, FencedError, NotFoundError
from tunesmith.spec.records import Job, Outcome, StopMode
from tunesmith.store import jobs, outbox, rows, webhooks
from tunesmith.store.outbox import GIVE_UP_SECONDS, TYPES, Message
from tunesmith.store.tables import events
from tunesmith.store.tables import outbox as messages
from tunesmith.store.webhooks import Delivery, Endpoint

OWNER = "소유자"
ALL = list(TYPES.values())
ME, OTHER = "server-a", "server-b"


def listen(
    ledger: Ledger, *types: str, owner: str = OWNER, url: str = "http://낚시.kr/"
) -> Endpoint:
    return ledger.write(lambda tx: webhooks.make(tx, owner, "이름 🎣", url, types or ALL))


def claim(ledger: Ledger, endpoint: Endpoint, holder: str = ME, count: int = 10) -> list[Message]:
    return ledger.write(lambda tx: outbox.claim(tx, endpoint.id, holder, count, LEASE))


def take(ledger: Ledger, message: Message, holder: str = ME) -> bool:
    return ledger.write(lambda tx: outbox.record_taken(tx, message, holder, 200))


def miss(ledger: Ledger, message: Message, wait: float = 8.0, holder: str = ME) -> bool:
    return ledger.write(lambda tx: outbox.postpone(tx, message, holder, wait, 500, "no 🎣"))


def deliveries(ledger: Ledger, endpoint: Endpoint) -> list[Delivery]:
    """Oldest first."""
    found, _ = ledger.store.read(lambda tx: webhooks.deliveries(tx, endpoint.id, None, None, 100))
    return found[::-1]


def pass_by(ledger: Ledger, seconds: float) -> None:
    """On PostgreSQL the clock can't be moved, so the rows are."""
    dates = ("due_at", "give_up_at", "done_at", "created_at")
    values: Any = {name: messages.c[name] - seconds for name in dates}
    ledger.write(lambda tx: tx.execute(update(messages).values(values)))


def paused_then_cancelled(ledger: Ledger) -> Job:
    job = ledger.submit()
    ledger.stop(job.id, StopMode.PAUSE)
    return ledger.stop(job.id)


def id_of(job: Job, seq: int) -> str:
    return f"evt_{job.id}{seq:08x}"


# what is owed


def test_every_final_state_and_a_pause_are_told_to_who_listens(ledger: Ledger) -> None:
    everything, only_failures = listen(ledger), listen(ledger, "fine_tuning.job.failed")
    strangers = listen(ledger, owner="다른 이")
    done, broken = ledger.start(), ledger.start()
    ledger.finish(done.id, 1, succeeded())
    ledger.finish(broken.id, 1, failed(), max_lapses=1)
    waiting = paused_then_cancelled(ledger)
    told = [(one.event_type, one.job_id) for one in deliveries(ledger, everything)]
    assert told == [
        ("fine_tuning.job.succeeded", done.id),
        ("fine_tuning.job.failed", broken.id),
        ("fine_tuning.job.paused", waiting.id),
        ("fine_tuning.job.cancelled", waiting.id),
    ]
    assert [one.job_id for one in deliveries(ledger, only_failures)] == [broken.id]
    assert deliveries(ledger, strangers) == []


def test_a_change_that_is_refused_owes_nothing(ledger: Ledger) -> None:
    endpoint = listen(ledger)
    job = ledger.start()
    with pytest.raises(FencedError):
        ledger.finish(job.id, 7, succeeded())

    def unlucky(tx: Any) -> None:
        jobs.finish(tx, job.id, 1, succeeded(), promote=lambda job: job.output_dir)
        raise ConflictError("the disk said no")

    with pytest.raises(ConflictError):
        ledger.write(unlucky)
    assert deliveries(ledger, endpoint) == []
    for _ in range(2):
        ledger.finish(job.id, 1, succeeded())
    assert len(deliveries(ledger, endpoint)) == 1


def test_an_attempt_that_is_tried_again_owes_nothing(ledger: Ledger) -> None:
    endpoint = listen(ledger)
    job = ledger.start()
    ledger.finish(job.id, 1, Outcome(kind="stopped"))
    assert deliveries(ledger, endpoint) == []


def test_what_is_owed_is_what_happened_over_a_random_history(ledger: Ledger) -> None:
    endpoint = listen(ledger)
    chance = random.Random(7)
    live = [ledger.submit().id for _ in range(6)]
    for _ in range(60):
        job = ledger.get(chance.choice(live))
        if job.state.is_final:
            continue
        random_step(ledger, job, chance)
    query = events.select().where(events.c.type.in_(list(TYPES)))
    happened = ledger.store.read(lambda tx: tx.execute(query).mappings().all())
    ids = {f"evt_{row['job_id']}{row['seq']:08x}" for row in happened}
    assert len(ids) > 5
    assert {one.id for one in deliveries(ledger, endpoint)} == ids


def random_step(ledger: Ledger, job: Job, chance: random.Random) -> None:
    match job.state.value:
        case "paused":
            ledger.write(lambda tx: jobs.resume(tx, job.id))
        case "queued":
            if chance.random() < 0.3:
                ledger.stop(job.id, chance.choice([StopMode.PAUSE, StopMode.CANCEL]))
            else:
                ledger.claim()
        case "starting" | "running":
            ended = chance.choice([succeeded(), failed(), None])
            if ended is None:
                ledger.stop(job.id, StopMode.PAUSE)
            else:
                ledger.finish(job.id, job.fence, ended)
        case _:
            ledger.finish(job.id, job.fence, Outcome(kind="stopped"))


def test_a_job_s_end_costs_one_look_where_nobody_listens(ledger: Ledger) -> None:
    listen(ledger, owner="다른 이")
    job = ledger.submit()
    asked: list[str] = []

    def note(*statement: Any) -> None:
        asked.append(statement[2])

    def work(tx: Any) -> None:
        event.listen(tx, "before_cursor_execute", note)
        try:
            row = rows.lock(tx, job.id)
            asked.clear()
            outbox.owe(tx, {**row, "state": "cancelled"})  # type: ignore[arg-type]
        finally:
            event.remove(tx, "before_cursor_execute", note)

    ledger.write(work)
    assert len(asked) == 1
    if ledger.url.startswith("sqlite"):
        plan = f"explain query plan {asked[0]}"
        found = ledger.store.read(lambda tx: tx.exec_driver_sql(plan, (OWNER,)).all())
        assert "USING INDEX ix_webhook_endpoints_owner" in str(found)


# how it is given out


def test_messages_of_a_job_come_in_order_and_jobs_side_by_side(ledger: Ledger) -> None:
    endpoint = listen(ledger)
    one, two = paused_then_cancelled(ledger), paused_then_cancelled(ledger)
    first = claim(ledger, endpoint)
    assert [message.id for message in first] == [id_of(one, 2), id_of(two, 2)]
    assert claim(ledger, endpoint) == []
    assert take(ledger, first[0])
    assert [message.id for message in claim(ledger, endpoint)] == [id_of(one, 3)]
    assert take(ledger, first[1])
    assert [message.id for message in claim(ledger, endpoint)] == [id_of(two, 3)]


def test_a_message_that_is_not_taken_holds_back_only_its_own_job(ledger: Ledger) -> None:
    endpoint = listen(ledger)
    one, two = paused_then_cancelled(ledger), paused_then_cancelled(ledger)
    first = claim(ledger, endpoint)
    assert miss(ledger, first[0], wait=100)
    assert take(ledger, first[1])
    last = claim(ledger, endpoint)
    assert [message.id for message in last] == [id_of(two, 3)]
    assert take(ledger, last[0])
    lane = ledger.store.read(outbox.lanes)[0]
    assert 0 < lane.wait_seconds <= 100
    pass_by(ledger, 101)
    again = claim(ledger, endpoint, count=1)
    assert [(message.id, message.tries) for message in again] == [(id_of(one, 2), 2)]
    assert again[0].body == first[0].body


def test_a_holder_that_died_is_followed_by_another_and_can_no_longer_record(ledger: Ledger) -> None:
    endpoint = listen(ledger)
    job = paused_then_cancelled(ledger)
    first = claim(ledger, endpoint)[0]
    assert claim(ledger, endpoint, OTHER) == []
    pass_by(ledger, LEASE + 1)
    second = claim(ledger, endpoint, OTHER)[0]
    assert second.id == first.id == id_of(job, 2)
    assert not take(ledger, first)
    assert not miss(ledger, first)
    assert take(ledger, second, OTHER)
    assert [message.id for message in claim(ledger, endpoint, OTHER)] == [id_of(job, 3)]


def test_what_a_server_holds_at_its_end_is_given_back_at_once(ledger: Ledger) -> None:
    endpoint = listen(ledger)
    paused_then_cancelled(ledger)
    assert len(claim(ledger, endpoint)) == 1
    ledger.write(lambda tx: outbox.release(tx, OTHER))
    assert claim(ledger, endpoint, OTHER) == []
    ledger.write(lambda tx: outbox.release(tx, ME))
    assert len(claim(ledger, endpoint, OTHER)) == 1
    ledger.write(lambda tx: outbox.release(tx, None))
    assert len(claim(ledger, endpoint)) == 1


def test_a_message_is_given_up_after_a_day_with_its_last_error(ledger: Ledger) -> None:
    endpoint = listen(ledger)
    job = paused_then_cancelled(ledger)
    tries = 0
    while (found := claim(ledger, endpoint))[0].id == id_of(job, 2):
        tries += 1
        assert miss(ledger, found[0], wait=GIVE_UP_SECONDS / 2.5)
        pass_by(ledger, GIVE_UP_SECONDS / 2.5 + 1)
    assert tries == 4  # at 0, 0.4 and 0.8 days, and a last time at the end of the day
    given_up, next_one = deliveries(ledger, endpoint)
    assert (given_up.status, given_up.error, given_up.status_code) == ("failed", "no 🎣", 500)
    assert next_one.status == "pending"


def test_an_endpoint_that_is_gone_gets_nothing_until_it_is_changed(ledger: Ledger) -> None:
    endpoint = listen(ledger)
    paused_then_cancelled(ledger)
    claim(ledger, endpoint)
    ledger.write(lambda tx: webhooks.disable(tx, endpoint.id, "http://elsewhere/", "410"))
    assert ledger.store.read(outbox.lanes) != []
    ledger.write(lambda tx: webhooks.disable(tx, endpoint.id, endpoint.url, "410"))
    assert ledger.store.read(outbox.lanes) == []
    assert [one.status for one in deliveries(ledger, endpoint)] == ["failed", "failed"]
    paused_then_cancelled(ledger)
    assert len(deliveries(ledger, endpoint)) == 2
    with pytest.raises(ConflictError, match="update it"):
        redeliver(ledger, endpoint, deliveries(ledger, endpoint)[0].id)
    ledger.write(lambda tx: webhooks.change(tx, endpoint.id, OWNER, name="새 이름"))
    paused_then_cancelled(ledger)
    assert len(deliveries(ledger, endpoint)) == 4
    redeliver(ledger, endpoint, deliveries(ledger, endpoint)[0].id)
    assert len(claim(ledger, endpoint)) == 2


def redeliver(ledger: Ledger, endpoint: Endpoint, delivery_id: str) -> Delivery:
    return ledger.write(lambda tx: webhooks.redeliver(tx, endpoint.id, delivery_id, OWNER))


def test_what_was_delivered_can_be_sent_again_under_its_id(ledger: Ledger) -> None:
    endpoint = listen(ledger)
    job = paused_then_cancelled(ledger)
    first = claim(ledger, endpoint)[0]
    take(ledger, first)
    again = redeliver(ledger, endpoint, first.id)
    assert (again.status, again.tries, again.error) == ("pending", 0, None)
    assert [message.id for message in claim(ledger, endpoint)] == [id_of(job, 2)]
    with pytest.raises(NotFoundError):
        redeliver(ledger, endpoint, "evt_없음\0")


def test_an_endpoint_s_messages_go_with_it_and_old_ones_go_by_themselves(ledger: Ledger) -> None:
    endpoint, other = listen(ledger), listen(ledger)
    paused_then_cancelled(ledger)
    ledger.write(lambda tx: webhooks.remove(tx, endpoint.id, OWNER))
    for message in claim(ledger, other):
        take(ledger, message)
    assert ledger.write(outbox.sweep) == 0
    pass_by(ledger, outbox.KEPT_SECONDS + 1)
    assert ledger.write(outbox.sweep) == 1  # the one that is still owed stays
    ledger.write(lambda tx: tx.execute(text("delete from webhook_endpoints")))
    assert ledger.write(outbox.sweep) == 1


def test_a_clock_that_stepped_back_delays_no_message_by_more_than_a_sweep(ledger: Ledger) -> None:
    endpoint = listen(ledger)
    paused_then_cancelled(ledger)
    pass_by(ledger, -30 * 24 * 3600)
    assert claim(ledger, endpoint) == []
    ledger.write(outbox.sweep)
    assert len(claim(ledger, endpoint)) == 1


# endpoints


def test_a_rotated_secret_signs_beside_the_new_one_for_a_day_if_asked(ledger: Ledger) -> None:
    endpoint = listen(ledger)
    new = ledger.write(lambda tx: webhooks.rotate(tx, endpoint.id, OWNER, should_overlap=True))
    paused_then_cancelled(ledger)
    message = claim(ledger, endpoint)[0]
    assert message.secrets == (new.secret, endpoint.secret)
    assert endpoint.secret not in repr(message) + repr(endpoint)
    ledger.write(lambda tx: tx.execute(text("update webhook_endpoints set old_secret_until = 1")))
    ledger.write(lambda tx: outbox.release(tx, ME))
    assert claim(ledger, endpoint)[0].secrets == (new.secret,)
    newest = ledger.write(lambda tx: webhooks.rotate(tx, endpoint.id, OWNER, False))
    ledger.write(lambda tx: outbox.release(tx, ME))
    assert claim(ledger, endpoint)[0].secrets == (newest.secret,)


def test_an_owner_has_a_bounded_number_of_endpoints_and_sees_only_them(ledger: Ledger) -> None:
    mine = [listen(ledger).id for _ in range(webhooks.MAX_ENDPOINTS)]
    with pytest.raises(BadRequestError, match="limit"):
        listen(ledger)
    other = listen(ledger, owner="다른 이")
    for look in (
        lambda tx: webhooks.find(tx, other.id, OWNER),
        lambda tx: webhooks.change(tx, other.id, OWNER, name="x"),
        lambda tx: webhooks.rotate(tx, other.id, OWNER, True),
        lambda tx: webhooks.remove(tx, other.id, OWNER),
        lambda tx: webhooks.deliveries(tx, other.id, OWNER, None, 5),
    ):
        with pytest.raises(NotFoundError):
            ledger.write(look)
    first, has_more = ledger.store.read(lambda tx: webhooks.page(tx, OWNER, None, 15))
    rest, has_rest = ledger.store.read(lambda tx: webhooks.page(tx, OWNER, first[-1].id, 15))
    assert [one.id for one in (*first, *rest)] == mine[::-1]
    assert (has_more, has_rest) == (True, False)
    with pytest.raises(BadRequestError) as refusal:
        ledger.store.read(lambda tx: webhooks.page(tx, OWNER, other.id, 15))
    assert refusal.value.param == "after"


def test_a_change_that_changes_nothing_leaves_no_date(ledger: Ledger) -> None:
    endpoint = listen(ledger)
    ledger.clock.pass_by(10)
    same = ledger.write(lambda tx: webhooks.change(tx, endpoint.id, OWNER, name=endpoint.name))
    assert same == endpoint
    new = ledger.write(lambda tx: webhooks.change(tx, endpoint.id, OWNER, name="다른\0 이름"))
    assert new.name == "다른� 이름"
    assert new.updated_at != endpoint.updated_at
    assert new.event_types == endpoint.event_types


def test_a_claim_of_another_worker_owes_nothing(ledger: Ledger) -> None:
    endpoint = listen(ledger)
    ledger.submit()
    ledger.write(lambda tx: jobs.claim(tx, new_ask("w2", "c9"), lease_seconds=LEASE))
    assert deliveries(ledger, endpoint) == []

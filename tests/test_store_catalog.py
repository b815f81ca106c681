"""Names, uploads, keys, repeated requests and the audit."""

from typing import Any

import pytest
from sqlalchemy import text

from store_fixtures import Ledger
from tunesmith.errors import BadRequestError, ConflictError, NotFoundError, ValidationError
from tunesmith.store import audit, catalog, idempotency, keys
from tunesmith.store.catalog import Upload

SHAS = ["0" * 64, "1" * 64]


def upload(ledger: Ledger, **over: Any) -> Upload:
    values = {"owner": "a", "filename": "자료.jsonl", "sha256": SHAS[0], "size_bytes": 5, **over}
    return ledger.write(lambda tx: catalog.add_upload(tx, **values))


def test_a_registered_name_is_found_by_its_kind(ledger: Ledger) -> None:
    name = "팀/모델-🙂"
    made = ledger.write(lambda tx: catalog.register(tx, "model", name, "/m", "a"))
    assert ledger.store.read(lambda tx: catalog.find(tx, "model", name)) == made
    assert ledger.store.read(lambda tx: catalog.find(tx, "dataset", name)) is None
    assert ledger.store.read(lambda tx: catalog.list_names(tx, "model")) == [made]
    ledger.write(lambda tx: catalog.remove(tx, "model", name))
    with pytest.raises(NotFoundError):
        ledger.write(lambda tx: catalog.remove(tx, "model", name))


def test_a_name_does_not_change_its_meaning_unasked(ledger: Ledger) -> None:
    ledger.write(lambda tx: catalog.register(tx, "model", "m", "/one", "a"))
    ledger.write(lambda tx: catalog.register(tx, "model", "m", "/one", "a"))
    with pytest.raises(ConflictError, match="/one"):
        ledger.write(lambda tx: catalog.register(tx, "model", "m", "/two", "a"))
    changed = ledger.write(
        lambda tx: catalog.register(tx, "model", "m", "/two", "a", should_replace=True)
    )
    assert changed.path == "/two"


@pytest.mark.parametrize(
    "name", ["", "a" * 201, "/abs", "a//b", "../x", "a/.b", "ft:x", "file-1", "a\0", "a\n", " a"]
)
def test_names_that_would_mean_something_else_are_refused(ledger: Ledger, name: str) -> None:
    with pytest.raises(BadRequestError):
        ledger.write(lambda tx: catalog.register(tx, "model", name, "/m", "a"))


def test_two_uploads_of_one_name_are_both_kept(ledger: Ledger) -> None:
    first = upload(ledger)
    again = upload(ledger)
    other = upload(ledger, sha256=SHAS[1])
    owned = upload(ledger, owner="b")
    anew = upload(ledger, should_reuse=False)
    assert first == again
    names = [one.name for one in (first, other, owned, anew)]
    assert names == [
        "data/자료.jsonl",
        "data/자료-2.jsonl",
        "data/자료-3.jsonl",
        "data/자료-4.jsonl",
    ]
    assert ledger.store.read(lambda tx: catalog.find_upload(tx, "data/자료-2.jsonl")) == other
    assert ledger.store.read(lambda tx: catalog.find_upload(tx, first.id, "a")) == first
    assert ledger.store.read(lambda tx: catalog.find_upload(tx, first.id, "b")) is None
    listed = ledger.store.read(lambda tx: catalog.list_uploads(tx, "a"))
    assert listed == [anew, other, first]


def test_bytes_are_given_up_once_nothing_needs_them(ledger: Ledger) -> None:
    first = upload(ledger)
    source = {"name": first.name, "path": "/x", "sha256": SHAS[0]}
    job = ledger.submit(dataset=source)
    ledger.write(lambda tx: catalog.remove_upload(tx, first.id))
    assert ledger.write(catalog.take_orphans) == []
    ledger.stop(job.id)
    assert ledger.write(catalog.take_orphans) == [SHAS[0]]
    assert ledger.write(catalog.take_orphans) == []
    with pytest.raises(NotFoundError):
        ledger.store.read(lambda tx: catalog.get_upload(tx, first.id))


def test_a_verdict_is_kept_by_its_key(ledger: Ledger) -> None:
    assert ledger.store.read(lambda tx: catalog.find_verdict(tx, "k")) is None
    for rows in (1, 2):
        ledger.write(lambda tx, rows=rows: catalog.keep_verdict(tx, "k", {"行": rows}))  # type: ignore[misc]
    assert ledger.store.read(lambda tx: catalog.find_verdict(tx, "k")) == {"行": 2}


def test_a_key_is_shown_once_and_kept_as_a_hash(ledger: Ledger) -> None:
    assert not ledger.store.read(keys.has_any)
    made, secret = ledger.write(lambda tx: keys.make(tx, "주인", "노트북"))
    assert secret.startswith("sk-")
    assert ledger.store.read(lambda tx: keys.find(tx, secret)) == made
    assert ledger.store.read(keys.has_any)
    kept = ledger.store.read(lambda tx: tx.execute(text("select * from api_keys")).all())
    assert secret not in str(kept)
    assert secret not in str(ledger.store.read(keys.list_keys))


@pytest.mark.parametrize("presented", ["", "sk-", "sk-wrong", "열쇠", "\ud800", "x" * 100_000])
def test_a_wrong_key_is_no_key(ledger: Ledger, presented: str) -> None:
    ledger.write(lambda tx: keys.make(tx, "o"))
    assert ledger.store.read(lambda tx: keys.find(tx, presented)) is None


def test_a_revoked_key_opens_nothing(ledger: Ledger) -> None:
    made, secret = ledger.write(lambda tx: keys.make(tx, "o"))
    revoked = ledger.write(lambda tx: keys.revoke(tx, made.id))
    ledger.clock.pass_by(5)
    assert ledger.write(lambda tx: keys.revoke(tx, made.id)) == revoked
    assert ledger.store.read(lambda tx: keys.find(tx, secret)) is None
    assert ledger.store.read(keys.has_any)
    with pytest.raises(NotFoundError):
        ledger.write(lambda tx: keys.revoke(tx, "key-none"))


def test_the_same_request_gets_the_same_answer(ledger: Ledger) -> None:
    answer = idempotency.Stored(status=200, response={"job_id": "값"})

    def ask(owner: str, key: str, body: str) -> idempotency.Stored | None:
        return ledger.store.read(lambda tx: idempotency.find(tx, owner, "/train", key, body))

    assert ask("a", "k", SHAS[0]) is None
    ledger.write(lambda tx: idempotency.keep(tx, "a", "/train", "k", SHAS[0], answer))
    assert ask("a", "k", SHAS[0]) == answer
    assert ask("b", "k", SHAS[0]) is None
    with pytest.raises(ValidationError, match="another body"):
        ask("a", "k", SHAS[1])
    ledger.clock.pass_by(idempotency.KEEP_SECONDS + 1)
    assert ledger.write(idempotency.sweep) == 1
    assert ask("a", "k", SHAS[0]) is None


@pytest.mark.parametrize("key", ["", "x" * 256, "a\nb", "키"])
def test_what_is_no_idempotency_key_is_refused(ledger: Ledger, key: str) -> None:
    with pytest.raises(BadRequestError):
        ledger.store.read(lambda tx: idempotency.find(tx, "a", "/train", key, SHAS[0]))


def test_the_audit_is_read_newest_first(ledger: Ledger) -> None:
    for number in range(5):
        ledger.write(
            lambda tx, n=number: audit.append(tx, "누구", "keys.make", str(n), "r", {"n": n})  # type: ignore[misc]
        )
    page = ledger.store.read(lambda tx: audit.lines(tx, 2))
    assert [line.target for line in page] == ["4", "3"]
    rest = ledger.store.read(lambda tx: audit.lines(tx, before=page[-1].number))
    assert [line.target for line in rest] == ["2", "1", "0"]

"""The tables, the database's clock, and the topics that a transaction touches."""

from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy import BigInteger as _BigInteger
from sqlalchemy.engine import Connection
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from tunesmith.spec.records import JobState

UNCHECKED = "unchecked"
"""The topic of jobs whose data waits for its check."""
CLOCK = "tunesmith_now"
"""The name under which the clock is registered with SQLite."""
POSTGRES_CLOCK = "extract(epoch from clock_timestamp())::double precision"
ALL = "*"
"""The topic of everything: whoever waits for any topic is woken by it."""
UNFINISHED = tuple(state.value for state in JobState if not state.is_final)
HELD = (JobState.STARTING.value, JobState.RUNNING.value, JobState.STOPPING.value)
"""States in which a worker holds the job."""

_NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}
metadata = MetaData(naming_convention=_NAMES)

Json = JSON(none_as_null=True)
BigInteger = _BigInteger().with_variant(Integer(), "sqlite")
"""64 bits on both; SQLite numbers rows by itself only under the name INTEGER."""


class _Now(FunctionElement[float]):
    type = Double()
    inherit_cache = True
    name = "now"


@compiles(_Now, "sqlite")
def _now_on_sqlite(element: Any, compiler: Any, **options: Any) -> str:
    return f"{CLOCK}()"


@compiles(_Now, "postgresql")
def _now_on_postgresql(element: Any, compiler: Any, **options: Any) -> str:
    return POSTGRES_CLOCK


def now() -> _Now:
    """Unix seconds by the database's clock, read where the statement runs."""
    return _Now()


def touch(tx: Connection, topic: str) -> None:
    """Name a topic whose listeners are woken once the transaction is committed."""
    tx.info.setdefault("topics", set()).add(topic)


def is_unfinished() -> Any:
    """As text, so that it is the same word for word in the index and in what asks for it."""
    return text("state in (" + ", ".join(f"'{state}'" for state in UNFINISHED) + ")")


def is_held() -> Any:
    """As `is_unfinished`: whether a worker holds the job."""
    return text("state in (" + ", ".join(f"'{state}'" for state in HELD) + ")")


def _partial(where: Any) -> dict[str, Any]:
    return {"sqlite_where": where, "postgresql_where": where}


jobs = Table(
    "jobs",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=True),
    Column("id", String(8), nullable=False, unique=True),
    Column("owner", Text, nullable=False),
    Column("spec", Json, nullable=False),
    Column("model", Json, nullable=False),
    Column("dataset", Json, nullable=False),
    Column("eval_dataset", Json),
    Column("reward_models", Json),
    Column("tokenizer", Json),
    Column("output_dir", Text, nullable=False),
    Column("needs_gpus", Integer, nullable=False),
    Column("needs_memory_bytes", BigInteger, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("request", Json, nullable=False),
    Column("label", Text),
    Column("retry_of", String(8)),
    Column("resume_from", Text),
    Column("state", String(16), nullable=False),
    Column("is_validated", Boolean, nullable=False),
    Column("fence", Integer, nullable=False, server_default="0"),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("lapses", Integer, nullable=False, server_default="0"),
    Column("worker_id", Text),
    Column("lease_until", Double),
    Column("stop_mode", String(16)),
    Column("stop_deadline", Double),
    Column("not_before", Double, nullable=False, server_default="0"),
    Column("requeue_reason", String(32)),
    Column("should_checkpoint", Boolean, nullable=False, server_default=text("false")),
    Column("plan", Json),
    Column("last_seq", Integer, nullable=False, server_default="1"),
    Column("progress", Double, nullable=False, server_default="0"),
    Column("step", Integer, nullable=False, server_default="0"),
    Column("total_steps", Integer),
    Column("metrics", Json, nullable=False, server_default="{}"),
    Column("eta_seconds", Double),
    Column("checkpoint_step", Integer),
    Column("artifact", Text),
    Column("failure_class", String(32)),
    Column("error", Text),
    Column("hint", Text),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    Index("ix_jobs_owner_number", "owner", "number"),
    Index("ix_jobs_state_number", "state", "number"),
    Index(
        "ix_jobs_claim_order",
        text("priority desc"),
        "number",
        **_partial(text("state = 'queued'")),
    ),
    Index(
        "ix_jobs_leases",
        "lease_until",
        **_partial(is_held()),
    ),
    Index("uq_jobs_unfinished_output", "output_dir", unique=True, **_partial(is_unfinished())),
)
PINNED = (jobs.c.dataset, jobs.c.eval_dataset, jobs.c.tokenizer)
"""Files that a job keeps by their content."""

quotas = Table(
    "quotas",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("unfinished", Integer, nullable=False),
    CheckConstraint("unfinished >= 0", name="unfinished"),
)

events = Table(
    "events",
    metadata,
    Column("job_id", String(8), ForeignKey("jobs.id"), primary_key=True),
    Column("seq", Integer, primary_key=True),
    Column("fence", Integer, nullable=False),
    Column("at", Double, nullable=False),
    Column("type", String(32), nullable=False),
    Column("data", Json, nullable=False),
    sqlite_with_rowid=False,
)

attempts = Table(
    "attempts",
    metadata,
    Column("job_id", String(8), ForeignKey("jobs.id"), primary_key=True),
    Column("fence", Integer, primary_key=True),
    Column("worker_id", Text, nullable=False),
    Column("claim_id", String(64), nullable=False),
    Column("token_sha256", String(64), nullable=False),
    Column("gpus", Json, nullable=False),
    Column("last_n", Integer, nullable=False, server_default="0"),
    Column("claimed_at", Double, nullable=False),
    Column("ended_at", Double),
    Column("outcome", Json),
    UniqueConstraint("worker_id", "claim_id"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=True),
    Column("job_id", String(8), nullable=False),
    Column("fence", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("path", Text, nullable=False),
    Column("manifest_sha256", String(64), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("at", Double, nullable=False),
    ForeignKeyConstraint(["job_id", "fence"], ["attempts.job_id", "attempts.fence"]),
    UniqueConstraint("job_id", "fence", "step", "path"),
)

workers = Table(
    "workers",
    metadata,
    Column("id", Text, primary_key=True),
    Column("capacity", Json, nullable=False),
    Column("host", Json, nullable=False),
    Column("boot_id", String(64), nullable=False, server_default=""),
    Column("seen_at", Double, nullable=False),
)

reservations = Table(
    "reservations",
    metadata,
    Column("worker_id", Text, primary_key=True),
    Column("device", String(100), primary_key=True),
    Column("holder", String(80), nullable=False, index=True),
    Column("memory_bytes", BigInteger, nullable=False),
)
"""One row a GPU (`gpu:3`) or CPU slot (`cpu:<holder>`): no device has two holders."""

engines = Table(
    "engines",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("model_path", Text, nullable=False),
    Column("model_name", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("should_stop", Boolean, nullable=False, server_default=text("false")),
    Column("needs_gpus", Integer, nullable=False),
    Column("needs_memory_bytes", BigInteger, nullable=False),
    Column("options", Json, nullable=False),
    Column("gpus", Json, nullable=False),
    Column("worker_id", Text),
    Column("url", Text),
    Column("key", String(80), nullable=False),
    Column("pid", Integer),
    Column("error", Text),
    Column("created_at", Double, nullable=False),
    Column("changed_at", Double, nullable=False),
    Column("last_used", Double, nullable=False),
    Column("precision", String(8), nullable=False, server_default="auto"),
    Index(
        "uq_engines_live_model",
        "model_path",
        "precision",
        unique=True,
        **_partial(text("state in ('wanted', 'starting', 'ready')")),
    ),
)

names = Table(
    "names",
    metadata,
    Column("kind", String(16), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("path", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("detail", Json, nullable=False),
    Column("created_at", Double, nullable=False),
)

blobs = Table(
    "blobs",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
)

uploads = Table(
    "uploads",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("name", Text, nullable=False, unique=True),
    Column("filename", Text, nullable=False),
    Column("sha256", String(64), ForeignKey("blobs.sha256"), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("owner", Text, nullable=False),
    Column("purpose", String(40), nullable=False),
    Column("format", String(40)),
    Column("num_samples", BigInteger),
    Column("created_at", Double, nullable=False),
)

verdicts = Table(
    "verdicts",
    metadata,
    Column("key", String(200), primary_key=True),
    Column("verdict", Json, nullable=False),
    Column("created_at", Double, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("hint", String(16), nullable=False),
    Column("owner", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("revoked_at", Double),
    Column("is_worker", Boolean, nullable=False, server_default=text("false")),
    Column("scopes", Json),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("route", String(200), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("body_sha256", String(64), nullable=False),
    Column("status", Integer, nullable=False),
    Column("response", Json, nullable=False),
    Column("created_at", Double, nullable=False, index=True),
)

audit_lines = Table(
    "audit_lines",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=True),
    Column("at", Double, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", String(100), nullable=False),
    Column("target", Text, nullable=False),
    Column("request_id", String(100)),
    Column("detail", Json, nullable=False),
)

secrets = Table(
    "secrets",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("value", LargeBinary, nullable=False),
)

servers = Table(
    "servers",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("host", Json, nullable=False),
    Column("started_at", Double, nullable=False),
    Column("seen_at", Double, nullable=False),
)
"""API processes that share this database."""

duties = Table(
    "duties",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("holder", String(64), nullable=False),
    Column("until", Double, nullable=False),
)
"""Work that one API process does for all, under a lease."""

commits = Table(
    "commits",
    metadata,
    Column("writer", String(64), primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("at", Double, nullable=False),
)
"""On PostgreSQL, each writer's last commit: what it asks for after its connection broke."""

webhook_endpoints = Table(
    "webhook_endpoints",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("owner", Text, nullable=False, index=True),
    Column("name", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("event_types", Json, nullable=False),
    Column("secret", String(200), nullable=False),
    Column("old_secret", String(200)),
    Column("old_secret_until", Double),
    Column("disabled_at", Double),
    Column("disabled_reason", Text),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double),
)

outbox = Table(
    "outbox",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False),
    Column("endpoint_id", String(64), nullable=False),
    Column("job_id", String(8), nullable=False),
    Column("body", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("due_at", Double, nullable=False),
    Column("give_up_at", Double, nullable=False),
    Column("tries", Integer, nullable=False, server_default="0"),
    Column("holder", String(64)),
    Column("done_at", Double),
    Column("status", Integer),
    Column("error", Text),
    UniqueConstraint("id", "endpoint_id"),
    Index("ix_outbox_endpoint_number", "endpoint_id", "number"),
    Index("ix_outbox_due", "endpoint_id", "due_at", **_partial(text("done_at is null"))),
    Index("ix_outbox_order", "endpoint_id", "job_id", **_partial(text("done_at is null"))),
)
"""Webhook messages owed: written with the state that they tell of, sent until taken. Who holds one
has put `due_at` to where its lease ends."""

mirrors = Table(
    "mirrors",
    metadata,
    Column("job_id", String(8), ForeignKey("jobs.id"), primary_key=True),
    Column("experiment_id", String(64)),
    Column("run_id", String(64)),
    Column("sent_seq", Integer, nullable=False, server_default="0"),
    Column("sent_step", Integer, nullable=False, server_default="0"),
    Column("due_at", Double, nullable=False),
    Column("tries", Integer, nullable=False, server_default="0"),
    Column("holder", String(64)),
    Column("done_at", Double),
    Column("error", Text),
    Index("ix_mirrors_due", "due_at", **_partial(text("done_at is null"))),
)
"""How far a job's events were carried to MLflow."""

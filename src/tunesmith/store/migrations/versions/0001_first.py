"""The first schema: jobs, their events and attempts, devices, names, keys."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
JSON = sa.JSON(none_as_null=True)


def _where(clause: Any) -> dict[str, Any]:
    return {"sqlite_where": clause, "postgresql_where": clause}


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("hint", sa.String(length=16), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.UniqueConstraint("sha256", name="uq_api_keys_sha256"),
    )
    op.create_table(
        "audit_lines",
        sa.Column("number", BIG, autoincrement=True, nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.String(length=100), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("request_id", sa.String(length=100), nullable=True),
        sa.Column("detail", JSON, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_audit_lines"),
    )
    op.create_table(
        "blobs",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", BIG, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name="pk_blobs"),
    )
    op.create_table(
        "engines",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("model_path", sa.Text(), nullable=False),
        sa.Column("model_name", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("should_stop", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("needs_gpus", sa.Integer(), nullable=False),
        sa.Column("needs_memory_bytes", BIG, nullable=False),
        sa.Column("options", JSON, nullable=False),
        sa.Column("gpus", JSON, nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=True),
        sa.Column("url", sa.Text(), nullable=True),
        sa.Column("key", sa.String(length=80), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("changed_at", sa.Double(), nullable=False),
        sa.Column("last_used", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_engines"),
    )
    op.create_index(
        "uq_engines_live_model",
        "engines",
        ["model_path"],
        unique=True,
        **_where(sa.text("state in ('wanted', 'starting', 'ready')")),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("route", sa.String(length=200), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("body_sha256", sa.String(length=64), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("response", JSON, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("owner", "route", "key", name="pk_idempotency_keys"),
    )
    op.create_index(
        "ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"], unique=False
    )
    op.create_table(
        "jobs",
        sa.Column("number", BIG, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=8), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("spec", JSON, nullable=False),
        sa.Column("model", JSON, nullable=False),
        sa.Column("dataset", JSON, nullable=False),
        sa.Column("eval_dataset", JSON, nullable=True),
        sa.Column("output_dir", sa.Text(), nullable=False),
        sa.Column("needs_gpus", sa.Integer(), nullable=False),
        sa.Column("needs_memory_bytes", BIG, nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("request", JSON, nullable=False),
        sa.Column("label", sa.Text(), nullable=True),
        sa.Column("retry_of", sa.String(length=8), nullable=True),
        sa.Column("resume_from", sa.Text(), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("is_validated", sa.Boolean(), nullable=False),
        sa.Column("fence", sa.Integer(), server_default="0", nullable=False),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("lapses", sa.Integer(), server_default="0", nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=True),
        sa.Column("lease_until", sa.Double(), nullable=True),
        sa.Column("stop_mode", sa.String(length=16), nullable=True),
        sa.Column("stop_deadline", sa.Double(), nullable=True),
        sa.Column("not_before", sa.Double(), server_default="0", nullable=False),
        sa.Column("requeue_reason", sa.String(length=32), nullable=True),
        sa.Column(
            "should_checkpoint", sa.Boolean(), server_default=sa.text("false"), nullable=False
        ),
        sa.Column("plan", JSON, nullable=True),
        sa.Column("last_seq", sa.Integer(), server_default="1", nullable=False),
        sa.Column("progress", sa.Double(), server_default="0", nullable=False),
        sa.Column("step", sa.Integer(), server_default="0", nullable=False),
        sa.Column("total_steps", sa.Integer(), nullable=True),
        sa.Column("metrics", JSON, server_default="{}", nullable=False),
        sa.Column("eta_seconds", sa.Double(), nullable=True),
        sa.Column("checkpoint_step", sa.Integer(), nullable=True),
        sa.Column("artifact", sa.Text(), nullable=True),
        sa.Column("failure_class", sa.String(length=32), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("hint", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("number", name="pk_jobs"),
        sa.UniqueConstraint("id", name="uq_jobs_id"),
    )
    op.create_index(
        "ix_jobs_claim_order",
        "jobs",
        [sa.text("priority desc"), "number"],
        **_where(sa.text("state = 'queued'")),
    )
    op.create_index(
        "ix_jobs_leases",
        "jobs",
        ["lease_until"],
        unique=False,
        **_where(sa.text("state in ('starting', 'running', 'stopping')")),
    )
    op.create_index("ix_jobs_owner_number", "jobs", ["owner", "number"], unique=False)
    op.create_index("ix_jobs_state_number", "jobs", ["state", "number"], unique=False)
    op.create_index(
        "uq_jobs_unfinished_output",
        "jobs",
        ["output_dir"],
        unique=True,
        **_where(sa.text("state in ('queued', 'starting', 'running', 'stopping', 'paused')")),
    )
    op.create_table(
        "names",
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("detail", JSON, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("kind", "name", name="pk_names"),
    )
    op.create_table(
        "quotas",
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("unfinished", sa.Integer(), nullable=False),
        sa.CheckConstraint("unfinished >= 0", name="ck_quotas_unfinished"),
        sa.PrimaryKeyConstraint("owner", name="pk_quotas"),
    )
    op.create_table(
        "reservations",
        sa.Column("worker_id", sa.Text(), nullable=False),
        sa.Column("device", sa.String(length=100), nullable=False),
        sa.Column("holder", sa.String(length=80), nullable=False),
        sa.Column("memory_bytes", BIG, nullable=False),
        sa.PrimaryKeyConstraint("worker_id", "device", name="pk_reservations"),
    )
    op.create_index("ix_reservations_holder", "reservations", ["holder"], unique=False)
    op.create_table(
        "secrets",
        sa.Column("name", sa.String(length=40), nullable=False),
        sa.Column("value", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_secrets"),
    )
    op.create_table(
        "verdicts",
        sa.Column("key", sa.String(length=200), nullable=False),
        sa.Column("verdict", JSON, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_verdicts"),
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("capacity", JSON, nullable=False),
        sa.Column("host", JSON, nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_workers"),
    )
    op.create_table(
        "attempts",
        sa.Column("job_id", sa.String(length=8), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=False),
        sa.Column("claim_id", sa.String(length=64), nullable=False),
        sa.Column("token_sha256", sa.String(length=64), nullable=False),
        sa.Column("gpus", JSON, nullable=False),
        sa.Column("last_n", sa.Integer(), server_default="0", nullable=False),
        sa.Column("claimed_at", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double(), nullable=True),
        sa.Column("outcome", JSON, nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_attempts_job_id"),
        sa.PrimaryKeyConstraint("job_id", "fence", name="pk_attempts"),
        sa.UniqueConstraint("worker_id", "claim_id", name="uq_attempts_worker_id_claim_id"),
    )
    op.create_table(
        "events",
        sa.Column("job_id", sa.String(length=8), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("type", sa.String(length=32), nullable=False),
        sa.Column("data", JSON, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_events_job_id"),
        sa.PrimaryKeyConstraint("job_id", "seq", name="pk_events"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "uploads",
        sa.Column("number", BIG, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", BIG, nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("purpose", sa.String(length=40), nullable=False),
        sa.Column("format", sa.String(length=40), nullable=True),
        sa.Column("num_samples", BIG, nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["sha256"], ["blobs.sha256"], name="fk_uploads_sha256"),
        sa.PrimaryKeyConstraint("number", name="pk_uploads"),
        sa.UniqueConstraint("id", name="uq_uploads_id"),
        sa.UniqueConstraint("name", name="uq_uploads_name"),
    )
    op.create_table(
        "checkpoints",
        sa.Column("number", BIG, autoincrement=True, nullable=False),
        sa.Column("job_id", sa.String(length=8), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("manifest_sha256", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", BIG, nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id", "fence"],
            ["attempts.job_id", "attempts.fence"],
            name="fk_checkpoints_job_id_fence",
        ),
        sa.PrimaryKeyConstraint("number", name="pk_checkpoints"),
        sa.UniqueConstraint(
            "job_id", "fence", "step", "path", name="uq_checkpoints_job_id_fence_step_path"
        ),
    )

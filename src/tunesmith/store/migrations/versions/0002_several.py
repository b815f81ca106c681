"""Several API processes on one database; messages owed to others."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
JSON = sa.JSON(none_as_null=True)


def _where(clause: Any) -> dict[str, Any]:
    return {"sqlite_where": clause, "postgresql_where": clause}


def upgrade() -> None:
    op.add_column(
        "workers",
        sa.Column("boot_id", sa.String(length=64), server_default="", nullable=False),
    )
    op.add_column(
        "api_keys",
        sa.Column("is_worker", sa.Boolean(), server_default=sa.text("false"), nullable=False),
    )
    op.create_table(
        "servers",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("host", JSON, nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_servers"),
    )
    op.create_table(
        "duties",
        sa.Column("name", sa.String(length=40), nullable=False),
        sa.Column("holder", sa.String(length=64), nullable=False),
        sa.Column("until", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_duties"),
    )
    op.create_table(
        "commits",
        sa.Column("writer", sa.String(length=64), nullable=False),
        sa.Column("number", BIG, nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("writer", name="pk_commits"),
    )
    _webhooks()
    _mirrors()


def _webhooks() -> None:
    op.create_table(
        "webhook_endpoints",
        sa.Column("number", BIG, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("event_types", JSON, nullable=False),
        sa.Column("secret", sa.String(length=200), nullable=False),
        sa.Column("old_secret", sa.String(length=200), nullable=True),
        sa.Column("old_secret_until", sa.Double(), nullable=True),
        sa.Column("disabled_at", sa.Double(), nullable=True),
        sa.Column("disabled_reason", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("number", name="pk_webhook_endpoints"),
        sa.UniqueConstraint("id", name="uq_webhook_endpoints_id"),
    )
    op.create_index("ix_webhook_endpoints_owner", "webhook_endpoints", ["owner"])
    op.create_table(
        "outbox",
        sa.Column("number", BIG, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("endpoint_id", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=8), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("due_at", sa.Double(), nullable=False),
        sa.Column("give_up_at", sa.Double(), nullable=False),
        sa.Column("tries", sa.Integer(), server_default="0", nullable=False),
        sa.Column("holder", sa.String(length=64), nullable=True),
        sa.Column("done_at", sa.Double(), nullable=True),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("number", name="pk_outbox"),
        sa.UniqueConstraint("id", "endpoint_id", name="uq_outbox_id_endpoint_id"),
    )
    is_owed = _where(sa.text("done_at is null"))
    op.create_index("ix_outbox_endpoint_number", "outbox", ["endpoint_id", "number"])
    op.create_index("ix_outbox_due", "outbox", ["endpoint_id", "due_at"], **is_owed)
    op.create_index("ix_outbox_order", "outbox", ["endpoint_id", "job_id"], **is_owed)


def _mirrors() -> None:
    op.create_table(
        "mirrors",
        sa.Column("job_id", sa.String(length=8), nullable=False),
        sa.Column("experiment_id", sa.String(length=64), nullable=True),
        sa.Column("run_id", sa.String(length=64), nullable=True),
        sa.Column("sent_seq", sa.Integer(), server_default="0", nullable=False),
        sa.Column("sent_step", sa.Integer(), server_default="0", nullable=False),
        sa.Column("due_at", sa.Double(), nullable=False),
        sa.Column("tries", sa.Integer(), server_default="0", nullable=False),
        sa.Column("holder", sa.String(length=64), nullable=True),
        sa.Column("done_at", sa.Double(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_mirrors_job_id"),
        sa.PrimaryKeyConstraint("job_id", name="pk_mirrors"),
    )
    op.create_index("ix_mirrors_due", "mirrors", ["due_at"], **_where(sa.text("done_at is null")))

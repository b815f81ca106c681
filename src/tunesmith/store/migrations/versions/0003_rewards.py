"""Reward models, pinned beside the other inputs of a job."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("reward_models", sa.JSON(none_as_null=True), nullable=True))

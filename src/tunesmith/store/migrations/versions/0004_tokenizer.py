"""A tokenizer that a job brings along, in place of its model's."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("tokenizer", sa.JSON(none_as_null=True), nullable=True))

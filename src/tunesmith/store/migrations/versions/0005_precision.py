"""Engines of one model in several precisions; what a key opens."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_LIVE = sa.text("state in ('wanted', 'starting', 'ready')")


def upgrade() -> None:
    op.add_column(
        "engines",
        sa.Column("precision", sa.String(length=8), server_default="auto", nullable=False),
    )
    op.drop_index("uq_engines_live_model", table_name="engines")
    op.create_index(
        "uq_engines_live_model",
        "engines",
        ["model_path", "precision"],
        unique=True,
        sqlite_where=_LIVE,
        postgresql_where=_LIVE,
    )
    op.add_column("api_keys", sa.Column("scopes", sa.JSON(none_as_null=True), nullable=True))

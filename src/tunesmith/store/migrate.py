"""Bring a database to the schema of this code, one numbered step and one transaction at a time."""

from pathlib import Path

from sqlalchemy import Engine, inspect, text
from sqlalchemy.engine import Connection

from tunesmith.errors import ServerError

FOLDER = Path(__file__).with_name("migrations")


def known() -> list[str]:
    """The numbers of the packaged migrations, oldest first."""
    return sorted(path.name[:4] for path in (FOLDER / "versions").glob("[0-9]*.py"))


def current(connection: Connection) -> str | None:
    """The number that the database is at, or None where it is empty."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    number: str | None = connection.scalar(text("select version_num from alembic_version"))
    return number


def upgrade(engine: Engine, target: str = "head") -> None:
    """Raises ServerError where the database was written by a newer version."""
    numbers = known()
    with engine.connect() as connection:
        at = current(connection)
    if at == numbers[-1]:
        return
    if at is not None and at not in numbers:
        raise ServerError(
            f"the database has schema {at}, newer than this version knows ({numbers[-1]}); "
            "start the version of Tunesmith that wrote it, or a newer one"
        )
    _run(engine, target)


def _run(engine: Engine, target: str) -> None:
    from alembic import command  # 0.2 s, and needed only where the schema changes
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, target)

"""The house's database, read from outside by plain SQL."""

import json
from functools import cached_property
from typing import Any

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.pool import NullPool

from house import House

Row = dict[str, Any]
_JSON = (
    "spec",
    "model",
    "dataset",
    "data",
    "outcome",
    "gpus",
    "metrics",
    "host",
    "event_types",
    "body",
)


class Rows:
    """Reads only; works beside a server that is up, frozen or dead."""

    def __init__(self, url: str) -> None:
        self.url = url

    @classmethod
    def of(cls, house: House) -> "Rows":
        own = f"sqlite:///file:{house.home / 'db.sqlite'}?mode=ro&uri=true"
        return cls(house.over.get("TUNESMITH_DATABASE_URL") or own)

    @property
    def is_sqlite(self) -> bool:
        return self.url.startswith("sqlite")

    def ask(self, statement: str, **values: Any) -> list[Row]:
        """`:name` stands for a value; what is JSON comes decoded on both databases."""
        with self._engine.connect() as connection:
            found = connection.execute(text(statement), values).mappings()
            return [{name: _decoded(name, row[name]) for name in row} for row in found]

    def unfinished(self) -> int:
        ended = "('succeeded', 'failed', 'cancelled')"
        return int(self.one(f"select count(*) from jobs where state not in {ended}"))  # noqa: S608

    def one(self, statement: str, **values: Any) -> Any:
        return next(iter(self.ask(statement, **values)[0].values()))

    @cached_property
    def _engine(self) -> Engine:
        return create_engine(self.url, poolclass=NullPool)


def _decoded(name: str, value: Any) -> Any:
    return json.loads(value) if name in _JSON and isinstance(value, str) else value


def damage(house: House, *statements: str) -> None:
    """Change rows behind the house's back: for tests of the checker."""
    url = house.over.get("TUNESMITH_DATABASE_URL") or f"sqlite:///{house.home / 'db.sqlite'}"
    with create_engine(url, poolclass=NullPool).begin() as connection:
        for statement in statements:
            connection.execute(text(statement))

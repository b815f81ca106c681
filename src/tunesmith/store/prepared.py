"""Statements that run thousands of times a second: compiled once a database, run as bare text."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Table
from sqlalchemy.engine import Connection, CursorResult

MOST_ROWS = 128
_ROWS = re.compile(
    r"(?P<head>INSERT INTO .*?\bVALUES )(?P<row>\(.*\))(?P<tail>( ON CONFLICT.*)?)", re.S
)
_NAMED = re.compile(r"%\((\w+)\)s")


@dataclass(frozen=True)
class _Text:
    sql: str
    fixed: dict[str, Any]
    """Values that the statement brings itself."""
    order: tuple[str, ...]
    """Of the values, since they are given by place."""

    def of(self, count: int) -> str:
        """The same INSERT of so many rows."""
        if count == 1:
            return self.sql
        found = _ROWS.fullmatch(self.sql)
        assert found, "only an INSERT takes many rows"
        return found["head"] + ", ".join([found["row"]] * count) + found["tail"]


class Prepared:
    """A statement of SQLAlchemy's Core that takes its values as the driver does.

    No type converts them: JSON is given as text. SQLAlchemy's own way to run a statement costs some
    60 µs of CPU, this one 15, and many rows of an INSERT cost one statement.
    """

    def __init__(self, make: Callable[[str], Any]) -> None:
        """`make` is given the dialect's name and returns the statement, its values `bindparam`s."""
        self._make = make
        self._texts: dict[str, _Text] = {}

    def run(self, tx: Connection, given: Sequence[Mapping[str, Any]]) -> CursorResult[Any]:
        """With the values of each row, `MOST_ROWS` at most; what is not asked for is left out."""
        assert 1 <= len(given) <= MOST_ROWS
        text = self._texts.get(tx.dialect.name) or self._compile(tx)
        values = [
            row[name] if name in row else text.fixed[name] for row in given for name in text.order
        ]
        return tx.exec_driver_sql(text.of(len(given)), tuple(values))

    def _compile(self, tx: Connection) -> _Text:
        compiled = self._make(tx.dialect.name).compile(dialect=tx.dialect)
        sql = str(compiled)
        order = tuple(compiled.positiontup or _NAMED.findall(sql))
        text = _Text(_NAMED.sub("%s", sql), dict(compiled.params), order)
        self._texts[tx.dialect.name] = text
        return text


def insert(dialect: str, table: Table) -> Any:
    """An INSERT that can say `on_conflict_do_nothing`. The other database's is not imported."""
    if dialect == "postgresql":
        from sqlalchemy.dialects import postgresql

        return postgresql.insert(table)
    from sqlalchemy.dialects import sqlite

    return sqlite.insert(table)

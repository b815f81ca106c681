"""Where the acts of a simulation are carried out: one connection, one transaction an act."""

from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy.engine import Connection

from tunesmith.store.database import Store
from tunesmith.store.tables import metadata

T = TypeVar("T")


class Floor:
    """The store's statements without its writer thread: acts come one after the other anyway."""

    def __init__(self, store: Store) -> None:
        self._connection = store._engine.connect()
        self._cursor = self._connection.connection.cursor()
        self._is_local = self._connection.dialect.name == "sqlite"
        self.acts = 0

    def write(self, work: Callable[[Connection], T]) -> T:
        self.acts += 1
        if self._is_local:
            with self._connection.begin():
                return work(self._connection)
        return self._in_words(work)

    read = write

    def _in_words(self, work: Callable[[Connection], T]) -> T:
        """As the store's writer does on PostgreSQL, whose connections commit by themselves."""
        self._cursor.execute("BEGIN")
        try:
            result = work(self._connection)
        except BaseException:
            self._cursor.execute("ROLLBACK")
            raise
        self._cursor.execute("COMMIT")
        return result

    def rows(self, statement: str) -> list[tuple[Any, ...]]:
        """Plain SQL, past every layer of the product."""
        self._cursor.execute(statement)
        return [tuple(row) for row in self._cursor.fetchall()]

    def wipe(self) -> None:
        def work(tx: Connection) -> None:
            for table in reversed(metadata.sorted_tables):
                tx.execute(table.delete())

        self.write(work)

    def close(self) -> None:
        self._connection.close()

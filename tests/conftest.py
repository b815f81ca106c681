"""Servers that many tests share: one of each for every process that runs tests."""

from collections.abc import Iterator

import pytest

from servers import Postgres, Redis, open_postgres, open_redis
from store_fixtures import database_url, fresh_database, ledger, sqlite_ledger

__all__ = ["database_url", "fresh_database", "ledger", "sqlite_ledger"]


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A cluster that nothing restarts; a test that must restart one opens its own."""
    with open_postgres(tmp_path_factory.mktemp("postgres")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    with open_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server

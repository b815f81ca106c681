"""Servers that many tests share, one of each for every process. Under CI no test is skipped."""

import os
from collections.abc import Iterator

import pytest

from servers import Postgres, Redis, open_postgres, open_redis
from store_fixtures import database_url, fresh_database, ledger, sqlite_ledger

__all__ = ["database_url", "fresh_database", "ledger", "sqlite_ledger"]

MAY_SKIP = "needs a CUDA device"
"""The only reason for which a test may be skipped where CI is set."""


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Under CI a skipped test is a failure: something was not installed that should have been."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None:
        skipped = [str(report.longrepr) for report in reporter.stats.get("skipped", [])]
        unwanted = [told for told in skipped if MAY_SKIP not in told]
        if unwanted and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            reporter.section("skipped under CI, where nothing may be")
            for told in unwanted:
                reporter.write_line(told)
    return (yield)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A cluster that nothing restarts; a test that must restart one opens its own."""
    with open_postgres(tmp_path_factory.mktemp("postgres")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    with open_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server

"""Prometheus' text of this process's metrics, or of all processes that share a folder for them."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(multiproc_dir: str, more: "Iterable[Collector]" = ()) -> bytes:
    """`multiproc_dir` is PROMETHEUS_MULTIPROC_DIR; `more` is collected now, here."""
    from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector

    shared = CollectorRegistry()
    for collector in more:
        shared.register(collector)
    if multiproc_dir:
        MultiProcessCollector(shared, multiproc_dir)  # type: ignore[no-untyped-call]
        return generate_latest(shared)
    return generate_latest(REGISTRY) + generate_latest(shared)

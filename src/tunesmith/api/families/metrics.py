"""`/metrics` for Prometheus: this server's requests, its jobs and workers, and its engines'."""

from collections.abc import Iterable

from fastapi import APIRouter, Depends, Response
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from tunesmith.api.auth import caller
from tunesmith.api.deps import HubDep
from tunesmith.exposition import CONTENT_TYPE, exposition
from tunesmith.hub import Hub
from tunesmith.store.engines import Engine

router = APIRouter(tags=["health"], dependencies=[Depends(caller)])


@router.get("/metrics", summary="Counts and times, for Prometheus", response_class=Response)
async def metrics(hub: HubDep) -> Response:
    engines = _Engines(await hub.engines.expositions())
    text = exposition(hub.settings.multiproc_dir, (_Jobs(hub), engines))
    return Response(text, media_type=CONTENT_TYPE)


class _Jobs(Collector):
    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def collect(self) -> Iterable[Metric]:
        found = GaugeMetricFamily("tunesmith_jobs", "Jobs by state", labels=["state"])
        for state, count in self._hub.jobs_by_state().items():
            found.add_metric([state], count)
        yield found
        living = self._hub.hands.living_workers()
        yield GaugeMetricFamily("tunesmith_workers", "Workers that are there", living)


class _Engines(Collector):
    """Each sample as its engine tells it, with the engine and its model as labels."""

    def __init__(self, told: list[tuple[Engine, str]]) -> None:
        self._told = told

    def collect(self) -> Iterable[Metric]:
        found: dict[str, Metric] = {}
        for engine, text in self._told:
            mark = {"engine": engine.id, "model": engine.model_name}
            for family in text_string_to_metric_families(text):
                if not family.name.startswith(("tunesmith_engine", "vllm")):
                    continue
                kept = found.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    if not sample.name.endswith("_created"):
                        kept.add_sample(sample.name, sample.labels | mark, sample.value)
        return found.values()

"""What Prometheus may ask of an engine."""

import time
from typing import TYPE_CHECKING

import torch
from prometheus_client import Counter, Gauge, Histogram

if TYPE_CHECKING:
    from tunesmith.infer.house import Served

REQUESTS = Counter("tunesmith_engine_requests", "Requests answered", ["route", "status"])
SECONDS = Histogram("tunesmith_engine_request_seconds", "From a request to its end", ["route"])
PROMPT_TOKENS = Counter("tunesmith_engine_prompt_tokens", "Tokens read")
COMPLETION_TOKENS = Counter("tunesmith_engine_completion_tokens", "Tokens generated")
_FINE = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
FIRST_TOKEN = Histogram(
    "tunesmith_engine_first_token_seconds", "From the line to the first token", buckets=_FINE
)
NEXT_TOKEN = Histogram(
    "tunesmith_engine_next_token_seconds", "Between two tokens of a sequence", buckets=_FINE
)
RUNNING = Gauge("tunesmith_engine_running", "Sequences under way", multiprocess_mode="livesum")
WAITING = Gauge("tunesmith_engine_waiting", "Sequences in the line", multiprocess_mode="livesum")
CACHE = Gauge(
    "tunesmith_engine_cache_used_ratio", "Of the cache's blocks", multiprocess_mode="livemax"
)
GPU_MEMORY = Gauge(
    "tunesmith_engine_gpu_memory_bytes", "Allocated on the GPU", multiprocess_mode="livesum"
)
LOADED = Gauge("tunesmith_engine_model_loaded", "1 with a model", multiprocess_mode="livesum")


def look(served: "Served | None") -> None:
    """Set the gauges to what is now."""
    LOADED.set(served is not None)
    GPU_MEMORY.set(torch.cuda.memory_allocated())
    if served is None:
        return
    scheduler = served.engine.scheduler
    RUNNING.set(len(scheduler.running))
    WAITING.set(len(scheduler.waiting))
    CACHE.set(1 - scheduler.available_blocks / served.engine.limits.blocks)


class Pace:
    """When the tokens of a request's sequences come."""

    def __init__(self, count: int) -> None:
        self._began = time.monotonic()
        self._last: list[float | None] = [None] * count

    def mark(self, index: int) -> None:
        """A token of that sequence is here."""
        now, before = time.monotonic(), self._last[index]
        self._last[index] = now
        if before is None:
            FIRST_TOKEN.observe(now - self._began)
        else:
            NEXT_TOKEN.observe(now - before)

"""What Prometheus reads at `/metrics`, whole over all processes of the service.

Each process counts in files of its own in the folder that PROMETHEUS_MULTIPROC_DIR names (prometheus-client's
multiprocess mode), and any front adds them up when it is asked. So counts outlive the process that made them. What
engines do, the engine process tells every front once a second, so any of them knows it. The variable is read when this
file is imported, for then the first metric is made.

Labels have few values: routes as they are declared, never addresses as they were asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import REGISTRY, Collector

from bertforge.serving.channel import Load
from bertforge.serving.requests import CODES

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
STAGES = ("read", "tokenize", "queue", "compute", "write")
_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)

_requests = Counter("bertforge_requests", "Requests answered, refused ones among them.", ["path", "status"])
_refusals = Counter("bertforge_refusals", "Requests that were refused, by the code of the error.", ["reason"])
_rows = Counter("bertforge_rows", "Rows answered to clients.", ["model"])
_stage = Histogram(
    "bertforge_stage_seconds", f"Seconds that a request spent in a stage: {', '.join(STAGES)}.", ["stage"],
    buckets=_SECONDS,
)  # fmt: skip
_swaps = Counter("bertforge_swaps", "Changed folders that were to be loaded on SIGHUP.", ["result"])
_restarts = Counter("bertforge_restarts", "Processes that died and were started again.", ["process"])
for counter, values in ((_swaps, ("done", "failed")), (_restarts, ("engine", "front"))):
    for value in values:
        counter.labels(value)  # at 0, for a counter that appears at 1 has not increased
_stages = {name: _stage.labels(name) for name in STAGES}


def request(path: str, status: int) -> None:
    """Counts a request that is over; `path` is its route."""
    _requests.labels(path, status).inc()
    if status >= 400:
        _refusals.labels(CODES.get(status, "hung_up" if status == 499 else "refused")).inc()


def rows(model: str, count: int) -> None:
    """Counts rows of an answer."""
    _rows.labels(model).inc(count)


def swapped(result: Literal["done", "failed"]) -> None:
    """Counts a folder that was to take another's place."""
    _swaps.labels(result).inc()


def restarted(process: Literal["engine", "front"]) -> None:
    """Counts a process, which calls this itself."""
    _restarts.labels(process).inc()


def stage(name: str, seconds: float) -> None:
    """Notes the time of one of STAGES."""
    _stages[name].observe(seconds)


def page(loads: Mapping[str, Load], *others: Collector) -> bytes:
    """Everything, as Prometheus reads it; `loads` are those of the engines."""
    registry = CollectorRegistry()
    for collector in (_Engines(loads), *others):
        registry.register(collector)
    if FOLDER in os.environ:
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
    return generate_latest(REGISTRY) + generate_latest(registry)  # one process alone


@dataclass(frozen=True, eq=False)
class _Engines(Collector):
    loads: Mapping[str, Load]

    def collect(self) -> Iterator[Metric]:
        """See Collector. Tokens a batch are one counter over another."""
        for family, value in (
            (
                GaugeMetricFamily("bertforge_queue_tokens", "Tokens that wait in the queue.", labels=["engine"]),
                "waiting",
            ),
            (
                GaugeMetricFamily(
                    "bertforge_tokens_per_second", "Tokens that a busy engine computes in a second.", labels=["engine"]
                ),
                "rate",
            ),
            (CounterMetricFamily("bertforge_batches", "Batches computed.", labels=["engine"]), "batches"),
            (CounterMetricFamily("bertforge_batch_rows", "Rows in those batches.", labels=["engine"]), "rows"),
            (
                CounterMetricFamily(
                    "bertforge_batch_tokens", "Tokens in those batches, with padding.", labels=["engine"]
                ),
                "tokens",
            ),
            (
                CounterMetricFamily("bertforge_batch_seconds", "Seconds spent computing them.", labels=["engine"]),
                "seconds",
            ),
        ):
            for engine, load in self.loads.items():
                family.add_metric([engine], getattr(load, value))
            yield family

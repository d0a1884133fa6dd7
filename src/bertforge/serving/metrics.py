"""What Prometheus reads at `/metrics`, whole over all processes of the service.

Each process counts in files of its own in the folder that PROMETHEUS_MULTIPROC_DIR names (prometheus-client's
multiprocess mode), and any front adds them up when it is asked. So counts outlive the process that made them, and no
message goes from one to another. The variable is read when this file is
imported, for then the first metric is made.

Labels have few values: routes as they are declared, never addresses as they were asked for.
"""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import REGISTRY

from bertforge.serving.requests import CODES

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
STAGES = ("read", "tokenize", "queue", "compute", "write")
_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
_TOKENS = tuple(float(1 << power) for power in range(4, 18))

_requests = Counter("bertforge_requests", "Requests answered, refused ones among them.", ["path", "status"])
_refusals = Counter("bertforge_refusals", "Requests that were refused, by the code of the error.", ["reason"])
_rows = Counter("bertforge_rows", "Rows that a model answered.", ["model"])
_stage = Histogram(
    "bertforge_stage_seconds", f"Seconds that a request spent in a stage: {', '.join(STAGES)}.", ["stage"],
    buckets=_SECONDS,
)  # fmt: skip
queue_tokens = Gauge("bertforge_queue_tokens", "Tokens that wait for the engine.", multiprocess_mode="livesum")
batch_tokens = Histogram("bertforge_batch_tokens", "Tokens that the engine took at once.", buckets=_TOKENS)
_stages = {name: _stage.labels(name) for name in STAGES}


def request(path: str, status: int) -> None:
    """Counts a request that is over; `path` is its route."""
    _requests.labels(path, status).inc()
    if status >= 400:
        _refusals.labels(CODES.get(status, "hung_up" if status == 499 else "refused")).inc()


def rows(model: str, count: int) -> None:
    """Counts rows of an answer."""
    _rows.labels(model).inc(count)


def stage(name: str, seconds: float) -> None:
    """Notes the time of one of STAGES."""
    _stages[name].observe(seconds)


def page() -> bytes:
    """Everything, as Prometheus reads it."""
    if FOLDER not in os.environ:  # one process alone
        return generate_latest(REGISTRY)
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)

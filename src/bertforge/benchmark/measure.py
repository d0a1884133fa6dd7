"""Timing one backend: warmed up, repeated, with every call back on the host before the clock is read."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bertforge.backends.base import Backend, BatchShape
from bertforge.backends.run import batch_of, run
from bertforge.data.loader import Examples


@dataclass(frozen=True)
class Rate:
    """Questions a second over the repeats."""

    median: float
    low: float
    high: float


def rate(work: Callable[[], object], questions: int, repeats: int) -> Rate:
    """Runs `work`, which answers `questions`, once to warm up and then `repeats` times."""
    work()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(questions / (time.perf_counter() - start))
    return Rate(float(np.median(found)), min(found), max(found))


def throughput(backend: Backend, examples: Examples, rows: np.ndarray, shape: BatchShape, repeats: int) -> Rate:
    """From token ids to logits, rows sorted by length and grouped by `shape`."""
    return rate(lambda: run(backend, examples, rows, shape=shape), len(rows), repeats)


def latencies_ms(backend: Backend, examples: Examples, rows: np.ndarray, repeats: int) -> np.ndarray:
    """Milliseconds of each call with one question, one call at a time, in the order of `rows`, `repeats` times."""
    shape = BatchShape(tokens=1, rows=1, multiple=backend.shape.multiple)
    batches = [batch_of(examples, rows[i : i + 1], backend.packed, shape) for i in range(len(rows))]
    for batch in batches:  # every shape once
        backend.logits(batch)
    found = []
    for _ in range(repeats):
        for batch in batches:
            start = time.perf_counter()
            backend.logits(batch)
            found.append(1e3 * (time.perf_counter() - start))
    return np.array(found)

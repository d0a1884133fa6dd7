"""Timing one engine: warmed up, repeated, with every call back on the host before the clock is read."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bertforge.data.loader import Examples
from bertforge.engines.base import BatchShape, Engine
from bertforge.engines.run import batch_of, run


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


def throughput(engine: Engine, examples: Examples, rows: np.ndarray, shape: BatchShape, repeats: int) -> Rate:
    """From token ids to logits, rows sorted by length and grouped by `shape`."""
    return rate(lambda: run(engine, examples, rows, shape=shape), len(rows), repeats)


def latencies_ms(engine: Engine, examples: Examples, rows: np.ndarray, repeats: int) -> np.ndarray:
    """Milliseconds of each call with one question, one call at a time, in the order of `rows`, `repeats` times."""
    shape = BatchShape(tokens=1, rows=1, multiple=engine.shape.multiple)
    batches = [batch_of(examples, rows[i : i + 1], engine.packed, shape) for i in range(len(rows))]
    for batch in batches:  # every shape once
        engine.logits(batch)
    found = []
    for _ in range(repeats):
        for batch in batches:
            start = time.perf_counter()
            engine.logits(batch)
            found.append(1e3 * (time.perf_counter() - start))
    return np.array(found)

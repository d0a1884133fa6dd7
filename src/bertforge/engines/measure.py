"""Timing one engine: warmed up, repeated, with every call back on the host before the clock is read."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from bertforge.batch import PackedBatch, PaddedBatch
from bertforge.data.loader import Examples
from bertforge.engines.base import BatchShape, Engine
from bertforge.engines.run import batch_of, run

SECONDS = 30.0
"""The most that the calls of one kind take: an engine that needs longer answers fewer of them."""
PAUSE_S = 0.5
OTHER_BYTES = 2**28
"""More than the caches of a CPU hold, or one core's share of them."""
Q = TypeVar("Q")


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


def singles(engine: Engine, examples: Examples, rows: np.ndarray) -> list[PackedBatch | PaddedBatch]:
    """Each of `rows` as a batch of its own, as `engine` takes it."""
    shape = BatchShape(tokens=1, rows=1, multiple=engine.shape.multiple)
    return [batch_of(examples, rows[i : i + 1], engine.packed, shape) for i in range(len(rows))]


def latencies_ms(ask: Callable[[Q], object], questions: Sequence[Q], repeats: int) -> np.ndarray:
    """Milliseconds of each call of `ask`, one at a time: the questions in order, `repeats` times, once asked before.

    Where that takes longer than SECONDS, only the first calls are made, and only the questions that were asked before.
    """
    known = _timed(ask, questions)
    return _timed(ask, [*questions[: len(known)]] * repeats)


def cold_ms(ask: Callable[[Q], object], questions: Sequence[Q]) -> np.ndarray:
    """Milliseconds of each call after a pause of PAUSE_S, in which threads fall asleep and clocks go down, with the
    caches of the CPU full of something else."""
    other = np.zeros(OTHER_BYTES, np.uint8)
    found = []
    for question in questions:
        other += 1
        time.sleep(PAUSE_S)
        start = time.perf_counter()
        ask(question)
        found.append(1e3 * (time.perf_counter() - start))
    return np.array(found)


def _timed(ask: Callable[[Q], object], questions: Sequence[Q]) -> np.ndarray:
    """Milliseconds of each call, up to the one during which SECONDS are over."""
    found: list[float] = []
    until = time.perf_counter() + SECONDS
    for question in questions:
        start = time.perf_counter()
        ask(question)
        end = time.perf_counter()
        found.append(1e3 * (end - start))
        if end > until:
            break
    return np.array(found)

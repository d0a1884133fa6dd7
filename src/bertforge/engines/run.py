"""Rows through a engine: sorted by length, grouped as the engine likes, answered in the caller's order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

from bertforge.batch import PackedBatch, PaddedBatch
from bertforge.data.loader import Examples
from bertforge.engines.base import BatchShape, Engine

K = TypeVar("K")


def run(
    engine: Engine,
    examples: Examples,
    rows: np.ndarray,
    *,
    shape: BatchShape | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> np.ndarray:
    """Logits `[rows, labels]` float32 in the order of `rows`, one at least; `shape` replaces the engine's own.

    `advance` is told the rows of each batch when it is done.
    """
    shape = shape or engine.shape
    places, *more = group(examples.lengths(rows), shape, engine.packed)
    if more:
        ((_, logits),) = run_each(engine, [(None, examples, rows)], shape=shape, advance=advance)
        return logits
    found = engine.logits(batch_of(examples, rows[places], engine.packed, shape))  # here: threads take time to wake
    advance(len(places))
    logits = np.empty_like(found)
    logits[places] = found
    return logits


def run_each(
    engine: Engine,
    lots: Iterable[tuple[K, Examples, np.ndarray]],
    *,
    shape: BatchShape | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> Generator[tuple[K, np.ndarray], None, None]:
    """`run` of the rows of each lot, in turn, beside what the caller knows the lot by.

    The engine goes on with the next lot while the caller works on the last: two are held at once. An exception of the
    engine is raised here, and what is not begun by then is left.
    """
    shape = shape or engine.shape
    waiting: deque[tuple[K, list[np.ndarray], list[Future[np.ndarray]]]] = deque()

    def compute(examples: Examples, rows: np.ndarray) -> np.ndarray:
        return engine.logits(batch_of(examples, rows, engine.packed, shape))

    with ThreadPoolExecutor(engine.streams, thread_name_prefix=engine.name) as pool:
        try:
            for key, examples, rows in lots:
                plan = group(examples.lengths(rows), shape, engine.packed)
                waiting.append((key, plan, [pool.submit(compute, examples, rows[places]) for places in plan]))
                if len(waiting) > 1:
                    yield _collected(*waiting.popleft(), advance)
            while waiting:
                yield _collected(*waiting.popleft(), advance)
        finally:
            pool.shutdown(cancel_futures=True)


def _collected(
    key: K, plan: list[np.ndarray], batches: list[Future[np.ndarray]], advance: Callable[[int], None]
) -> tuple[K, np.ndarray]:
    logits = np.empty((sum(map(len, plan)), batches[0].result().shape[1]), np.float32)
    for places, batch in zip(plan, batches, strict=True):
        logits[places] = batch.result()
        advance(len(places))
    return key, logits


def group(lengths: np.ndarray, shape: BatchShape, packed: bool) -> list[np.ndarray]:
    """Places in `lengths`, longest first, cut where another row would pass `shape`; a long row may stand alone.

    A row takes the tokens that it has where it is `packed`, and otherwise those of the longest beside it.
    """
    order = np.argsort(-lengths, kind="stable")
    return [order[start:stop] for start, stop in _cuts(lengths[order], shape, packed)]


def _cuts(lengths: np.ndarray, shape: BatchShape, packed: bool) -> Iterator[tuple[int, int]]:
    start, ends = 0, np.cumsum(lengths)
    while start < len(lengths):
        if packed:
            before = int(ends[start] - lengths[start])
            rows = max(1, int(np.searchsorted(ends, before + shape.tokens, side="right")) - start)
        else:
            rows = max(1, shape.tokens // shape.padded(int(lengths[start])))
        stop = min(len(lengths), start + min(rows, shape.rows or rows))
        yield start, stop
        start = stop


def padding_waste(lengths: np.ndarray, packed: bool, shape: BatchShape) -> float:
    """Tokens computed for one real token, less one: 0 without padding."""
    plan = group(lengths, shape, packed)
    if packed:
        computed = sum(shape.padded(int(lengths[places].sum()), len(places)) for places in plan)
    else:
        computed = sum(shape.computed(len(places), int(lengths[places].max())) for places in plan)
    return computed / int(lengths.sum()) - 1


def batch_of(examples: Examples, rows: np.ndarray, packed: bool, shape: BatchShape) -> PackedBatch | PaddedBatch:
    """The rows as the engine takes them; padding stands on the right."""
    if packed:
        return examples.pack(rows)[0]
    lengths = examples.lengths(rows)
    width = min(shape.padded(int(lengths.max())), max(examples.max_length, int(lengths.max())))
    mask = np.arange(width) < lengths[:, None]  # [rows, width]
    ids = np.zeros((len(rows), width), np.int64)
    ids[mask] = examples.pack(rows)[0].input_ids.numpy()
    return PaddedBatch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask.astype(np.int64)),
        tabular=examples.columns(rows),
    )

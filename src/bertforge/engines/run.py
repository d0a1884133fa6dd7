"""Rows through a engine: sorted by length, grouped as the engine likes, answered in the caller's order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from bertforge.batch import PackedBatch, PaddedBatch
from bertforge.data.loader import Examples
from bertforge.engines.base import BatchShape, Engine


def run(
    engine: Engine,
    examples: Examples,
    rows: np.ndarray,
    *,
    shape: BatchShape | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> np.ndarray:
    """Logits `[rows, labels]` float32 in the order of `rows`; `shape` replaces the engine's own.

    `advance` is told the rows of each batch when it is done.
    """
    plan = group(examples.lengths(rows), shape or engine.shape)
    logits: np.ndarray | None = None

    def compute(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return places, engine.logits(batch_of(examples, rows[places], engine.packed, shape or engine.shape))

    with ThreadPoolExecutor(engine.streams, thread_name_prefix=engine.name) as pool:
        for places, found in pool.map(compute, plan):
            if logits is None:
                logits = np.empty((len(rows), found.shape[1]), np.float32)
            logits[places] = found
            advance(len(places))
    assert logits is not None, "there is at least one row"
    return logits


def group(lengths: np.ndarray, shape: BatchShape) -> list[np.ndarray]:
    """Places in `lengths`, longest first, cut where another row would pass `shape`; a long row may stand alone."""
    order = np.argsort(-lengths, kind="stable")
    return [order[start:stop] for start, stop in _cuts(lengths[order], shape)]


def _cuts(lengths: np.ndarray, shape: BatchShape) -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(lengths):
        rows = max(1, shape.tokens // shape.padded(int(lengths[start])))
        stop = min(len(lengths), start + min(rows, shape.rows or rows))
        yield start, stop
        start = stop


def padding_waste(lengths: np.ndarray, packed: bool, shape: BatchShape) -> float:
    """Tokens computed for one real token, less one: 0 without padding."""
    if packed:
        return 0.0
    computed = sum(shape.computed(len(places), int(lengths[places].max())) for places in group(lengths, shape))
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

"""Which rows go into which pack: every row once, in the order given, within budgets of tokens and rows.

With a budget of 8 tokens and lengths 3, 4, 2, 8, 1 the packs are (3, 4), (2), (8), (1): a row that would not fit opens
the next pack, and the last pack may be small. Training packs a shuffled order; evaluation packs by length, so that the
rows of a pack cost the same. Where several processes share a pack, each gets about the same number of tokens.
"""

from __future__ import annotations

import numpy as np

from bertforge.errors import UsageError


def packs(lengths: np.ndarray, budget: int, most_rows: int | None = None) -> list[slice]:
    """Consecutive runs of at most `most_rows` of `lengths` (tokens a row) whose sum stays within `budget` tokens.

    Raises UsageError when a single row is longer than the budget.
    """
    if len(lengths) == 0:
        return []
    if (longest := int(lengths.max())) > budget:
        raise UsageError(
            f"a row has {longest} tokens, but a pack holds {budget}; raise tokens_per_step to {longest} or more"
        )
    ends = np.cumsum(lengths, dtype=np.int64)
    found, start, used = [], 0, 0
    while start < len(lengths):
        stop = int(np.searchsorted(ends, used + budget, side="right"))
        if most_rows is not None:
            stop = min(stop, start + most_rows)
        found.append(slice(start, stop))
        start, used = stop, int(ends[stop - 1])
    return found


def shares(lengths: np.ndarray, count: int) -> list[np.ndarray]:
    """Places in `lengths` (tokens a row) dealt to `count` hands, each in rising order; a hand may be empty.

    The longest first, to and fro: hands 0, 1, 2, 2, 1, 0, 0, 1, ..., so that all hold about the same tokens.
    """
    turn = np.arange(len(lengths)) % (2 * count)
    hand = np.empty(len(lengths), dtype=np.int64)
    hand[np.argsort(-lengths, kind="stable")] = np.minimum(turn, 2 * count - 1 - turn)
    return [np.flatnonzero(hand == each) for each in range(count)]

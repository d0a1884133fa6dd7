"""What a user should know of a prepared table before he trains on it: whatever would quietly spoil the model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bertforge.data.prepared import SET_ASIDE_FILE, PreparedData
from bertforge.data.schema import look_alikes

_MANY_ASIDE = 0.01  # share of rows set aside that is told loudly
_ENOUGH = 20  # rows set aside with a label, below which their shares say nothing
_SIGNIFICANT = 3.09  # standard deviations: a chance of one in a thousand


def concerns(data: PreparedData) -> list[str]:
    """One sentence for each thing that is wrong, with its figures; empty for a table that is fine."""
    facts = data.manifest
    aside = sum(reason["rows"] for reason in facts["set_aside"].values())
    total = facts["rows"] + aside
    found = []
    where = data.directory / SET_ASIDE_FILE
    if aside > _MANY_ASIDE * total:
        found.append(
            f"{aside:,} of {total:,} rows ({aside / total:.1%}) were set aside and will not be learnt: see {where}"
        )
    counts: dict[str, int] = facts["label_counts"]
    labels: dict[str, int] = facts["set_aside_labels"]
    kept, gone = list(counts.values()), [labels.get(name, 0) for name in counts]
    if sum(gone) >= _ENOUGH and shares_differ(kept, gone):
        names = list(counts)
        most = int(np.argmax(np.array(gone) / sum(gone) - np.array(kept) / sum(kept)))
        found.append(
            f"the rows set aside are not like the others: {gone[most] / sum(gone):.1%} of them are {names[most]!r}, "
            f"but {kept[most] / sum(kept):.1%} of the rows kept; the model would learn wrong shares: see {where}"
        )
    for group in look_alikes(counts):
        spelled = " and ".join(f"{name!r} ({counts[name]:,} row{'s' * (counts[name] > 1)})" for name in group)
        found.append(
            f"labels {spelled} differ only by case or spaces; they are different classes: fix the table if that is not "
            "meant"
        )
    return found


def shares_differ(some: Sequence[int], others: Sequence[int]) -> bool:
    """Whether two counts of the same labels have different shares: the chi-squared test of homogeneity at p = 0.001.

    The statistic is brought to a normal one by Wilson and Hilferty's cube root (1931), which needs no table.
    """
    table = np.array([some, others], dtype=np.float64)
    table = table[:, table.sum(axis=0) > 0]  # [2, labels]
    freedom = table.shape[1] - 1
    if freedom < 1:
        return False
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0, keepdims=True) / table.sum()
    statistic = float(((table - expected) ** 2 / expected).sum())
    spread = 2 / (9 * freedom)
    deviations: float = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return deviations > _SIGNIFICANT

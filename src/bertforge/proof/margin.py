"""How close is too close: the margin within which an engine's label may not be its model's.

`gap` is how far the largest logit of a row lies above the next, and `drop` by how much less far that label lies above
the others in the model itself. A label changes exactly where the drop is larger than the gap, so changed labels are
close ones. Asked again of the model, rows within the margin get the model's label.

Changed labels are too few to choose a margin by counting: 1,000 rows of which none is left still allow 0.4% (95%
interval). But every close row has a drop, whether or not its label changed, and any close gap might have met any of
them. So what a margin leaves is taken from all pairs of a gap and a close row's drop. The rows are a sample, so the
margin is wide enough for 95% of the samples drawn from them again. It also holds every label that changed, in case the
pairs miss something. Rows that are far from changing their label do not count, for their drops are others: 8 bits draw
large gaps together.

How well that holds on rows which chose nothing, by `benchmarks/cascade.py`: OpenVINO's INT8 of MiniLM changes 101
labels of 8,975 questions of the flagship table; 150 draws of the rows that choose (AMD EPYC, 2026-11-26).

| chosen on | by | asked again | left of all | more than 0.1% left |
| --- | --- | --- | --- | --- |
| 300 rows | the largest gap of a changed label | 3.4% | 0.265% | in 64% of the draws |
| 300 rows | this | 6.2% | 0.023% | in 6% |
| 1,000 rows | the largest gap of a changed label | 4.6% | 0.096% | in 35% |
| 1,000 rows | this | 5.9% | 0.018% | in 2% |
| 3,000 rows | the largest gap of a changed label | 5.5% | 0.034% | in 6% |
| 3,000 rows | this | 5.9% | 0.016% | in none |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from bertforge.evaluation.bootstrap import CONFIDENCE
from bertforge.evaluation.groups import wilson_interval
from bertforge.proof.tolerances import LEFT

_SAMPLES = 100
_CLOSE = 0.25  # share of the rows, those of the smallest gaps


@dataclass(frozen=True)
class Margin:
    """The margin of an engine, and what it does to the rows that it was chosen on."""

    value: float
    """Logits: rows whose gap is no larger are to be asked again."""
    rows: int
    """That it was chosen on."""
    asked: float
    """Share of them within it."""
    changed: int
    """Of their labels the engine's own, all of them within the margin."""
    left_high: float
    """What none of so many rows beyond it shows by itself: the upper end of the 95% interval of the share left."""

    @classmethod
    def of(cls, plain: np.ndarray, found: np.ndarray) -> Self:
        """From logits `[rows, labels]` of the model and of the engine."""
        gap, drop = gaps(found), drops(plain, found)
        changed = drop > gap
        rng = np.random.default_rng(0)
        samples = rng.integers(0, len(gap), (_SAMPLES, len(gap)))
        enough = np.quantile([_narrowest(gap[sample], drop[sample]) for sample in samples], CONFIDENCE)
        value = max(float(enough), float(gap[changed].max(initial=0.0)))
        return cls(
            value=value,
            rows=len(gap),
            asked=float((gap <= value).mean()),
            changed=int(changed.sum()),
            left_high=wilson_interval(0, len(gap))[1],
        )

    def __str__(self) -> str:
        return (
            f"{self.value:.2g} logits: --recheck MODEL would ask {self.asked:.1%} of {self.rows:,} validation rows "
            f"again, all {self.changed:,} whose labels changed among them"
        )


def gaps(logits: np.ndarray) -> np.ndarray:
    """`[rows]`: the largest of `[rows, labels]` logits less the next."""
    two = np.partition(logits, -2, axis=1)[:, -2:]
    gap: np.ndarray = two[:, 1] - two[:, 0]
    return gap


def drops(plain: np.ndarray, found: np.ndarray) -> np.ndarray:
    """`[rows]`: the gap of the label that `found` gives, less the gap that this label has in `plain`, which is below 0
    where that gives another."""
    label, every = found.argmax(1), np.arange(len(found))
    others = plain.copy()
    others[every, label] = -np.inf
    drop: np.ndarray = gaps(found) - (plain[every, label] - others.max(1))
    return drop


def _narrowest(gap: np.ndarray, drop: np.ndarray) -> float:
    """The narrowest margin that leaves no more than LEFT of the rows changed, had each gap met every close drop."""
    close = np.sort(drop[gap <= np.quantile(gap, _CLOSE)])
    widest = np.sort(gap)[::-1]
    chance = 1 - np.searchsorted(close, widest, side="right") / len(close)  # of a drop that is larger
    beyond = int(np.searchsorted(np.cumsum(chance) / len(gap), LEFT, side="right"))
    return float(widest[beyond]) if beyond < len(gap) else 0.0

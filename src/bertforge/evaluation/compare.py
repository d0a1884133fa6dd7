"""Two runs on the same rows: is one better, or is the difference chance?

Both runs saw the same rows, so differences are taken row by row, which cancels what is hard for both. Two answers:
a bootstrap interval of the difference (of accuracy and of loss), and McNemar's exact test (1947), which asks whether,
among the rows that only one run gets right, the two runs share them evenly.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bertforge.errors import DataError
from bertforge.evaluation.bootstrap import Estimate, estimate, resample_weights
from bertforge.evaluation.scores import score

SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Comparison:
    """A paired comparison. Differences are second minus first: accuracy as a share, loss in nats.

    `only_first_correct` and `only_second_correct` count the rows that one run alone gets right, `changed_labels` the
    rows that the runs label differently, and `p_value` is of McNemar's exact two-sided test.
    """

    first: str
    second: str
    rows: int
    first_accuracy: float
    second_accuracy: float
    accuracy_difference: Estimate
    loss_difference: Estimate
    changed_labels: int
    only_first_correct: int
    only_second_correct: int
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON, its verdict included."""
        return asdict(self) | {
            "accuracy_difference": self.accuracy_difference.to_dict(),
            "loss_difference": self.loss_difference.to_dict(),
            "verdict": self.verdict,
        }

    @property
    def verdict(self) -> str:
        """One line: what differs, by how much, and whether chance could do that."""
        points = f"{100 * (self.second_accuracy - self.first_accuracy):+.2f} points"
        low, high = self.accuracy_difference.low, self.accuracy_difference.high
        p = "p < 1e-12" if self.p_value < 1e-12 else f"p = {self.p_value:.2g}"
        interval = "" if low is None or high is None else f"{100 * low:+.2f} to {100 * high:+.2f}, "
        evidence = f"{interval}{p}, {self.changed_labels:,} of {self.rows:,} labels differ"
        if self.changed_labels == 0:
            return f"{self.second} and {self.first} give the same label to all {self.rows:,} rows"
        if self.p_value >= SIGNIFICANCE:
            return f"no difference shown between {self.second} and {self.first}: {points} ({evidence})"
        better = "more" if self.second_accuracy > self.first_accuracy else "less"
        return f"{self.second} is {better} accurate than {self.first}: {points} ({evidence})"


def compare(
    first_logits: npt.ArrayLike,
    second_logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    names: tuple[str, str] = ("first", "second"),
    bootstrap: int = 1000,
    seed: int = 42,
) -> Comparison:
    """Compares two runs from their logits `[rows, labels]` on the same rows in the same order.

    Raises DataError when the shapes differ, and as `scores.score` does.
    """
    first, second = score(first_logits, labels), score(second_logits, labels)
    if first.classes != second.classes:
        raise DataError(
            f"{names[0]} has {first.classes} labels and {names[1]} has {second.classes}; compare runs of one task"
        )
    rows = first.rows
    # [rows, 2]: what each row adds to the two differences
    differences = np.stack([second.correct.astype(float) - first.correct, second.losses - first.losses], axis=1)
    samples = np.stack([weights @ differences / rows for weights in resample_weights(rows, bootstrap, seed)])
    accuracy, loss = (estimate(differences[:, i].mean(), samples[:, i], rows) for i in range(2))
    only_first = int((first.correct & ~second.correct).sum())
    only_second = int((second.correct & ~first.correct).sum())
    return Comparison(
        first=names[0],
        second=names[1],
        rows=rows,
        first_accuracy=float(first.correct.mean()),
        second_accuracy=float(second.correct.mean()),
        accuracy_difference=accuracy,
        loss_difference=loss,
        changed_labels=int((first.predicted != second.predicted).sum()),
        only_first_correct=only_first,
        only_second_correct=only_second,
        p_value=mcnemar_p(only_first, only_second),
    )


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Two-sided exact p: how often a fair coin, tossed once per discordant row, splits them as unevenly or more.

    The tail is summed outwards from its largest term, which is exact (integers, rounded once); each further term is
    the last one times a ratio below 1, so the error stays within some units in the last place, and the sum ends
    where terms no longer count: about sqrt(n) terms for an even split of n rows.
    """
    rows, fewer = only_first + only_second, min(only_first, only_second)
    if 2 * fewer >= rows - 1:  # as even as it gets
        return 1.0
    term = total = math.comb(rows, fewer) / (1 << rows)
    for k in range(fewer, 0, -1):
        term *= k / (rows - k + 1)  # comb(n, k - 1) from comb(n, k)
        if term < total * 1e-17:
            break
        total += term
    return min(1.0, 2 * total)

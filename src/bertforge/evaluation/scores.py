"""Logits checked once and turned into what every metric needs: row losses, probabilities, predictions, log-odds.

Everything is float64 and goes through log-softmax, so a probability that rounds to exactly 0 or 1 still has a finite
loss and a place in the ranking.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bertforge.errors import DataError
from bertforge.evaluation.bootstrap import Floats

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Scores:
    """What the metrics read. `classes` is the number of labels.

    `true`, `predicted`: `[rows]` int64; `losses`: `[rows]` cross-entropy in nats; `confidence`: `[rows]` the
    predicted label's probability; `log_odds`: `[rows, classes]` log(p / (1 - p)) of every label.
    """

    true: Ints
    predicted: Ints
    losses: Floats
    confidence: Floats
    log_odds: Floats

    @property
    def rows(self) -> int:
        return len(self.true)

    @property
    def classes(self) -> int:
        return int(self.log_odds.shape[1])

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        return np.equal(self.true, self.predicted)


def score(logits: npt.ArrayLike, labels: npt.ArrayLike) -> Scores:
    """Scores of `logits` `[rows, classes]` against `labels` `[rows]`, integers from 0 to classes - 1.

    Ties between logits go to the lower label. Raises DataError when the shapes disagree, there is no row, a logit is
    NaN or infinite, or a label is out of range; the message names the first such row.
    """
    values, true = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    _check(values, true)
    true = true.astype(np.int64)
    rows = np.arange(len(true))
    log_probability = log_softmax(values)  # [rows, classes]
    predicted = values.argmax(axis=1).astype(np.int64)
    return Scores(
        true=true,
        predicted=predicted,
        losses=-log_probability[rows, true],
        confidence=np.exp(log_probability[rows, predicted]),
        log_odds=_log_odds(values),
    )


def log_softmax(logits: npt.NDArray[np.floating]) -> Floats:
    """Log-probabilities `[rows, classes]` in float64 of `logits` `[rows, classes]`."""
    shifted = logits - logits.max(axis=1, keepdims=True).astype(np.float64)
    log_probability: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return log_probability


def softmax(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """Probabilities `[rows, classes]` of float32 `logits` `[rows, classes]`, as they are served: in float32."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances: npt.NDArray[np.float32] = powers / powers.sum(axis=1, keepdims=True)
    return chances


def _check(values: Floats, labels: npt.NDArray[np.generic]) -> None:
    if values.ndim != 2 or values.shape[1] < 2:
        raise DataError(f"logits have shape {list(values.shape)}; give [rows, labels] with two labels or more")
    if labels.shape != (len(values),):
        raise DataError(f"labels have shape {list(labels.shape)} for {len(values)} rows of logits; give one per row")
    if len(values) == 0:
        raise DataError("there are no rows to evaluate; give a split or a table with at least one row")
    if labels.dtype.kind not in "iu":
        raise DataError(f"labels are {labels.dtype}; give integers from 0 to {values.shape[1] - 1}")
    broken = ~np.isfinite(values).all(axis=1)
    if broken.any():
        row = int(broken.argmax())
        raise DataError(
            f"logits of {int(broken.sum())} rows are NaN or infinite, first in row {row}: {values[row].tolist()}; "
            "the model diverged or ran in too low a precision: lower the learning rate or use fp32"
        )
    outside = (labels < 0) | (labels >= values.shape[1])  # type: ignore[operator]
    if outside.any():
        row = int(outside.argmax())
        raise DataError(f"row {row} has label {labels[row]}, but the logits have labels 0 to {values.shape[1] - 1}")


def _log_odds(values: Floats) -> Floats:
    """log(p / (1 - p)) of every label: its logit less the log-sum-exp of the others. For two labels, the margin."""
    odds = np.empty_like(values)
    for label in range(values.shape[1]):
        others = np.delete(values, label, axis=1)
        highest = others.max(axis=1)
        odds[:, label] = values[:, label] - highest - np.log(np.exp(others - highest[:, None]).sum(axis=1))
    return odds

"""One number that makes a model's probabilities honest: temperature scaling (Guo et al. 2017, arXiv:1706.04599).

softmax(logits / T) keeps every predicted label, since dividing does not change the order, and moves all confidences
together: down for T > 1, up for T < 1. T minimises the loss on validation rows. In b = 1 / T that loss is convex, and
its slope is the mean over rows of (expected logit - the label's logit), so halving an interval finds the minimum.

With every validation row right, the loss falls for ever as T goes to 0. Platt's targets (1999, section 2.2) prevent it:
of n rows, a share of 1 / (n + 1) of each label is spread over all labels, as if one more row could have any label.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bertforge.evaluation.scores import score

COLDEST, HOTTEST = 0.05, 20.0  # the temperatures that are looked at
_HALVINGS = 40  # of log(HOTTEST / COLDEST): to 1e-11


def fit_temperature(logits: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """The temperature for `logits` `[rows, labels]` of validation rows and their `labels` `[rows]`.

    It lies between COLDEST and HOTTEST, and is 1 where another would not lower the loss. Raises DataError as
    `scores.score` does: for no rows, for logits that are NaN or infinite, for labels out of range.
    """
    before = score(logits, labels)
    values = np.asarray(logits, np.float64)
    centred = values - values.max(axis=1, keepdims=True)  # [rows, labels]
    spread = 1 / (before.rows + 1)
    target = (1 - spread) * centred[np.arange(before.rows), before.true].mean() + spread * centred.mean()

    def too_sharp(temperature: float) -> bool:
        weights = np.exp(centred / temperature)
        expected = (weights * centred).sum(axis=1) / weights.sum(axis=1)  # [rows]
        return bool(expected.mean() > target)

    low, high = np.log(COLDEST), np.log(HOTTEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if too_sharp(np.exp(middle)) else (low, middle)
    found = float(np.exp((low + high) / 2))
    return found if score(values / found, labels).losses.mean() < before.losses.mean() else 1.0

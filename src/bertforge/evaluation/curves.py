"""The points behind two pictures: the ROC curve and the reliability diagram."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bertforge.evaluation.bootstrap import Floats
from bertforge.evaluation.groups import GroupAccuracy, group_accuracy
from bertforge.evaluation.metrics import CALIBRATION_BINS, Ranking, calibration_bins
from bertforge.evaluation.scores import score


@dataclass(frozen=True)
class RocCurve:
    """One label against the rest. The three arrays are `[points]`, from (0, 0) to (1, 1).

    `thresholds[i]` is the label's probability from which on a row counts as positive at point i; the first is
    infinite: no row does.
    """

    label: str
    false_positive_rate: Floats
    true_positive_rate: Floats
    thresholds: Floats


def roc_curves(logits: npt.ArrayLike, labels: npt.ArrayLike, label_names: Sequence[str]) -> tuple[RocCurve, ...]:
    """The positive label's curve when there are two labels, else one curve per label against the rest.

    A label that no row has, or that every row has, has no curve and is left out.
    """
    scores = score(logits, labels)
    curves = []
    for label in (1,) if scores.classes == 2 else range(scores.classes):
        positive = scores.true == label
        if positive.all() or not positive.any():
            continue
        ranking = Ranking(scores.log_odds[:, label], positive)
        rates = [np.r_[0.0, np.cumsum(w) / w.sum()] for w in ranking.group_weights(np.ones(scores.rows))]
        thresholds = np.r_[np.inf, 1 / (1 + np.exp(-ranking.thresholds))]
        curves.append(RocCurve(label_names[label], rates[1], rates[0], thresholds))
    return tuple(curves)


@dataclass(frozen=True)
class ReliabilityBin:
    """Rows whose top probability lies in (`above`, `up_to`]: their mean `confidence` and their `accuracy`."""

    above: float
    up_to: float
    confidence: float
    accuracy: GroupAccuracy


def reliability(logits: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[ReliabilityBin, ...]:
    """The bins of the expected calibration error, lowest first; empty bins are left out."""
    scores = score(logits, labels)
    bins = calibration_bins(scores.confidence)
    found = []
    for index in np.unique(bins):
        inside = bins == index
        above, up_to = index / CALIBRATION_BINS, (index + 1) / CALIBRATION_BINS
        accuracy = group_accuracy(f"{above:.3f} to {up_to:.3f}", scores.correct[inside])
        found.append(ReliabilityBin(above, up_to, float(scores.confidence[inside].mean()), accuracy))
    return tuple(found)

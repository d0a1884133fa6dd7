"""Classification metrics from logits and labels alone, each with a 95% bootstrap interval over rows.

Definitions
- loss: mean cross-entropy, nats. No class weights, no label smoothing, whatever training used.
- precision, recall, F1: with two labels, of the positive one (index 1); with more, the macro mean over the labels
  that occur as a true or a predicted label, where 0/0 counts as 0 (scikit-learn's default).
- macro F1: the macro mean of F1, with two labels too, where it weighs the rare one as much as the frequent one.
- ROC-AUC: the share of (positive, negative) pairs ranked rightly, ties counted half; with more than two labels, the
  macro mean of one label against the rest. Without both kinds of row it is undefined.
- calibration error: expected calibration error over 15 equal-width bins of the top probability (Guo et al. 2017,
  section 2, arXiv:1706.04599). Its interval is the mirrored one; `bootstrap` says why.
- confusion matrix: counts, `[true][predicted]`; up to 30 labels, for memory grows with their square, with intervals.

Method. Every metric is a function of the row weights of a resample (see `bootstrap`), and all metrics share the
resamples. Rows are sorted once per label for the AUC; each resample then needs one cumulative sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from bertforge.errors import ArtifactError, DataError
from bertforge.evaluation.bootstrap import CONFIDENCE, Estimate, Floats, estimate, mirrored, resample_weights
from bertforge.evaluation.scores import Ints, Scores, score

CALIBRATION_BINS = 15
MOST_LABELS = 30  # with intervals of the confusion matrix: 1,000 resamples of 30 x 30 cells take 7 MB
# The scalar metrics, in the order in which they are shown.
SCALARS = ("loss", "accuracy", "precision", "recall", "f1", "macro_f1", "roc_auc", "calibration_error")


@dataclass(frozen=True)
class Metrics:
    """Every metric of one set of rows. Shares, not percentages; loss in nats; confusion cells are row counts."""

    rows: int
    label_names: tuple[str, ...]
    average: str  # what precision, recall, F1 and ROC-AUC speak of: one label, or the mean over several
    bootstrap: int
    seed: int
    loss: Estimate
    accuracy: Estimate
    precision: Estimate
    recall: Estimate
    f1: Estimate
    macro_f1: Estimate
    roc_auc: Estimate
    calibration_error: Estimate
    confusion: tuple[tuple[Estimate, ...], ...]  # [true][predicted]

    def scalars(self) -> dict[str, Estimate]:
        """The metrics that are one number each, by name, in the order in which they are shown."""
        return {name: getattr(self, name) for name in SCALARS}

    def to_dict(self) -> dict[str, Any]:
        """The metrics as JSON."""
        head = {"rows": self.rows, "label_names": list(self.label_names), "average": self.average}
        method = {"confidence": CONFIDENCE, "bootstrap": self.bootstrap, "seed": self.seed}
        cells = [[cell.to_dict() for cell in row] for row in self.confusion]
        return head | method | {name: e.to_dict() for name, e in self.scalars().items()} | {"confusion": cells}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Metrics:
        """Reads what `to_dict` wrote; raises ArtifactError naming the keys that are missing."""
        missing = [f.name for f in fields(cls) if f.name not in found]
        if missing:
            raise ArtifactError(f"metrics lack {', '.join(missing)}; make them again with `bertforge evaluate`")
        return cls(
            rows=found["rows"],
            label_names=tuple(found["label_names"]),
            average=found["average"],
            bootstrap=found["bootstrap"],
            seed=found["seed"],
            confusion=tuple(tuple(Estimate.from_dict(cell) for cell in row) for row in found["confusion"]),
            **{name: Estimate.from_dict(found[name]) for name in SCALARS},
        )


def classification_metrics(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    label_names: Sequence[str],
    *,
    bootstrap: int = 1000,
    seed: int = 42,
) -> Metrics:
    """Metrics of `logits` `[rows, labels]` against `labels` `[rows]`, with intervals from `bootstrap` resamples.

    Raises DataError as `scores.score` does, and when `label_names` does not name every column of the logits.
    """
    scores = score(logits, labels)
    if len(label_names) != scores.classes:
        raise DataError(f"{len(label_names)} label names {list(label_names)} for {scores.classes} columns of logits")
    if bootstrap < 1:
        raise DataError(f"bootstrap is {bootstrap}; an interval needs at least 1 resample, and 1000 are usual")
    statistic = _Statistic(scores)
    on_all_rows = statistic(np.ones(scores.rows))
    on_resamples = np.stack([statistic(weights) for weights in resample_weights(scores.rows, bootstrap, seed)])
    reasons = _why_undefined(scores, label_names)
    scalars = {
        name: estimate(on_all_rows[column], on_resamples[:, column], scores.rows, reasons.get(name, ""))
        for column, name in enumerate(SCALARS)
    }
    scalars["calibration_error"] = mirrored(scalars["calibration_error"])
    cells = [
        estimate(count, on_resamples[:, len(SCALARS) + cell], scores.rows)
        if statistic.with_cells
        else Estimate(float(count), None, None, f"no interval with more than {MOST_LABELS} labels")
        for cell, count in enumerate(np.bincount(statistic.cell, minlength=scores.classes**2))
    ]
    return Metrics(
        rows=scores.rows,
        label_names=tuple(label_names),
        average=f"label {label_names[1]!r}" if scores.classes == 2 else f"macro mean of {scores.classes} labels",
        bootstrap=bootstrap,
        seed=seed,
        confusion=tuple(tuple(cells[i : i + scores.classes]) for i in range(0, len(cells), scores.classes)),
        **scalars,
    )


class _Statistic:
    """All metrics of one weighting of the rows: `weights [rows] -> [len(SCALARS) + classes^2]`, NaN where undefined.

    With more than `MOST_LABELS` classes the cells of the confusion matrix are left out.
    """

    def __init__(self, scores: Scores) -> None:
        self.scores = scores
        self.with_cells = scores.classes <= MOST_LABELS
        self.cell = scores.true * scores.classes + scores.predicted
        self.bin = calibration_bins(scores.confidence)
        self.gap = scores.confidence - scores.correct
        ranked = (1,) if scores.classes == 2 else range(scores.classes)
        self.rankings = [Ranking(scores.log_odds[:, label], scores.true == label) for label in ranked]

    def __call__(self, weights: Floats) -> Floats:
        classes, total = self.scores.classes, weights.sum()
        cells: Floats = np.bincount(self.cell, weights, classes * classes).astype(np.float64)
        confusion = cells.reshape(classes, classes)  # [true, predicted]
        loss = weights @ self.scores.losses / total
        accuracy = confusion.trace() / total
        gaps = np.bincount(self.bin, weights * self.gap, CALIBRATION_BINS)
        auc = np.mean([ranking.auc(weights) for ranking in self.rankings])
        error = np.abs(gaps).sum() / total
        scalars = [loss, accuracy, *_precision_recall_f1(confusion), _macro_f1(confusion), auc, error]
        return np.concatenate([scalars, cells]) if self.with_cells else np.array(scalars)


class Ranking:
    """Rows sorted once by score, so that the ROC curve and its area cost one cumulative sum per resample."""

    def __init__(self, scores: Floats, positive: npt.NDArray[np.bool_]) -> None:
        self.order = np.argsort(-scores, kind="stable")  # highest score first
        descending = scores[self.order]
        self.starts = np.flatnonzero(np.r_[True, descending[1:] != descending[:-1]])  # one group per distinct score
        self.thresholds = descending[self.starts]
        self.positive = positive[self.order].astype(np.float64)

    def group_weights(self, weights: Floats) -> tuple[Floats, Floats]:
        """Weight of the positive and of the negative rows at each distinct score, highest first, each `[groups]`."""
        ordered = weights[self.order]
        positive = ordered * self.positive
        return np.add.reduceat(positive, self.starts), np.add.reduceat(ordered - positive, self.starts)

    def auc(self, weights: Floats) -> float:
        """Area under the ROC curve: pairs ranked rightly, ties half; NaN when the weights leave no pair."""
        positive, negative = self.group_weights(weights)
        pairs = positive.sum() * negative.sum()
        above = np.cumsum(positive) - positive / 2  # positives ranked above each group's negatives
        return float(above @ negative / pairs) if pairs else float("nan")


def calibration_error(
    logits: npt.ArrayLike, labels: npt.ArrayLike, *, bootstrap: int = 1000, seed: int = 42
) -> Estimate:
    """The expected calibration error of `logits` `[rows, classes]` alone; raises as `scores.score`."""
    scores = score(logits, labels)
    bins, gap = calibration_bins(scores.confidence), scores.confidence - scores.correct

    def error(weights: Floats) -> float:
        return float(np.abs(np.bincount(bins, weights * gap, CALIBRATION_BINS)).sum() / scores.rows)

    samples = np.array([error(weights) for weights in resample_weights(scores.rows, bootstrap, seed)])
    return mirrored(estimate(error(np.ones(scores.rows)), samples, scores.rows))


def calibration_bins(confidence: Floats) -> Ints:
    """The bin of each top probability `[rows]`: bin b holds (b / 15, (b + 1) / 15], as in Guo et al. 2017."""
    bins: Ints = np.clip(np.ceil(confidence * CALIBRATION_BINS) - 1, 0, CALIBRATION_BINS - 1).astype(np.int64)
    return bins


def macro_f1(true: Ints, predicted: Ints, classes: int) -> float:
    """Macro F1 of predicted labels `[rows]` against the true ones `[rows]`."""
    cells = np.bincount(true * classes + predicted, minlength=classes * classes)
    return _macro_f1(cells.reshape(classes, classes).astype(np.float64))


def _macro_f1(confusion: Floats) -> float:
    """The mean F1 of the labels that occur as a true or a predicted label."""
    counts = confusion.sum(axis=1) + confusion.sum(axis=0)
    occurs = counts > 0
    return float((2 * confusion.diagonal()[occurs] / counts[occurs]).mean())


def _precision_recall_f1(confusion: Floats) -> tuple[float, float, float]:
    """Of label 1 when there are two labels, NaN for 0/0; else the macro mean over the labels that occur."""
    right, true, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    ratios = ((right, predicted), (right, true), (2 * right, true + predicted))
    if len(confusion) == 2:
        precision, recall, f1 = (a[1] / b[1] if b[1] else float("nan") for a, b in ratios)
    else:
        occurs = true + predicted > 0
        precision, recall, f1 = (np.mean((a / np.maximum(b, 1))[occurs]) for a, b in ratios)
    return float(precision), float(recall), float(f1)


def _why_undefined(scores: Scores, names: Sequence[str]) -> dict[str, str]:
    """The reason to give for each metric that could be undefined on these rows."""
    absent = [name for label, name in enumerate(names) if not (scores.true == label).any()]
    return {
        "precision": f"no row is predicted as {names[1]!r}",
        "recall": f"no row has the label {names[1]!r}",
        "f1": f"no row has the label {names[1]!r} or is predicted as it",
        "roc_auc": f"no row has the label {' or '.join(map(repr, absent))}",
    }

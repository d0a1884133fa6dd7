"""Where a model is right and where it is not: accuracy by text length and by month, and its most confident mistakes.

Groups are small, so their intervals are Wilson's (1927), which stay inside 0 to 1 and cover well for few rows, where
a bootstrap of a group without a single mistake would claim certainty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from bertforge.errors import DataError
from bertforge.evaluation.bootstrap import CONFIDENCE
from bertforge.evaluation.scores import score

LENGTH_EDGES = (64, 128, 256, 512)
EXCERPT_CHARACTERS = 240


@dataclass(frozen=True)
class GroupAccuracy:
    """Accuracy of one group of rows with its 95% Wilson interval `low` to `high`, all shares."""

    name: str
    rows: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Mistake:
    """A wrongly labelled row: its id, the predicted label's probability, both labels, and the start of its text."""

    row: str
    probability: float
    true: str
    predicted: str
    text: str


def wilson_interval(correct: int, rows: int) -> tuple[float, float]:
    """The 95% Wilson score interval of `correct` out of `rows` >= 1."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share, shrink = correct / rows, 1 + z * z / rows
    middle = (share + z * z / (2 * rows)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    # At 0 and at `rows` the bound is exact; rounding would put it a hair outside.
    return (0.0 if correct == 0 else middle - half), (1.0 if correct == rows else middle + half)


def group_accuracy(name: str, correct: npt.NDArray[np.bool_]) -> GroupAccuracy:
    """The accuracy of one group from `correct` `[rows of the group]`, which is not empty."""
    right, rows = int(correct.sum()), len(correct)
    return GroupAccuracy(name, rows, right / rows, *wilson_interval(right, rows))


def by_length(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    lengths: npt.ArrayLike,
    *,
    edges: Sequence[int] = LENGTH_EDGES,
) -> tuple[GroupAccuracy, ...]:
    """Accuracy by text length, shortest first.

    `lengths` `[rows]` are token counts. A group holds the lengths above the previous edge up to its own edge, the
    last one those above every edge; groups without rows are left out.
    """
    correct = score(logits, labels).correct
    tokens = _column(lengths, len(correct), "lengths")
    lows = (0, *(edge + 1 for edge in edges))
    names = [*(f"{low} to {edge}" for low, edge in zip(lows, edges, strict=False)), f"over {edges[-1]}"]
    groups = np.searchsorted(np.asarray(edges), tokens, side="left")
    return tuple(group_accuracy(names[group], correct[groups == group]) for group in np.unique(groups))


def by_month(logits: npt.ArrayLike, labels: npt.ArrayLike, dates: npt.ArrayLike) -> tuple[GroupAccuracy, ...]:
    """Accuracy by calendar month (`2012-07`), earliest first; rows without a date form a last group, `no date`.

    `dates` `[rows]` is datetime64, such as a pandas date column without a time zone. Raises DataError for others.
    """
    correct = score(logits, labels).correct
    column = _column(dates, len(correct), "dates")
    if column.dtype.kind != "M":
        raise DataError(f"dates are {column.dtype}, not datetime64; read them with pandas.to_datetime first")
    found, group_of = np.unique(column.astype("datetime64[M]"), return_inverse=True)  # sorts a missing date last
    return tuple(
        group_accuracy("no date" if np.isnat(month) else str(month), correct[group_of == group])
        for group, month in enumerate(found)
    )


def confident_mistakes(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    label_names: Sequence[str],
    *,
    texts: Sequence[str] | None = None,
    row_ids: Sequence[object] | None = None,
    top: int = 20,
    characters: int = EXCERPT_CHARACTERS,
) -> tuple[Mistake, ...]:
    """The `top` wrong rows of highest predicted probability, highest first, ties in row order, each with so many
    `characters` of its text.

    `texts` and `row_ids` are `[rows]`; without ids a row is named by its position, from 0.
    """
    scores = score(logits, labels)
    # Through NumPy, so that a pandas column is read by position and not by its index.
    text_of = None if texts is None else _column(np.asarray(texts, dtype=object), scores.rows, "texts")
    id_of = np.arange(scores.rows) if row_ids is None else _column(np.asarray(row_ids), scores.rows, "row_ids")
    wrong = np.flatnonzero(~scores.correct)
    # Log-odds still tell apart probabilities that round to 1.
    certainty = scores.log_odds[wrong, scores.predicted[wrong]]
    return tuple(
        Mistake(
            row=str(id_of[row]),
            probability=float(scores.confidence[row]),
            true=label_names[scores.true[row]],
            predicted=label_names[scores.predicted[row]],
            text="" if text_of is None else excerpt(str(text_of[row]), characters),
        )
        for row in wrong[np.argsort(-certainty, kind="stable")[:top]].tolist()
    )


def excerpt(text: str, characters: int = EXCERPT_CHARACTERS) -> str:
    """The start of a text on one line, without control characters, cut at a word where it can be."""
    visible = "".join(character if character.isprintable() else " " for character in text[: 4 * characters])
    line = " ".join(visible.split())
    if len(line) <= characters:
        return line
    cut = line[:characters]
    return (cut[: cut.rfind(" ")] if " " in cut else cut) + " …"


def _column(values: npt.ArrayLike, rows: int, name: str) -> npt.NDArray[np.generic]:
    column = np.asarray(values)
    if column.shape != (rows,):
        raise DataError(f"{name} have shape {list(column.shape)} for {rows} rows; give one per row")
    return column

"""Probabilities where labels are met in other shares than in training (Saerens, Latinne and Decaestecker 2002,
Neural Computation 14(1), section 2.2).

A model learns how likely each label is among its train rows. Where 47% of the train rows are closed and 6% of what is
asked in production, it says "closed" far too often. If texts of one label are alike in both places and only the shares
of the labels differ, Bayes' rule gives the right probabilities: each is multiplied by new share / train share, and the
products are scaled to a sum of 1. On logits that is an addition of log(new share / train share).

Train shares are those that the loss saw: with `class_weights=balanced` all labels weighed the same, whatever the table.

How good a model is under other shares is measured on rows that have them (`rows_with_shares`): rows of the labels that
are too many are left out. Weights would keep them all, but then every count, interval and picture of an evaluation
would need its weighted twin, and what they would add is little: a decision's errors at new shares hang on the rows of
the frequent label, and those are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bertforge.errors import ArtifactError, UsageError

_WHOLE = 1e-6  # by how much shares may miss 1


def train_shares(manifest: Mapping[str, Any]) -> tuple[float, ...]:
    """The share of each label that the loss saw; raises ArtifactError for a folder that does not tell."""
    if "label_shares" not in manifest:
        raise ArtifactError(
            "the model does not tell which shares its labels had in training, for an earlier version trained it; "
            "train it again, or leave the prior out"
        )
    return tuple(map(float, manifest["label_shares"]))


def complete_shares(given: Mapping[str, float], labels: Sequence[str], trained: Sequence[float]) -> tuple[float, ...]:
    """Shares of all `labels` from those that are `given`; the others divide what is left as in training.

    Raises UsageError for a label that the model does not know, and for shares that are none or leave no room for the
    labels that are not named.
    """
    if unknown := [name for name in given if name not in labels]:
        raise UsageError(f"prior names the label {unknown[0]!r}, but the model knows {', '.join(labels)}")
    for name, share in given.items():
        if not 0 < share < 1:
            raise UsageError(f"prior {name}={share:g}: a share lies between 0 and 1, such as {name}=0.06")
    total = sum(given.values())
    others = [share for name, share in zip(labels, trained, strict=True) if name not in given]
    if others and not total < 1:
        raise UsageError(f"the prior's shares add up to {total:g}, which leaves nothing for the labels not named")
    if not others and abs(total - 1) > _WHOLE:
        raise UsageError(f"the prior names every label, and its shares add up to {total:g}, not to 1")
    scale = (1 - total) / sum(others) if others else 0.0
    return tuple(given.get(name, scale * share) for name, share in zip(labels, trained, strict=True))


def as_text(labels: Sequence[str], shares: Sequence[float]) -> str:
    """As after --prior."""
    return ", ".join(f"{name}={share:.4g}" for name, share in zip(labels, shares, strict=True))


def shifts(trained: Sequence[float], new: Sequence[float]) -> npt.NDArray[np.float64]:
    """What is added to the logits of each label, `[labels]`."""
    found: npt.NDArray[np.float64] = np.log(np.asarray(new, np.float64)) - np.log(np.asarray(trained, np.float64))
    return found


def corrected(probabilities: npt.ArrayLike, trained: Sequence[float], new: Sequence[float]) -> npt.NDArray[np.float64]:
    """`probabilities` `[rows, labels]` of a model that was trained at the shares `trained`, at the shares `new`."""
    weighed = np.asarray(probabilities, np.float64) * np.exp(shifts(trained, new))
    found: npt.NDArray[np.float64] = weighed / weighed.sum(axis=1, keepdims=True)
    return found


def rows_with_shares(labels: npt.NDArray[np.int64], shares: Sequence[float]) -> npt.NDArray[np.int64]:
    """As many of the rows with these `labels` `[rows]` as have the `shares` `[labels]`, ascending.

    Rows of a label that is too frequent are left out evenly from first to last, so the same rows are kept each time.
    Raises UsageError when a label is so rare among the rows that no row of it, or of another one, would be left.
    """
    counts = np.bincount(labels, minlength=len(shares))
    total = float((counts / np.asarray(shares)).min())  # rows in all, so that no label needs more than there are
    wanted = np.floor(np.asarray(shares) * total + _WHOLE).astype(np.int64)
    if (wanted < 1).any():
        raise UsageError(
            f"{len(labels):,} rows are too few for shares of {', '.join(f'{share:.3g}' for share in shares)}: "
            "of some label no row would be left; take more rows, or shares that are less far from theirs"
        )
    kept = []
    for label, count in enumerate(wanted):
        there = np.flatnonzero(labels == label)
        kept.append(there[np.linspace(0, len(there) - 1, count).round().astype(np.int64)])
    return np.sort(np.concatenate(kept))

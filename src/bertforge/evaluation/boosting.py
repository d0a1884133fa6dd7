"""Columns alone: gradient-boosted trees (scikit-learn) without the text, the floor under a model that reads both.

Trees read numbers as they are, missing ones included; names as categories; and the names of a multi-valued column by
how often rows with them have each label. Those rates come from train rows alone, and for a train row from the folds it
is not in: else a name seen once would give its own row's label away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from bertforge.columns.transform import TabularSpec

FOLDS = 5
PRIOR_ROWS = 8.0  # a name's rate is pulled towards the overall one as by so many rows more
MAX_CATEGORIES = 254  # the trees' limit is 255; rarer names count as missing
MOST_TREES = 600  # of all labels together; one label of two needs half


def boosted_trees(classes: int, categories: list[str] | None, seed: int) -> Any:
    """Unfitted trees for `classes` labels; `categories` are the columns of names.

    Each round fits a tree a label, so many labels get fewer rounds of larger steps: 300 of 0.05 for two labels, 50 of
    0.3 from twelve on.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    rounds = max(50, MOST_TREES // classes)
    return HistGradientBoostingClassifier(
        learning_rate=15 / rounds,
        max_iter=rounds,
        max_leaf_nodes=20,
        min_samples_leaf=40,
        l2_regularization=5.0,
        max_features=0.5,
        early_stopping=False,
        categorical_features=categories,
        random_state=seed,
    )


def encode_columns(
    frame: pd.DataFrame, spec: TabularSpec, labels: np.ndarray, train: np.ndarray, asked: np.ndarray
) -> tuple[pd.DataFrame, list[str] | None]:
    """The columns of `frame` as the trees read them, and which of them are categories (None: none).

    `train` and `asked` are row numbers, and the index of the result; `labels` `[rows]` are read of train rows alone.
    """
    wanted = np.concatenate([train, asked])
    numeric, several = spec.holding("number"), spec.holding("names")
    encoded: dict[str, Any] = {}
    categories = []
    for name in frame.columns:
        column = frame[name].iloc[wanted].replace("", None)  # source columns are strings, "" where absent
        if name in numeric:
            numbers = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, na_value=np.nan)
            encoded[name] = np.where(np.isfinite(numbers), numbers, np.nan)
        elif name in several:
            names = [value.split() if isinstance(value, str) else [] for value in frame[name].tolist()]
            rates = _rates_of_names(names, labels, train, asked)
            encoded |= {f"{name}:{kind}": rates[wanted, i] for i, kind in enumerate(_kinds(labels[train]))}
        else:
            frequent = column.iloc[: len(train)].value_counts().index[:MAX_CATEGORIES]
            encoded[name] = pd.Categorical(column.where(column.isin(frequent)), categories=frequent)
            categories.append(name)
    found = pd.DataFrame(encoded, index=wanted)
    empty = found.columns[found.iloc[: len(train)].isna().all()].difference(categories)
    found[empty] = 0.0  # the trees refuse a column without a number
    return found, categories or None


def _told_apart(labels: np.ndarray) -> list[int]:
    """The labels whose rates are computed: of two, the second says it all."""
    present: list[int] = np.unique(labels).tolist()
    return present[1:] if len(present) == 2 else present


def _kinds(labels: np.ndarray) -> list[str]:
    return [f"{kind} of {label}" for kind in ("mean", "least", "most", "sum") for label in _told_apart(labels)]


def _rates_of_names(names: list[list[str]], labels: np.ndarray, train: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """[rows, 4 * labels] mean, least, most and sum of the log-odds of a row's names; NaN for a row without names."""
    from sklearn.model_selection import KFold

    rates = np.full((len(names), len(_kinds(labels[train]))), np.nan)
    told_apart = _told_apart(labels[train])
    for rest, fold in KFold(min(FOLDS, len(train)), shuffle=True, random_state=0).split(train):
        _fill_rates(rates, names, labels, told_apart, train[rest], train[fold])
    _fill_rates(rates, names, labels, told_apart, train, asked)
    return rates


def _fill_rates(
    rates: np.ndarray,
    names: list[list[str]],
    labels: np.ndarray,
    told_apart: list[int],
    known: np.ndarray,
    asked: np.ndarray,
) -> None:
    """Fills `rates` of the rows `asked` by what the rows `known` teach."""
    number = {name: i for i, name in enumerate(dict.fromkeys(name for row in known for name in names[row]))}
    is_label = labels[known][:, None] == np.array(told_apart)  # [known, labels]
    overall = is_label.mean(axis=0)
    seen, having = np.zeros((len(number) + 1, 1)), np.zeros((len(number) + 1, len(told_apart)))
    for row, its in zip(known, is_label, strict=True):
        for name in names[row]:
            seen[number[name]] += 1
            having[number[name]] += its
    rate = (having + PRIOR_ROWS * overall) / (seen + PRIOR_ROWS)  # [names + 1, labels], the last of unseen ones
    rate = rate.clip(1e-6, 1 - 1e-6)  # a fold may lack a label
    log_odds = np.log(rate / (1 - rate))
    for row in asked:
        if places := [number.get(name, len(number)) for name in names[row]]:
            odds = log_odds[places]  # [its names, labels]
            rates[row] = np.concatenate([odds.mean(0), odds.min(0), odds.max(0), odds.sum(0)])

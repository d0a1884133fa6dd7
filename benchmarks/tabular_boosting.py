"""Columns alone: gradient-boosted trees without the text, the floor under a model that reads both.

    python benchmarks/tabular_boosting.py PREPARED [--columns NAME=a,b,c ...] [--multi tags] [--json FILE]

PREPARED is a folder made by `bertforge prepare`. Each list of columns is one row of the result: trees are fitted on the
train rows with five seeds and scored on the validation rows; the test rows take no part. A seed draws the columns that
each split of a tree may choose from. Accuracy and loss are means over the seeds; the interval is the 95% bootstrap over
seeds and validation rows, so it speaks of other seeds and other questions alike.

Trees read numbers as they are, missing ones included; names as categories; and the names of a multi-valued column
(`--multi`) by how often rows with them were of class 1. Those rates come from train rows alone, and for a train row
from the folds it is not in.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold

from bertforge.artifact import write_json
from bertforge.data.features import FEATURES
from bertforge.data.prepared import PreparedData
from bertforge.data.schema import CLOSED_DATE
from bertforge.errors import BertforgeError, UsageError
from record import record

SEEDS = range(5)
RESAMPLES = 2000
FOLDS = 5
PRIOR_ROWS = 8.0  # a name's rate is pulled towards the overall one as by so many rows more
MAX_CATEGORIES = 254  # the trees' limit is 255; rarer names count as missing

STUDY = ["account_age_days", "tag_count", "reputation", "title_words", "body_words"]
THIRTEEN = [
    *STUDY,
    *["answers_before", "days_since_start", "hour", "first_tag"],
    *["code_lines", "question_marks", "links", "title_capitalised"],
]


def main() -> int:
    """Parses, measures, prints and writes the record; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path, help="folder made by `bertforge prepare`")
    parser.add_argument(
        "--columns", action="append", metavar="NAME=a,b,c", help="a list; default: study, thirteen, all"
    )
    parser.add_argument("--multi", default="tags", help="the column of several names (default: tags)")
    parser.add_argument("--split", default="random")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args()
    try:
        data = PreparedData.open(options.prepared)
        if len(data.label_names) != 2:
            raise UsageError(f"{options.prepared} has {len(data.label_names)} labels; this benchmark needs 2")
        rows = [
            measure(data, variant, columns, options.multi, options.split)
            for variant, columns in read_lists(options.columns, data).items()
        ]
    except BertforgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    if options.json:
        print(f"wrote {write_json(options.json, record('tabular_boosting', rows, list(SEEDS), 'scikit-learn'))}")
    return 0


def read_lists(given: list[str] | None, data: PreparedData) -> dict[str, list[str]]:
    """`NAME=a,b,c` -> name and columns; raises UsageError for anything else."""
    if not given:
        return {"study": STUDY, "thirteen": THIRTEEN, "all": [n for n in FEATURES if n in data.manifest["columns"]]}
    lists = {name: columns.split(",") for name, _, columns in (text.partition("=") for text in given)}
    if wrong := [name for name, columns in lists.items() if not name or not all(columns)]:
        raise UsageError(f"--columns {wrong[0]} names no columns; write it as --columns NAME=a,b,c")
    answers = {data.schema.label_column, CLOSED_DATE}
    if told := [column for columns in lists.values() for column in columns if column in answers]:
        raise UsageError(f"--columns names {told[0]}, which gives the answer away; leave it out")
    return lists


def measure(data: PreparedData, variant: str, columns: list[str], multi: str, split: str) -> dict[str, Any]:
    """Fits on train rows and scores on validation rows; returns and prints one row of the record."""
    train, validation = data.rows(split, "train"), data.rows(split, "validation")
    labels = np.asarray(data.labels)
    x, categories = encode(data.columns(columns), labels, train, validation, multi)  # test rows are dropped here
    correct, losses = [], []
    for seed in SEEDS:
        trees = HistGradientBoostingClassifier(
            learning_rate=0.05,
            max_iter=300,
            max_leaf_nodes=20,
            min_samples_leaf=40,
            l2_regularization=5.0,
            max_features=0.5,
            early_stopping=False,
            categorical_features=categories,
            random_state=seed,
        )
        trees.fit(x.loc[train], labels[train])
        probability = trees.predict_proba(x.loc[validation])[:, 1]
        correct.append((probability > 0.5) == (labels[validation] == 1))
        losses.append(log_loss(labels[validation], probability))
    low, high = interval(np.array(correct))
    accuracy, loss = float(np.mean(correct)), float(np.mean(losses))
    print(f"{variant:12s} {len(columns):3d} columns  {accuracy:.2%} ({low:.2%} to {high:.2%})  loss {loss:.4f}")
    return {
        "system": "scikit-learn",
        "model": "HistGradientBoostingClassifier",
        "variant": variant,
        "split": f"{split}/validation",
        "columns": columns,
        "seeds": len(SEEDS),
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "loss": loss,
    }


def encode(
    frame: pd.DataFrame, labels: np.ndarray, train: np.ndarray, validation: np.ndarray, multi: str
) -> tuple[pd.DataFrame, list[str] | None]:
    """Columns as the trees read them, for train and validation rows (the index), and which of them are categories."""
    wanted = np.concatenate([train, validation])
    encoded: dict[str, Any] = {}
    categories = []
    for name in frame.columns:
        column = frame[name].iloc[wanted].replace("", None)  # source columns are strings, "" where absent
        numbers = pd.to_numeric(column, errors="coerce")
        if numbers.notna().equals(column.notna()):
            encoded[name] = numbers.astype(np.float64)
        elif name == multi:
            names = [value.split() if isinstance(value, str) else [] for value in frame[name].tolist()]
            rates = _rates_of_names(names, labels, train, validation)
            encoded |= {f"{name}:{kind}": rates[wanted, i] for i, kind in enumerate(("mean", "least", "most", "sum"))}
        else:
            frequent = frame[name].iloc[train].value_counts().index[:MAX_CATEGORIES]
            encoded[name] = pd.Categorical(column, categories=frequent)
            categories.append(name)
    return pd.DataFrame(encoded, index=wanted), categories or None


def _rates_of_names(
    names: list[list[str]], labels: np.ndarray, train: np.ndarray, validation: np.ndarray
) -> np.ndarray:
    """[rows, 4] mean, least, most and sum of the log-odds of a row's names; a train row by other folds than its own."""
    rates = np.full((len(names), 4), np.nan)
    for rest, fold in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(train, labels[train]):
        _fill_rates(rates, names, labels, train[rest], train[fold])
    _fill_rates(rates, names, labels, train, validation)
    return rates


def _fill_rates(
    rates: np.ndarray, names: list[list[str]], labels: np.ndarray, known: np.ndarray, asked: np.ndarray
) -> None:
    """Fills `rates` of the rows `asked` by what the rows `known` teach; a row without names stays NaN."""
    seen: Counter[str] = Counter()
    positive: Counter[str] = Counter()
    for row in known:
        seen.update(names[row])
        if labels[row] == 1:
            positive.update(names[row])
    overall = float(np.mean(labels[known] == 1))

    def log_odds(name: str) -> float:
        rate = (positive[name] + PRIOR_ROWS * overall) / (seen[name] + PRIOR_ROWS)
        return float(np.log(rate / (1 - rate)))

    for row in asked:
        if odds := [log_odds(name) for name in names[row]]:
            rates[row] = np.mean(odds), min(odds), max(odds), sum(odds)


def interval(correct: np.ndarray) -> tuple[float, float]:
    """The 95% percentile interval of the mean of `correct` `[seeds, rows]`, both drawn again with replacement."""
    generator = np.random.default_rng(42)
    seeds, rows = correct.shape
    means = []
    for _ in range(RESAMPLES):
        of_row = correct[generator.integers(seeds, size=seeds)].mean(axis=0)
        means.append(of_row[generator.integers(rows, size=rows)].mean())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    sys.exit(main())

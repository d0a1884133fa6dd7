"""Columns alone: gradient-boosted trees without the text, the floor under a model that reads both.

    python benchmarks/tabular_boosting.py PREPARED [--columns NAME=a,b,c ...] [--multi tags] [--json FILE]

PREPARED is a folder made by `bertforge prepare`. Each list of columns is one row of the result: trees are fitted on the
train rows with five seeds and scored on the validation rows; the test rows take no part. A seed draws the columns that
each split of a tree may choose from. Accuracy and loss are means over the seeds; the interval is the 95% bootstrap over
seeds and validation rows, so it speaks of other seeds and other questions alike.

How trees read columns, those of several names (`--multi`) among them: src/bertforge/evaluation/boosting.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import log_loss

from bertforge.artifact import write_json
from bertforge.columns.transform import TabularSpec
from bertforge.data.features import FEATURES
from bertforge.data.prepared import PreparedData
from bertforge.data.schema import CLOSED_DATE
from bertforge.errors import BertforgeError, UsageError
from bertforge.evaluation.boosting import boosted_trees, encode_columns
from record import record

SEEDS = range(5)
RESAMPLES = 2000

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
    frame = data.columns(columns)
    spec = spec_of(frame.iloc[np.concatenate([train, validation])], multi)
    x, categories = encode_columns(frame, spec, labels, train, validation)  # test rows are dropped here
    correct, losses = [], []
    for seed in SEEDS:
        trees = boosted_trees(2, categories, seed)
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


def spec_of(frame: pd.DataFrame, multi: str) -> TabularSpec:
    """Which columns of `frame` hold numbers: those in which every value that is there is one."""
    columns = {name: frame[name].replace("", None) for name in frame.columns}  # "" where a source column is empty
    numeric = tuple(n for n, c in columns.items() if pd.to_numeric(c, errors="coerce").notna().equals(c.notna()))
    multi = multi if multi in columns and multi not in numeric else ""
    categorical = tuple(name for name in columns if name not in (*numeric, multi))
    return TabularSpec.of(numeric=numeric, categorical=categorical, multi=multi)


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

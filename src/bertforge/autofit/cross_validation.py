"""Cross-validation: a run for each fold that `prepare --folds` made, and one figure over all rows.

Each row is a test row of one fold, so the folds' test rows together are the whole table, each judged by a model that
has not learnt from it. Their logits are pooled before anything is counted: an interval over all rows says more than the
spread of five means. A fold's temperature is its run's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bertforge.artifact import write_json
from bertforge.data.prepared import PreparedData
from bertforge.errors import ArtifactError, DataError
from bertforge.evaluation.metrics import Metrics, classification_metrics
from bertforge.inference.evaluate import evaluate_run
from bertforge.locks import locked
from bertforge.manifest import MANIFEST, RUNNING, read_manifest
from bertforge.training.config import Recipe

RESULT = "cross-validation.json"

Train = Callable[[Path, Path, Recipe, bool], dict[str, Any]]
"""Prepared data, the run's folder, the recipe and whether to resume -> the run's manifest."""


def cross_validate(data: Path, out: Path, recipe: Recipe, say: Callable[[str], object], train: Train) -> dict[str, Any]:
    """Trains `out`/fold-1, fold-2, ... where that is not done yet; writes and returns metrics per fold and pooled.

    Raises DataError for data without folds, ArtifactError for a run in `out` of other data or settings.
    """
    with locked(out):
        return _cross_validate(data, out, recipe, say, train)


def _cross_validate(
    data: Path, out: Path, recipe: Recipe, say: Callable[[str], object], train: Train
) -> dict[str, Any]:
    prepared = PreparedData.open(data)
    folds = [name for name in prepared.manifest["splits"] if name.startswith("fold-")]
    if not folds:
        raise DataError(f"{data} has no folds; make them with `bertforge prepare TABLE --out DIR --folds 5`")
    logits, labels, per_fold = [], [], {}
    for fold in folds:
        run, settings = out / fold, replace(recipe.on(prepared.schema), split=fold)
        if (run / MANIFEST).is_file():
            _check_same(run, settings, prepared)
            say(f"{fold} of {len(folds)}: trained already")
        else:
            say(f"{fold} of {len(folds)}")
            train(data, run, settings, (run / RUNNING).is_file())
        found = evaluate_run(run, data, "test")
        logits.append(found.scored.logits)
        labels.append(found.scored.labels)
        per_fold[fold] = found.metrics
    pooled = classification_metrics(np.concatenate(logits), np.concatenate(labels), prepared.label_names)
    result = {"pooled": pooled.to_dict(), "folds": {fold: metrics.to_dict() for fold, metrics in per_fold.items()}}
    write_json(out / RESULT, result)
    return result


def table(result: dict[str, Any]) -> str:
    """Accuracy and macro F1 with their 95% intervals as Markdown, a row a fold and one for all rows."""
    rows = {**result["folds"], "all rows": result["pooled"]}
    lines = ["| test rows | rows | accuracy | 95% interval | macro F1 | 95% interval |", "| --- " * 6 + "|"]
    for name, metrics in ((name, Metrics.from_dict(found)) for name, found in rows.items()):
        cells = []
        for figure in (metrics.accuracy, metrics.macro_f1):
            known = figure.low is not None and figure.high is not None
            cells += [f"{figure.value:.2%}", f"{figure.low:.2%} to {figure.high:.2%}" if known else figure.reason]
        lines.append(f"| {' | '.join([name, f'{metrics.rows:,}', *cells])} |")
    return "\n".join(lines)


def _check_same(run: Path, recipe: Recipe, prepared: PreparedData) -> None:
    """Raises ArtifactError when the finished run is not one of `recipe` on this data."""
    manifest = read_manifest(run, "run")
    if manifest["data"]["fingerprint"] != prepared.fingerprint:
        raise ArtifactError(f"{run} was trained on other data; name another folder with --out")
    wanted = json.loads(json.dumps(recipe.to_dict()))
    for name, value in wanted.items():
        found = manifest["recipe"].get(name)
        left_open = value is None and name not in ("lora", "tabular")  # derived, or chosen by the machine
        if found != value and not left_open and name != "precision":
            raise ArtifactError(f"{run} was trained with {name} {found}, not {value}; name another folder with --out")

"""Targets x precisions -> rows, the reference first, each on the same questions.

The reference is PyTorch in float32 on packed tokens. An engine that is missing is compiled; a target that is not
installed becomes a row that says how to install it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bertforge.artifact import MANIFEST, hash_file, read_manifest, versions
from bertforge.backends.base import Backend, BatchShape
from bertforge.backends.registry import TARGETS
from bertforge.backends.run import run
from bertforge.benchmark.measure import latencies_ms, padding_waste, rate, throughput
from bertforge.data.loader import Examples
from bertforge.data.prepared import PreparedData
from bertforge.errors import BertforgeError, UsageError
from bertforge.evaluation.compare import compare
from bertforge.evaluation.groups import wilson_interval
from bertforge.hardware import detect
from bertforge.inference.compile import compile_model, default_folder
from bertforge.inference.predictor import Predictor

REFERENCE = ("pytorch", "fp32")
LATENCY_ROWS = 100


@dataclass(frozen=True)
class Workload:
    """The rows of a benchmark."""

    examples: Examples
    rows: np.ndarray
    """The whole part, for accuracy."""
    timed: np.ndarray
    texts: list[str]
    """Of the timed rows."""
    columns: pd.DataFrame | None
    """Of the timed rows, where the model reads columns beside the text."""

    @property
    def labels(self) -> np.ndarray:
        """[rows]."""
        return np.asarray(self.examples.labels[self.rows])


def run_benchmark(
    model: Path,
    data: Path,
    targets: str,
    *,
    split: str,
    rows: int,
    repeats: int,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Measures and returns a record: its rows are engines, `say` tells what is being done."""
    wanted = chosen(targets)
    hardware = detect()
    reference = Predictor.load(model, "fp32")
    work = _workload(reference, PreparedData.open(data), split, rows)
    baseline = run(reference.backend, work.examples, work.rows)
    found: list[dict[str, Any]] = []
    for target, precision in wanted:
        name: dict[str, Any] = {"framework": target, "precision": precision}
        try:
            folder = model if target == "pytorch" else engine(model, target, precision, data, say)
            predictor = Predictor.load(folder, precision)
        except BertforgeError as error:
            found.append({**name, "missing": str(error)})
            continue
        say(f"measuring {target} {precision}")
        found.append({**name, "bytes": _bytes(folder), **_row(predictor, work, baseline, repeats)})
        predictor.backend.close()
    return {
        "benchmark": "engines",
        "model": str(model),
        "split": f"{reference.manifest['recipe']['split']}/{split}",
        "rows_timed": len(work.timed),
        "tokens_per_question": float(work.examples.lengths(work.timed).mean()),
        "repeats": repeats,
        "device": f"{hardware.name}, {hardware.cores} CPU cores",
        "versions": versions(),
        "rows": found,
    }


def chosen(targets: str) -> list[tuple[str, str]]:
    """`all`, or names of targets and TARGET-PRECISION pairs, the reference first; raises UsageError for another."""
    pairs = [REFERENCE, ("pytorch", "bf16")]
    pairs += [(name, precision) for name, target in TARGETS.items() for precision in target.precisions]
    if targets == "all":
        return pairs
    named = targets.split(",")
    known = {name for name, _ in pairs} | {f"{name}-{precision}" for name, precision in pairs}
    if unknown := [name for name in named if name not in known]:
        raise UsageError(f"target {unknown[0]!r} does not exist; choose all or some of {', '.join(sorted(known))}")
    return [pair for pair in pairs if pair == REFERENCE or pair[0] in named or "-".join(pair) in named]


def engine(model: Path, target: str, precision: str, data: Path, say: Callable[[str], object]) -> Path:
    """The folder of an engine of `model` as it is now, compiled if need be."""
    folder = default_folder(model, target, precision)
    if (folder / MANIFEST).is_file():
        if read_manifest(folder, "engine").get("parent") == hash_file(model / MANIFEST):
            return folder
        raise UsageError(f"{folder} was compiled from other weights; remove it: rm -r {folder}")
    say(f"compiling {target} {precision}")
    compile_model(model, target, precision, data, folder)
    return folder


def _workload(predictor: Predictor, prepared: PreparedData, split: str, rows: int) -> Workload:
    whole = prepared.rows(predictor.manifest["recipe"]["split"], split)
    timed = whole[np.linspace(0, len(whole) - 1, min(rows, len(whole))).astype(int)]
    timed = np.random.default_rng(0).permutation(timed)  # as questions come: in no order of length
    columns = predictor.columns(prepared, timed)
    return Workload(predictor.examples(prepared, whole), whole, timed, prepared.texts(timed), columns)


def _row(predictor: Predictor, work: Workload, baseline: np.ndarray, repeats: int) -> dict[str, Any]:
    backend, labels = predictor.backend, work.labels
    logits = run(backend, work.examples, work.rows)
    compared = compare(baseline, logits, labels)
    low, high = wilson_interval(int((logits.argmax(1) == labels).sum()), len(labels))
    best = throughput(backend, work.examples, work.timed, backend.shape, repeats)
    from_text = rate(lambda: predictor.logits(work.texts, work.columns), len(work.timed), repeats)
    calls = latencies_ms(backend, work.examples, work.timed[:LATENCY_ROWS], repeats)
    p50, p95, p99 = (float(value) for value in np.percentile(calls, [50, 95, 99]))
    return {
        "questions_per_s": best.median,
        "questions_per_s_low": best.low,
        "questions_per_s_high": best.high,
        "end_to_end_questions_per_s": from_text.median,
        **{f"questions_per_s_batch_{n}": _at(backend, work, n, repeats) for n in (1, 32)},
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "padding_waste": padding_waste(work.examples.lengths(work.timed), backend.packed, backend.shape),
        "accuracy": compared.second_accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "recovery": compared.second_accuracy / compared.first_accuracy,
        "accuracy_difference": compared.accuracy_difference.to_dict(),
        "mcnemar_p": compared.p_value,
        "changed_labels": compared.changed_labels,
        "accuracy_rows": len(labels),
    }


def _at(backend: Backend, work: Workload, rows: int, repeats: int) -> float:
    """Questions a second in batches of `rows` at most, whatever their tokens."""
    shape = BatchShape(tokens=rows * work.examples.max_length, rows=rows, multiple=backend.shape.multiple)
    return throughput(backend, work.examples, work.timed, shape, repeats).median


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())

"""Targets x precisions -> rows, the reference first, each on the same rows.

The reference is PyTorch in float32 on packed tokens. An engine that was not compiled yet is compiled; a target that is
not installed becomes a row that says how to install it, and whatever goes wrong with one engine a row that says what.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bertforge.artifact import versions
from bertforge.benchmark.fresh import fresh_process
from bertforge.benchmark.roofline import add_shares, needed_flops, product_rate
from bertforge.benchmark.workload import PADDED, Workload, load
from bertforge.data.loader import spread
from bertforge.data.prepared import PreparedData
from bertforge.data.streaming import Report, progress
from bertforge.engines.base import BatchShape, Engine
from bertforge.engines.measure import cold_ms, latencies_ms, rate, singles, throughput
from bertforge.engines.registry import TARGETS
from bertforge.engines.run import padding_waste, run
from bertforge.errors import MachineError, UsageError, reason, removal
from bertforge.evaluation.compare import Comparison, compare
from bertforge.evaluation.groups import wilson_interval
from bertforge.hardware import Hardware, detect
from bertforge.inference.predictor import Predictor, check_merged
from bertforge.jobs.compile import compile_model, default_folder
from bertforge.manifest import MANIFEST, identity, read_manifest
from bertforge.model.config import BertConfig
from bertforge.scales import Scales

REFERENCE = ("pytorch", "fp32")
_OURS = ("pytorch", PADDED)
LATENCY_ROWS, COLD_ROWS = 200, 2
"""Questions asked one at a time, in each repeat: five make a thousand calls, ten of them slower than the p99."""


@dataclass(frozen=True)
class _Bench:
    """What the rows share."""

    model: Path
    sources: dict[str, Path]
    """Precision -> the folder its engines are built from, where that is not `model`."""
    data: Path
    split: str
    hardware: Hardware
    prepared: PreparedData
    work: Workload
    baseline: np.ndarray
    """The reference's logits of `work.rows`, [rows, labels]."""
    repeats: int
    say: Callable[[str], object]


def run_benchmark(
    model: Path,
    data: Path,
    targets: str,
    *,
    quantized: Path | None = None,
    split: str,
    rows: int,
    repeats: int,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Measures and returns a record: its rows are engines, `say` tells what is being done.

    Engines of the 8 bits of `quantized`, a folder made from `model` by `bertforge quantize`, are built from it. Raises
    UsageError when it was made from another, and when `model` itself is such a folder. An interrupt ends it with what
    was measured by then.
    """
    wanted = chosen(targets)
    _check_parentage(model, quantized)
    hardware = detect()
    reference = Predictor.load(model, "fp32")
    prepared = PreparedData.of(data, model, reference.manifest)
    work = Workload.of(reference, prepared, split, rows)
    baseline = run(reference.engine, work.examples, work.rows)
    flops = needed_flops(BertConfig.load(model), work.examples.lengths(work.timed)) / len(work.timed)
    sources = {} if quantized is None else {Scales.load(quantized).format: quantized}
    bench = _Bench(
        model=model,
        sources=sources,
        data=data,
        split=split,
        hardware=hardware,
        prepared=prepared,
        work=work,
        baseline=baseline,
        repeats=repeats,
        say=say,
    )
    of = {"split": f"{reference.manifest['recipe']['split']}/{split}", "rows_timed": len(work.timed)}
    found: list[dict[str, Any]] = []
    try:
        for framework, precision in wanted:
            found.append({**_row(bench, framework, precision), **of})
    except KeyboardInterrupt:
        if not found:  # nothing to set others against
            raise
        say("interrupted: the engines measured so far are kept")
        rest = wanted[len(found) :]
        found += [{"framework": name, "precision": form, "missing": "interrupted", **of} for name, form in rest]
    add_shares(found, flops)
    return {
        "benchmark": "engines",
        "model": str(model),
        **of,
        "tokens_per_question": float(work.examples.lengths(work.timed).mean()),
        "gflop_per_question": flops / 1e9,
        "repeats": repeats,
        "device": f"{hardware.name}, {hardware.cores} CPU cores",
        "versions": versions(),
        "rows": found,
    }


def _check_parentage(model: Path, quantized: Path | None) -> None:
    """See `run_benchmark`."""
    check_merged(model)
    if read_manifest(model, "run", "model", "quantized")["kind"] == "quantized":
        raise UsageError(
            f"{model} is a quantized folder, and is measured beside its model: "
            f"bertforge benchmark MODEL --data DIR --quantized {model}"
        )
    if quantized and read_manifest(quantized, "quantized").get("parent") != identity(model):
        raise UsageError(
            f"{quantized} was not made from {model} as it is now; make it again: "
            f"bertforge quantize {model} --data DIR --out Q"
        )


def _row(bench: _Bench, framework: str, precision: str) -> dict[str, Any]:
    """What was measured, or why it could not be; raises the reference's errors, for each row is set against it."""
    name: dict[str, Any] = {"framework": framework, "precision": precision}
    try:
        return name | _measured(bench, _folder(bench, framework, precision), framework, precision)
    except Exception as error:  # of any library: what is wrong with one engine must not lose the rows of the others
        if (framework, precision) == REFERENCE:
            raise
        return {**name, "missing": reason(error)}


def _folder(bench: _Bench, framework: str, precision: str) -> Path:
    """What is loaded; an engine is compiled if need be. Raises MachineError for one that would not run here."""
    if framework in _OURS:
        return bench.model
    if why := TARGETS[framework].unfit(bench.hardware):
        raise MachineError(f"{framework} cannot run here: {why}")
    return compiled(bench.sources.get(precision, bench.model), framework, precision, bench.data, bench.say)


def _measured(bench: _Bench, folder: Path, framework: str, precision: str) -> dict[str, Any]:
    work, baseline = bench.work, bench.baseline
    predictor = load(folder, framework, precision)
    try:
        bench.say(f"measuring {framework} {precision}: {len(work.timed):,} rows, {bench.repeats} times")
        is_reference = (framework, precision) == REFERENCE
        logits = baseline if is_reference else run(predictor.engine, work.examples, work.rows)
        with progress(f"measuring {framework} {precision}") as report:
            found = {**_speed(predictor, work, bench.repeats, report), "bytes": _bytes(folder)}
        found["product_rate"] = product_rate(bench.hardware, precision)
    finally:
        predictor.close()
    if framework not in _OURS:
        found["products"] = predictor.manifest["products"]
    found |= _accuracy(baseline, logits, work.labels)
    found["changed_rows"] = _changed(baseline, logits, bench.prepared, work)
    return found | fresh_process(folder, framework, precision, bench.data, bench.split, len(work.timed))


def chosen(targets: str) -> list[tuple[str, str]]:
    """`all`, or names of targets and TARGET-PRECISION pairs, the reference first; raises UsageError for another."""
    pairs = [REFERENCE, ("pytorch", "bf16"), (PADDED, "fp32"), (PADDED, "bf16")]
    pairs += [(name, precision) for name, target in TARGETS.items() for precision in target.precisions]
    if targets == "all":
        return pairs
    named = targets.split(",")
    known = {name for name, _ in pairs} | {f"{name}-{precision}" for name, precision in pairs}
    if unknown := [name for name in named if name not in known]:
        raise UsageError(f"target {unknown[0]!r} does not exist; choose all or some of {', '.join(sorted(known))}")
    return [pair for pair in pairs if pair == REFERENCE or pair[0] in named or "-".join(pair) in named]


def compiled(model: Path, target: str, precision: str, data: Path, say: Callable[[str], object]) -> Path:
    """The folder of an engine of `model` as it is now, compiled if need be."""
    folder = default_folder(model, target, precision)
    if (folder / MANIFEST).is_file():
        if read_manifest(folder, "engine").get("parent") == identity(model):
            return folder
        raise UsageError(f"{folder} was compiled from other weights; remove it: {removal(folder)}")
    say(f"compiling {target} {precision}")
    compile_model(model, target, precision, data, folder)
    return folder


def _speed(predictor: Predictor, work: Workload, repeats: int, report: Report) -> dict[str, Any]:
    engine, rows = predictor.engine, len(work.timed) * (repeats + 1)
    best = throughput(engine, work.examples, work.timed, engine.shape, repeats)
    report(rows, 1 / 5)
    from_text = rate(lambda: predictor.logits(work.texts, work.columns), len(work.timed), repeats)
    report(2 * rows, 2 / 5)
    batches = {}
    for done, size in ((3, 1), (4, 32)):
        batches[f"questions_per_s_batch_{size}"] = _at(engine, work, size, repeats)
        report(done * rows, done / 5)
    return {
        "questions_per_s": best.median,
        "questions_per_s_low": best.low,
        "questions_per_s_high": best.high,
        "end_to_end_questions_per_s": from_text.median,
        **batches,
        **_of_one(predictor, work, repeats),
        "padding_waste": padding_waste(work.examples.lengths(work.timed), engine.packed, engine.shape),
    }


def _of_one(predictor: Predictor, work: Workload, repeats: int) -> dict[str, float]:
    """Milliseconds of one question a call, warm and cold: of the engine, of the tokenizer, and from text to label."""
    rows, columns = work.timed[:LATENCY_ROWS], work.columns
    texts = [[text] for text in work.texts[: len(rows)]]
    given = [(text, None if columns is None else columns.iloc[[place]]) for place, text in enumerate(texts)]
    kinds: dict[str, tuple[Callable[[Any], object], Sequence[Any]]] = {
        "": (predictor.engine.logits, singles(predictor.engine, work.examples, rows)),
        "tokenizer_": (predictor.tokenizer.encode, texts),
        "text_": (lambda question: predictor.predict(*question), given),
    }
    by_length = np.argsort(work.examples.lengths(rows), kind="stable")
    few = spread(by_length, COLD_ROWS * repeats)  # whose median is that of all
    found: dict[str, float] = {}
    for of, (ask, questions) in kinds.items():
        calls = np.percentile(latencies_ms(ask, questions, repeats), [50, 95, 99])
        found |= dict(zip((f"{of}p50_ms", f"{of}p95_ms", f"{of}p99_ms"), map(float, calls), strict=True))
        found[f"{of}cold_ms"] = float(np.median(cold_ms(ask, [questions[place] for place in few])))
    return found


def _accuracy(baseline: np.ndarray, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    compared: Comparison = compare(baseline, logits, labels)
    low, high = wilson_interval(int((logits.argmax(1) == labels).sum()), len(labels))
    before, difference = compared.first_accuracy, compared.accuracy_difference
    return {
        "accuracy": compared.second_accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "recovery": compared.second_accuracy / before,
        # The paired interval of the difference, as a share of the reference's accuracy.
        "recovery_low": None if difference.low is None else 1 + difference.low / before,
        "recovery_high": None if difference.high is None else 1 + difference.high / before,
        "accuracy_difference": difference.to_dict(),
        "mcnemar_p": compared.p_value,
        "changed_labels": compared.changed_labels,
        "accuracy_rows": len(labels),
    }


def _changed(baseline: np.ndarray, logits: np.ndarray, prepared: PreparedData, work: Workload) -> list[dict[str, Any]]:
    """Each row with another label than the reference gives it, by its line in the source table."""
    names, before, after = prepared.label_names, baseline.argmax(1), logits.argmax(1)
    return [
        {
            "line": int(prepared.lines[work.rows[place]]),
            "true": names[work.labels[place]],
            "reference": names[before[place]],
            "engine": names[after[place]],
        }
        for place in np.flatnonzero(before != after)
    ]


def _at(engine: Engine, work: Workload, rows: int, repeats: int) -> float:
    """Questions a second in batches of `rows` at most, whatever their tokens."""
    shape = BatchShape(tokens=rows * work.examples.max_length, rows=rows, multiple=engine.shape.multiple)
    return throughput(engine, work.examples, work.timed, shape, repeats).median


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())

"""Writes the tables of README.md and docs/ from the records under benchmarks/results.

    python benchmarks/documents.py            # writes them anew
    python benchmarks/documents.py --check    # says which differ, and ends with 1 if one does

A table stands in a document between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a function below.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bertforge.evaluation.groups import wilson_interval
from public_tables import TABLES as PUBLIC_TABLES

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

NOT_YET = "Not measured yet: `benchmarks/tables.py` makes the record.\n"

TABLES: dict[str, Callable[[], str]] = {}


def table(make: Callable[[], str]) -> Callable[[], str]:
    """Registers a function under its name, written with hyphens."""
    TABLES[make.__name__.replace("_", "-")] = make
    return make


@table
def variants() -> str:
    """What each variant reaches, trained for the epochs that validation rows chose for it."""
    found = _record("variants")
    rows = []
    for name, counts in _by_epochs(found).items():
        epochs = min(counts, key=lambda count: _mean(counts[count], "validation", "calibrated_loss"))
        runs = [run for run in counts[epochs] if run["split"] == "validation"]
        accuracy, count = _mean(runs, "validation", "accuracy"), runs[0]["rows"]
        rows.append(
            [
                name,
                f"{runs[0]['trainable_parameters']:,}",
                str(epochs),
                _percent(accuracy),
                _interval(*wilson_interval(round(accuracy * count), count)),
                ", ".join(f"{100 * run['accuracy']:.2f}" for run in runs),
                f"{_mean(runs, 'validation', 'calibrated_loss'):.4f}",
                _percent(_mean(counts[epochs], "test", "accuracy")),
            ]
        )
    measured = ["validation accuracy", "95% interval", "seed by seed", "loss", "test"]
    return _markdown(["variant", "trainable parameters", "epochs", *measured], rows) + _source("variants", found)


@table
def variants_by_epochs() -> str:
    """Validation loss and accuracy after each number of epochs tried."""
    found = _record("variants")
    systems = _by_epochs(found)
    tried = sorted({count for counts in systems.values() for count in counts})
    rows = []
    for name, counts in systems.items():
        losses = {count: _mean(runs, "validation", "calibrated_loss") for count, runs in counts.items()}
        cells = {
            count: f"{losses[count]:.4f}, {_percent(_mean(runs, 'validation', 'accuracy'))}"
            for count, runs in counts.items()
        }
        cells[min(losses, key=losses.__getitem__)] += ", chosen"
        rows.append([name, *(cells.get(count, "-") for count in tried)])
    return _markdown(["variant", *(f"{count} epochs" for count in tried)], rows) + _source("variants", found)


def _by_epochs(found: dict[str, Any]) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Variant, with its system where that is a peer -> number of epochs -> rows."""
    named = [
        row | {"name": f"`{row['variant']}`" if row["system"] == "bertforge" else f"{row['system']}: {row['variant']}"}
        for row in found["rows"]
    ]
    return {name: _by(rows, "epochs") for name, rows in _by(named, "name").items()}


def _mean(rows: list[dict[str, Any]], split: str, key: str) -> float:
    return statistics.mean(row[key] for row in rows if row["split"] == split)


@table
def faults() -> str:
    """What came of faults that were made on purpose."""
    found = _record("faults")
    rows = []
    for row in found["rows"]:
        told = {name: count for name, count in row.items() if name not in ("part", "faults", "seconds")}
        rows.append([row["part"], f"{row['faults']:,}", ", ".join(f"{name} {count:,}" for name, count in told.items())])
    return _markdown(["faults", "number", "what came of them"], rows) + _source("faults", found)


@table
def main_job() -> str:
    """The five commands on the real table."""
    found = _record("main_job")
    rows = []
    for row in found["rows"]:
        result = []
        if "accuracy" in row:
            interval = _interval(row["accuracy_low"], row["accuracy_high"])
            result.append(f"accuracy {_percent(row['accuracy'])} ({interval})")
        if "max_logit_difference" in row:
            result.append(f"largest logit difference {row['max_logit_difference']:.1e}")
        if "questions_per_s" in row:
            result.append(f"{row['questions_per_s']:,.0f} questions/s")
        rows.append([f"`{row['command']}`", f"{row['seconds']:,.0f} s", ", ".join(result)])
    return _markdown(["command", "time", "result"], rows) + _source("main_job", found)


@table
def train_rate_cpu() -> str:
    """LoRA training on a CPU beside the peer."""
    return _train_rate("train_rate_cpu")


@table
def train_rate_cpu_short() -> str:
    """The same on short texts."""
    return _train_rate("train_rate_cpu_short")


def _train_rate(name: str) -> str:
    found = _record(name)
    rows = [
        [
            row["system"],
            row["precision"],
            f"{row['questions_per_s']:.1f}",
            f"{row['questions_per_s_low']:.1f} to {row['questions_per_s_high']:.1f}",
            _percent(row["accuracy"]),
        ]
        for row in found["rows"]
    ]
    header = ["system", "precision", "questions/s", "spread", "accuracy so far"]
    return _markdown(header, rows) + _source(name, found)


@table
def train_rate_gpu() -> str:
    """Training on a GPU beside the peer, padded to 512 tokens and in batches of like length."""
    found = _record("train_rate_gpu")
    rows = [
        [
            _run(row),
            row["system"],
            row["precision"],
            row["batch"],
            f"{row['questions_per_s']:,.0f}",
            f"{row['seconds_per_112217']:.1f} s",
            f"{row['tflops']:.0f}",
            f"{row['share_of_ceiling']:.0%}",
            f"{row['peak_memory_gb']:.1f} GB",
            f"{row['padding_waste']:.0%}",
            f"{row['set_up_s']:.0f} s",
        ]
        for row in found["rows"]
        if "missing" not in row
    ]
    speed = ["questions/s", "112,217 questions", "TFLOP/s", f"of {found['ceiling_tflops']}"]
    header = ["variant", "system", "precision", "batch", *speed, "memory", "padding", "set-up"]
    return _markdown(header, rows) + _absent(found, "variant", "system") + _source("train_rate_gpu", found)


def _run(row: dict[str, Any]) -> str:
    """A variant, and which of its epochs where they differ."""
    return f"`{row['variant']}`" + (f", {row['part']}" if row["part"] else "")


@table
def train_time_shares() -> str:
    """Where a training step's time goes on a GPU."""
    found = _record("train_rate_gpu")
    shown = [row for row in found["rows"] if "time_shares" in row]
    runs = {_run(row): row["time_shares"] for row in shown}
    largest = {name: max(each.get(name, 0.0) for each in runs.values()) for shares in runs.values() for name in shares}
    families = sorted(largest, key=lambda name: (name == "other", -largest[name]))
    rows = [[name, *(f"{shares.get(name, 0.0):.0%}" for shares in runs.values())] for name in families]
    return _markdown(["kernels", *runs], rows) + _source("train_rate_gpu", found)


@table
def frozen_prefix() -> str:
    """First and later epochs by where the frozen layers' output is kept."""
    found = _record("frozen_prefix")
    rows = [
        [
            row["kept"],
            f"{row['seconds_per_112217_first_epoch']:.1f} s",
            f"{row['seconds_per_112217_later_epoch']:.1f} s",
        ]
        for row in found["rows"]
    ]
    header = ["kept", "first epoch, 112,217 questions", "later epochs"]
    return _markdown(header, rows) + _source("frozen_prefix", found)


@table
def fused() -> str:
    """Fused kernels beside PyTorch's operators."""
    found = _record("fused")
    times = {(row["model"], row["kernel"], row["pass"], row["system"]): row["us_all_layers"] for row in found["rows"]}
    rows = [
        [model, kernel, name, f"{ours:,.0f} us", f"{theirs:,.0f} us", f"{theirs / ours:.2f}"]
        for (model, kernel, name, system), ours in times.items()
        if system == "bertforge" and (theirs := times.get((model, kernel, name, "torch")))
    ]
    header = ["model", "kernel", "pass", "bertforge, all layers", "PyTorch", "speed-up"]
    return _markdown(header, rows) + _source("fused", found)


@table
def inference_cpu() -> str:
    """Engines on a CPU beside their peers."""
    return _inference("inference_cpu")


@table
def inference_cpu_short() -> str:
    """The same on short texts."""
    return _inference("inference_cpu_short")


def _inference(name: str) -> str:
    found = _record(name)
    slowest = found["rows"][0]["questions_per_s"]
    rows = [
        [
            row["system"],
            row["framework"],
            row["precision"],
            f"{row['questions_per_s']:.1f}",
            f"{row['questions_per_s'] / slowest:.1f}",
            f"{row['p50_ms']:.1f} ms" if "p50_ms" in row else "-",
            _percent(row["accuracy"]),
            f"{row['recovery']:.2%}" if "recovery" in row else "-",
        ]
        for row in found["rows"]
        if "missing" not in row
    ]
    header = ["system", "framework", "precision", "questions/s", "speed-up", "p50 of one", "accuracy", "recovery"]
    absent = _absent(found, "system", "framework", "precision")
    return _markdown(header, rows) + absent + _source(name, found)


@table
def quantization() -> str:
    """Accuracy in 8 bits."""
    found = _record("quantization")
    rows = [
        [
            row["precision"],
            row["split"],
            f"{row['rows']:,}",
            _percent(row["accuracy"]),
            _percent(row["accuracy_fp32"]),
            f"{_percent(row['recovery'])} ({_interval(row['recovery_low'], row['recovery_high'])})",
            f"{row['changed_labels']:,}",
        ]
        for row in found["rows"]
    ]
    header = ["precision", "split", "rows", "accuracy", "in float32", "recovery", "labels changed"]
    return _markdown(header, rows) + _source("quantization", found)


@table
def sensitivity() -> str:
    """What each layer and component costs in INT8."""
    found = _record("quantization")
    rows = [
        [
            row["name"],
            f"{row['work']:.0%}",
            f"{row['alone']['divergence']:.5f}",
            f"{row['spared']['divergence']:.5f}",
            str(row["alone"]["changed_labels"]),
        ]
        for row in found["sensitivity"]["int8"]
    ]
    header = ["quantized", "share of the work", "divergence alone", "of all but it", "labels changed alone"]
    return _markdown(header, rows) + _source("quantization", found)


@table
def inference_gpu() -> str:
    """Systems on a GPU, BERT-base with random weights."""
    found = _record("inference_gpu")
    timed = [row for row in found["rows"] if row.get("model") == "bert-base" and "questions_per_s" in row]
    rows = [[*_gpu_system(row), f"{row['max_logit_difference']:.4f}"] for row in timed]
    return _markdown([*_GPU_SYSTEM, "largest logit difference"], rows) + _source("inference_gpu", found)


@table
def inference_gpu_minilm() -> str:
    """The same with a small model that is fine-tuned."""
    found = _record("inference_gpu")
    timed = [row for row in found["rows"] if row.get("model") == "minilm" and "questions_per_s" in row]
    rows = [
        [*_gpu_system(row), f"{row['changed_labels']:,} of {row['rows']:,}", _percent(row["accuracy"])] for row in timed
    ]
    return _markdown([*_GPU_SYSTEM, "labels changed", "accuracy"], rows) + _source("inference_gpu", found)


_GPU_SYSTEM = ["system", "framework", "precision", "batch", "questions/s", "of the ceiling", "padding", "memory"]


def _gpu_system(row: dict[str, Any]) -> list[str]:
    return [
        row["system"],
        row["framework"],
        row["precision"],
        row["batch"],
        f"{row['questions_per_s']:,.0f}",
        f"{row['share_of_ceiling']:.0%}",
        f"{row['padding_waste']:.0%}",
        f"{row['peak_memory_gb']:.1f} GB",
    ]


@table
def one_question_gpu() -> str:
    """Milliseconds of one question of 128 tokens, from ids on the host to logits on the host."""
    found, named = _record("inference_gpu"), ("model", "system", "framework", "precision")
    rows = [
        [*(row[name] for name in named), *(f"{row[f'p{p}_ms']:.2f}" for p in (50, 95, 99))]
        for row in found["rows"]
        if "p50_ms" in row
    ]
    return _markdown([*named, "p50 ms", "p95 ms", "p99 ms"], rows) + _source("inference_gpu", found)


@table
def kernel_time_gpu() -> str:
    """Where our engine's time goes."""
    found = _record("inference_gpu")
    shared = [row for row in found["rows"] if "time_shares" in row]
    families = list(shared[0]["time_shares"])
    rows = [
        [
            row["model"],
            row["precision"],
            row["batch"],
            *(f"{row['time_shares'][family]:.0%}" for family in families),
            f"{row['tflops']:.0f}",
        ]
        for row in shared
    ]
    header = ["model", "precision", "packs", *families, "TFLOP/s of the whole"]
    return _markdown(header, rows) + _source("inference_gpu", found)


@table
def text_gpu() -> str:
    """From raw text to labels."""
    found, rows = _record("text_gpu"), []
    for (model, precision), runs in _grouped(found["rows"], "model", "precision").items():
        every, one = (next(run for run in runs if run["batch"] == name) for name in ("all texts", "one question"))
        most = max((run for run in runs if run["batch"] == "predict"), key=lambda run: run["rows"])
        rows.append(
            [
                model,
                precision,
                f"{every['questions_per_s_first']:,.0f}",
                f"{every['end_to_end_questions_per_s']:,.0f}",
                f"{most['rows_per_s']:,.0f} ({most['rows']:,} rows)",
                f"{one['p50_ms']:.2f} / {one['p99_ms']:.2f}",
                f"{one['tokenizer_p50_ms']:.2f}",
                f"{every['first_answer_s']:.1f} s",
            ]
        )
    measured = [
        "texts/s, first pass",
        "texts/s",
        "`predict`, rows/s",
        "one question, p50 / p99 ms",
        "tokenizer",
        "first answer",
    ]
    return _markdown(["model", "precision", *measured], rows) + _source("text_gpu", found)


@table
def cascade_gpu() -> str:
    """8 bits first, close questions again."""
    found = _record("cascade")
    rows = [
        [
            row["system"],
            f"{row['questions_per_s']:,.0f}",
            "-" if row["asked_again"] is None else f"{row['asked_again']:.1%}",
            f"{row['changed_labels']:,} of {row['rows']:,}",
            _percent(row["accuracy"]),
        ]
        for row in found["rows"]
    ]
    return _markdown(["system", "questions/s", "asked again", "labels changed", "accuracy"], rows) + _source(
        "cascade", found
    )


@table
def prepare_rate() -> str:
    """Preparing beside the bare tokenizer, and memory."""
    found = _record("prepare_rate")
    rows = [
        [
            row["system"],
            row["format"],
            f"{row['rows']:,}",
            f"{row['rows_per_s']:,.0f}",
            f"{row['share_of_ceiling']:.2f}" if "share_of_ceiling" in row else "-",
            f"{row['peak_memory_gb']:.2f} GB",
        ]
        for row in found["rows"]
    ]
    header = ["system", "table", "rows", "rows/s", "share of `encode_batch`", "peak memory"]
    return _markdown(header, rows) + _source("prepare_rate", found)


@table
def columns_alone() -> str:
    """Gradient boosting without the text."""
    found = _record("tabular_boosting")
    rows = [
        [
            row["variant"],
            str(len(row["columns"])),
            _percent(row["accuracy"]),
            _interval(row["accuracy_low"], row["accuracy_high"]),
            f"{row['loss']:.4f}",
        ]
        for row in found["rows"]
    ]
    header = ["columns", "number", "validation accuracy", "95% interval", "loss"]
    return _markdown(header, rows) + _source("tabular_boosting", found)


@table
def public_tables() -> str:
    """The tables of the suite, and where a reader gets them."""
    rows = []
    for each in PUBLIC_TABLES:
        columns = "its own" if each.label is None else ", ".join(f"`{name}`" for name in (*each.text, each.label))
        rows.append([each.name, f"{each.rows:,}", each.about, f"`{each.file}`", columns, each.source])
    return _markdown(["table", "rows", "what it is", "file", "columns", "source, licence"], rows)


@table
def measured_tables() -> str:
    """Every system on every table, on a GPU."""
    return _every_system("tables")


@table
def measured_tables_cpu() -> str:
    """What was run on a CPU."""
    return _every_system("tables_cpu")


@table
def measured_tables_autogluon() -> str:
    """The same for a peer that needs an environment of its own."""
    return _every_system("tables_autogluon")


def _every_system(name: str) -> str:
    """A row for each table and system of the suite's record `name`."""
    if not (found := _measured_tables(name)):
        return NOT_YET
    rows = []
    for (table_name, system), runs in found.items():
        mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0] if key.startswith(("acc", "macro"))}
        rows.append(
            [
                table_name,
                system,
                _percent(mean["accuracy"]),
                _interval(mean["accuracy_low"], mean["accuracy_high"]),
                ", ".join(f"{100 * run['accuracy']:.2f}" for run in runs),
                _percent(mean["macro_f1"]),
                _interval(mean["macro_f1_low"], mean["macro_f1_high"]),
                f"{statistics.mean(run['seconds'] for run in runs):,.0f} s",
            ]
        )
    head = ["table", "system", "accuracy", "95% interval", "seed by seed", "macro F1", "95% interval", "time"]
    record = _record(name)
    return _markdown(head, rows) + _absent(record, "table", "system") + _source(name, record)


@table
def measured_tables_short() -> str:
    """Mean accuracy, a table a row."""
    if not (found := _measured_tables("tables")):
        return NOT_YET
    known = ["bertforge", "bertforge, columns", "bertforge fit", "TF-IDF + logistic regression"]
    systems = [*known, "linear probe on embeddings", "transformers Trainer"]
    shown = [system for system in systems if any(system == other for _, other in found)]
    rows = []
    for name in dict.fromkeys(name for name, _ in found):
        runs = [found.get((name, system), []) for system in shown]
        rows.append([name, *(_percent(statistics.mean(r["accuracy"] for r in each)) if each else "-" for each in runs)])
    return _markdown(["table", *shown], rows) + _source("tables", _record("tables"))


def _measured_tables(name: str) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The measured runs of the suite's record `name`, by table and system; none where it is not there yet."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in _record(name)["rows"] if (RESULTS / f"{name}.json").is_file() else []:
        if "missing" not in row:
            groups.setdefault((row["table"], row["system"]), []).append(row)
    return groups


def rewritten(text: str) -> str:
    """`text` with every table made anew; raises KeyError for a name that is no table."""
    return TABLE.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[3]}", text)


def documents() -> list[Path]:
    """Every document that may hold a table."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> int:
    """Writes or checks; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = [path for path in documents() if rewritten(path.read_text()) != path.read_text()]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'differs from the records' if check else 'written'}")
        if not check:
            path.write_text(rewritten(path.read_text()))
    return int(check and bool(stale))


def _record(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        sys.exit(f"{path.relative_to(ROOT)} is missing; the script of that name under benchmarks/ makes it")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _by(rows: Iterable[dict[str, Any]], key: str) -> dict[Any, list[dict[str, Any]]]:
    return {value: group for (value,), group in _grouped(rows, key).items()}


def _grouped(rows: Iterable[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _percent(share: float) -> str:
    return f"{share:.2%}"


def _interval(low: float, high: float) -> str:
    return f"{_percent(low)} to {_percent(high)}"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _absent(found: dict[str, Any], *keys: str) -> str:
    """A line for each row that was not measured, named by its `keys`."""
    lines = []
    for row in found["rows"]:
        if "missing" in row:
            lines.append(f"\n{', '.join(row[key] for key in keys)}: not measured, {row['missing'].splitlines()[0]}.\n")
    return "".join(lines)


def _source(name: str, found: dict[str, Any]) -> str:
    return f"\n{found['device']}, {found['date']}. Record: `benchmarks/results/{name}.json`.\n"


if __name__ == "__main__":
    sys.exit(main())

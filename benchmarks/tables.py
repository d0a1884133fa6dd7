"""The suite: bertforge's defaults, and what one would use instead, on public tables, each on the same rows.

    python benchmarks/tables.py --tables DIR --json tables.json                  # all in one process, but `fit`
    python benchmarks/tables.py --tables DIR --minutes 5 --systems fit --json fit.json
    python benchmarks/tables.py --tables DIR --part 3/10 --json part3.json       # the third of ten processes' share
    python benchmarks/tables.py --join part*.json --json tables.json             # one record of several, and a summary
    python benchmarks/tables.py --tables DIR --skip tables.json --json more.json # what that record lacks

DIR holds the files that public_tables.py names; table_systems.py has the systems. A seed decides the split as well as
the training. A row is a system on the test rows of one split, with bootstrapped 95% intervals. Validation rows choose
whatever is chosen. The record is written anew after each system, so a process that is stopped leaves what it has.

Shares of several processes are dealt by expected seconds, the longest first. They may stand in one WORK folder: a table
is prepared once a seed, by the process that needs it first. Seconds of processes that share a device say little.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import statistics
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bertforge.artifact import write_json
from bertforge.autofit.columns import choose_columns
from bertforge.data.prepare import prepare
from bertforge.data.tokens import Tokenizer
from bertforge.evaluation.metrics import classification_metrics
from bertforge.models import resolve
from public_tables import TABLES, PublicTable
from record import record
from table_systems import SYSTEMS, Answers, Task

NAMES = {table.name: table for table in TABLES}
TIMED = ("fit", "autogluon")  # systems that are told how long they may take
LIBRARIES = ("scikit-learn", "transformers", "accelerate")


@dataclass(frozen=True)
class Job:
    """A system on a table with a seed."""

    table: PublicTable
    system: str
    seed: int

    def seconds(self, most_rows: int | None, minutes: float) -> float:
        """That it may take, roughly."""
        system = SYSTEMS[self.system]
        rows = min(self.table.rows, most_rows or self.table.rows)
        return 60 * minutes if self.system in TIMED else system.fixed_s + system.thousand_s * rows / 1000

    @property
    def key(self) -> tuple[str, str, int]:
        return self.table.name, self.system, self.seed


def main() -> None:
    """Runs a share of the jobs, or joins records."""
    options = parse()
    if options.join:
        joined = join([json.loads(path.read_text()) for path in options.join])
        print(summary(joined["rows"]))
        if options.json:
            write_json(options.json, joined)
        return
    done = {key(row) for path in options.skip for row in json.loads(path.read_text())["rows"] if "missing" not in row}
    jobs = [job for job in all_jobs(options) if job.key not in done]
    mine = share(jobs, *options.part, lambda job: job.seconds(options.rows, options.minutes))
    rows: list[dict[str, Any]] = []
    with work_folder(options.work) as work:
        for number, job in enumerate(mine, start=1):
            print(f"{number}/{len(mine)} {' '.join(map(str, job.key))}", flush=True)
            rows += attempt(job, options, work)
            if options.json:
                write_json(options.json, record("tables", rows, options.seeds, *LIBRARIES))
    print(summary(rows))


def parse() -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, metavar="DIR", help="the folder of the tables' files")
    parser.add_argument("--only", default=",".join(NAMES), help="tables, separated by commas; default: %(default)s")
    usual = ",".join(name for name in SYSTEMS if name not in TIMED)
    parser.add_argument(
        "--systems", default=usual, help="separated by commas; default: %(default)s; also fit, autogluon"
    )
    parser.add_argument("--seeds", default="42,43,44")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--rows", type=int, help="use so many rows of each table, to try the script")
    parser.add_argument("--minutes", type=float, default=5.0, help="that `fit` and autogluon may take")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep prepared tables here, for other processes too")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="run the I-th of N shares")
    parser.add_argument("--skip", type=Path, nargs="*", default=[], metavar="FILE", help="records of what is done")
    parser.add_argument("--join", type=Path, nargs="+", metavar="FILE", help="join these records, run nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args()
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    options.part = tuple(int(number) for number in options.part.split("/"))
    options.only, options.systems = options.only.split(","), options.systems.split(",")
    for given, known in ((options.only, NAMES), (options.systems, SYSTEMS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{unknown[0]!r} is not one of {', '.join(known)}")
    if not options.join and not options.tables:
        parser.error("name the folder of the tables with --tables")
    return options


def all_jobs(options: argparse.Namespace) -> list[Job]:
    """What was asked for and can be: columns where there are some, `fit` where it draws the test rows itself."""
    return [
        Job(NAMES[name], system, seed)
        for name in options.only
        for system in options.systems
        for seed in options.seeds
        if (system != "columns" or NAMES[name].columns) and (system != "fit" or not NAMES[name].test_rows)
    ]


def share(jobs: list[Job], part: int, parts: int, seconds: Callable[[Job], float]) -> list[Job]:
    """The jobs of share `part` of `parts`, from 1: each job, the longest first, goes to whom has the least so far."""
    loads, dealt = [0.0] * parts, []
    for job in sorted(jobs, key=seconds, reverse=True):
        least = loads.index(min(loads))
        loads[least] += seconds(job)
        if least == part - 1:
            dealt.append(job)
    return sorted(dealt, key=lambda job: not SYSTEMS[job.system].first)


def attempt(job: Job, options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """The rows of a job; where it fails, one that says why."""
    where = {"table": job.table.name, "job": job.system, "seed": job.seed, "processes": options.part[1]}
    try:
        task = prepared(job, options, work)
        return [where | scored(task, answers) for answers in SYSTEMS[job.system].run(task)]
    except Exception as error:
        traceback.print_exc()
        return [where | {"system": job.system, "missing": f"{type(error).__name__}: {error}"}]


def prepared(job: Job, options: argparse.Namespace, work: Path) -> Task:
    """The job's table in `work`, prepared there by the first process that asks for it."""
    table = job.table
    folder = work / f"{table.name}-{job.seed}-{options.rows or 'all'}"
    with locked(folder):
        file, test = files(table, table.find(options.tables), folder, options.rows)
        chosen = choose_columns(file, table.label, table.text, job.seed).options
        prepare(file, folder / "data", Tokenizer.load(resolve(options.model)), chosen, test=test)
    return Task(table, file, folder / "data", options.model, job.seed, options.minutes)


def files(table: PublicTable, source: Path, folder: Path, most_rows: int | None) -> tuple[Path, Path | None]:
    """The table and, where its last rows are the published test rows, a file of these; cut to `most_rows` in all."""
    if not table.test_rows and not most_rows:
        return source, None
    found = [folder / "table.parquet", folder / "test.parquet" if table.test_rows else None]
    if not found[0].is_file():
        frame = pd.read_csv(source, encoding="latin-1") if source.suffix == ".csv" else pd.read_parquet(source)
        own = len(frame) - table.test_rows
        for path, rows in zip(found, (frame[:own], frame[own:]), strict=True):
            if path:
                kept = min(len(rows), round((most_rows or len(frame)) * len(rows) / len(frame)))
                rows.sample(kept, random_state=0).to_parquet(path, index=False)
    return found[0], found[1]


def scored(task: Task, answers: Answers) -> dict[str, Any]:
    """Test metrics with their intervals, validation accuracy, and what the system says of itself."""
    data = task.data
    split, labels = data.split_name(), np.asarray(data.labels)
    metrics = classification_metrics(answers.logits["test"], labels[data.rows(split, "test")], data.label_names)
    row: dict[str, Any] = {
        "system": answers.system,
        "split": split,
        "train_rows": len(data.rows(split, "train")),
        "rows": metrics.rows,
    }
    for name, found in (("accuracy", metrics.accuracy), ("macro_f1", metrics.macro_f1)):
        row |= {name: _round(found.value), f"{name}_low": _round(found.low), f"{name}_high": _round(found.high)}
    right = answers.logits["validation"].argmax(axis=1) == labels[data.rows(split, "validation")]
    return row | {"validation_accuracy": _round(float(right.mean()))} | answers.facts


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def key(row: dict[str, Any]) -> tuple[str, str, int]:
    """Of the job that the row comes from."""
    return row["table"], row["job"], row["seed"]


def join(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One record; of rows about the same the last measured one counts. Exits where the records may not be compared."""
    first = records[0]
    for other in records[1:]:
        for name in ("benchmark", "commit", "device", "versions"):
            if other[name] != first[name]:
                raise SystemExit(f"records of different {name}: {first[name]} and {other[name]}; measure one again")
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    measured = {key(row) for found in records for row in found["rows"] if "missing" not in row}
    for row in (row for found in records for row in found["rows"]):
        if "missing" not in row or key(row) not in measured:
            rows[(*map(str, key(row)), row["system"])] = row
    places = {name: place for place, name in enumerate([*NAMES, *SYSTEMS])}
    ordered = sorted(rows.values(), key=lambda row: (places[row["table"]], places[row["job"]], row["seed"]))
    seeds = sorted({row["seed"] for row in ordered})
    return first | {"date": max(found["date"] for found in records), "seed": seeds, "rows": ordered}


def summary(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds, and for each table whether `bertforge train` is at least the best of the others."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        if "missing" not in row:
            groups.setdefault(row["table"], {}).setdefault(row["system"], []).append(row)
    lines = []
    for table, systems in groups.items():
        lines.append(table)
        means = {}
        for system, runs in systems.items():
            mean = {name: statistics.mean(run[name] for run in runs) for name in ("accuracy", "macro_f1", "seconds")}
            means[system] = mean["accuracy"]
            each = ", ".join(f"{run['accuracy']:.2%}" for run in runs)
            lines.append(
                f"  {system:32} accuracy {mean['accuracy']:.2%} ({each})"
                f"  macro F1 {mean['macro_f1']:.2%}  {mean['seconds']:.0f} s"
            )
        others = {system: mean for system, mean in means.items() if not system.startswith("bertforge")}
        if "bertforge" in means and others:
            best = max(others, key=lambda system: others[system])
            lead = means["bertforge"] - others[best]
            high = statistics.mean(run["accuracy_high"] for run in systems["bertforge"])
            verdict = "ahead" if lead >= 0 else "within the interval" if others[best] <= high else "BEHIND"
            lines.append(f"  bertforge beside {best}: {100 * lead:+.2f} points, {verdict}")
    lines += [f"missing: {key(row)}: {row['missing']}" for row in rows if "missing" in row]
    return "\n".join(lines)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def work_folder(named: Path | None) -> Iterator[Path]:
    """The folder named, or one that is removed at the end."""
    if named:
        yield named
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


if __name__ == "__main__":
    main()

"""How fast `bertforge prepare` is beside `tokenizers` alone, and how much memory it takes.

    python benchmarks/prepare_rate.py TABLE [--rows 3400000] [--formats parquet,csv] [--work DIR] [--json FILE]

TABLE (Parquet, the Stack Overflow questions) is repeated to `--rows` rows and written to DIR in each format, prepared
there by a process of its own, and removed. The ceiling is `Tokenizer.encode_batch` of Hugging Face tokenizers on the
same texts, already in memory, truncated to the same 512 tokens: nothing is read, checked or written. It runs over the
unrepeated table before and after each preparation, and the faster run counts. `encode_batch_fast`, which leaves out the
characters' offsets, is given beside it; `prepare` uses it. `cpu_us_per_row` is the CPU time of all threads, which other
work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import tokenizers

from bertforge.artifact import versions, write_json
from bertforge.data.prepare import prepare
from bertforge.data.prepared import join_texts
from bertforge.data.schema import QUESTIONS
from bertforge.data.tokens import MAX_TOKENS, Tokenizer
from bertforge.models import resolve

METHODS = ("encode_batch", "encode_batch_fast")
BATCH = 1024  # the fastest of 1,024 and 8,192 here
Timed = tuple[int, float, float]
"""Rows, seconds, CPU seconds of all threads."""


def main() -> None:
    """Parses, measures, prints and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--rows", type=int, default=3_400_000)
    parser.add_argument("--formats", default="parquet,csv")
    parser.add_argument("--model", default="minilm", help="whose tokenizer")
    parser.add_argument("--work", type=Path, default=Path("prepare-rate"), help="folder for the large tables")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    model = resolve(options.model)
    rows: list[dict[str, Any]] = []
    for name in options.formats.split(","):
        large = repeat(options.table, options.rows, options.work / f"repeated.{name}")
        bare = {method: [in_a_process(encode_alone, options.table, model, method)] for method in METHODS}
        ours = in_a_process(prepare_alone, large, options.work / "prepared", model)
        for method in METHODS:
            bare[method].append(in_a_process(encode_alone, options.table, model, method))
        best = {f"tokenizers {method}": max(bare[method], key=lambda run: run["rows_per_s"]) for method in METHODS}
        for system, found in {"bertforge prepare": ours, **best}.items():
            share = round(ours["rows_per_s"] / best["tokenizers encode_batch"]["rows_per_s"], 3)
            beside = {"share_of_ceiling": share} if found is ours else {}
            rows.append({"system": system, "format": name, "model": options.model, **found, **beside})
            print(rows[-1], flush=True)
        large.unlink()
        shutil.rmtree(options.work / "prepared")
    if options.json:
        print(f"wrote {write_json(options.json, record(rows))}")


def repeat(table: Path, rows: int, path: Path) -> Path:
    """Writes `table` again and again until `rows` rows stand in `path`."""
    once = pq.read_table(table)
    writer = pa.csv.CSVWriter(path, once.schema) if path.suffix == ".csv" else pq.ParquetWriter(path, once.schema)
    with writer:
        for start in range(0, rows, len(once)):
            writer.write_table(once.slice(0, rows - start))
    return path


def in_a_process(work: Callable[..., Timed], *arguments: Path | str) -> dict[str, Any]:
    """Runs `work` in a fresh process, so that its peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (rows, seconds, cpu_seconds), peak_bytes = pool.apply(_with_peak_memory, (work, arguments))
    return {
        "rows": rows,
        "seconds": round(seconds, 2),
        "rows_per_s": round(rows / seconds, 1),
        "cpu_us_per_row": round(cpu_seconds / rows * 1e6, 1),
        "peak_memory_gb": round(peak_bytes / 1e9, 3),
    }


def _with_peak_memory(work: Callable[..., Timed], arguments: tuple[Path | str, ...]) -> tuple[Timed, int]:
    timed = work(*arguments)
    return timed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def prepare_alone(table: Path, out: Path, model: Path) -> Timed:
    """All of `bertforge prepare`: fingerprint, reading, checks, features, splits, tokens, files."""
    tokenizer = Tokenizer.load(model)
    start, cpu_start = time.perf_counter(), time.process_time()
    data = prepare(table, out, tokenizer)
    return len(data), time.perf_counter() - start, time.process_time() - cpu_start


def encode_alone(table: Path, model: Path, method: str) -> Timed:
    """A method of `tokenizers` over the texts of `table`, in batches of BATCH; only its calls are timed."""
    backend = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    backend.enable_truncation(MAX_TOKENS)
    backend.no_padding()
    texts = join_texts(pq.read_table(table, columns=list(QUESTIONS.text_columns)), QUESTIONS)
    start, cpu_start = time.perf_counter(), time.process_time()
    for first in range(0, len(texts), BATCH):
        getattr(backend, method)(texts[first : first + BATCH])
    return len(texts), time.perf_counter() - start, time.process_time() - cpu_start


def record(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows with what is needed to measure them again."""
    from bertforge.hardware import detect  # imports torch: not for the processes whose memory is measured

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    hardware = detect()
    return {
        "benchmark": "prepare_rate",
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit if len(commit) == 40 else None,
        "date": datetime.now(UTC).date().isoformat(),
        "device": f"{hardware.name}, {hardware.cores} cores",
        "versions": versions(),
        "seed": 42,
        "rows": rows,
    }


if __name__ == "__main__":
    main()

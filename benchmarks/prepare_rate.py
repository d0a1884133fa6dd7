"""How fast `bertforge prepare` is beside `tokenizers` alone, and how much memory it takes.

    python benchmarks/prepare_rate.py TABLE [--rows 3400000] [--formats parquet,csv] [--work DIR] [--json FILE]

TABLE is the Stack Overflow questions as Parquet; it is written to DIR in each format, prepared there, and removed.

Rate: the ceiling is `encode_batch` of Hugging Face tokenizers on the same texts, already in memory and truncated to the
same 512 tokens; nothing is read, checked or written. Preparing and encoding take turns, PAIRS times, each in a process
of its own, and `share_of_ceiling` is the median of the pairs' ratios, so that other work on the machine meets both.
`encode_batch_fast`, which leaves out the characters' offsets and which `prepare` uses, is given beside it.
`cpu_us_per_row` is the CPU time of all threads.

Memory: the table is repeated to `--rows` rows and prepared once; `peak_memory_gb` is its largest resident set.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import tokenizers

from bertforge.artifact import write_json
from bertforge.data.prepare import prepare
from bertforge.data.prepared import join_texts
from bertforge.data.schema import QUESTIONS
from bertforge.data.tokens import MAX_TOKENS, Tokenizer
from bertforge.models import resolve
from bertforge.peak_memory import resident_gb

PAIRS = 5
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
        rows += measure_rate(options.table, options.work, name, model)
        rows += measure_memory(options.table, options.work, name, model, options.rows)
    if options.json:
        from record import record  # imports torch: not for the processes whose memory is measured

        print(f"wrote {write_json(options.json, record('prepare_rate', rows, 42))}")


def measure_rate(table: Path, work: Path, form: str, model: Path) -> list[dict[str, Any]]:
    """One row for `prepare` on the table as it is, and one for each method of tokenizers; medians over the pairs."""
    once = repeat(table, pq.read_metadata(table).num_rows, work / f"once.{form}")
    bare, ours, fast = [], [], []
    for _ in range(PAIRS):
        bare.append(in_a_process(encode_alone, table, model, "encode_batch"))
        ours.append(in_a_process(prepare_alone, once, work / "prepared", model))
        fast.append(in_a_process(encode_alone, table, model, "encode_batch_fast"))
        shutil.rmtree(work / "prepared")
    once.unlink()
    shares = [mine["rows_per_s"] / theirs["rows_per_s"] for mine, theirs in zip(ours, bare, strict=True)]
    runs = {"bertforge prepare": ours, "tokenizers encode_batch": bare, "tokenizers encode_batch_fast": fast}
    rows = [
        {"system": system, "format": form}
        | {key: round(statistics.median(r[key] for r in found), 3) for key in found[0]}
        for system, found in runs.items()
    ]
    rows[0]["share_of_ceiling"] = round(statistics.median(shares), 3)
    print(*rows, sep="\n", flush=True)
    return rows


def measure_memory(table: Path, work: Path, form: str, model: Path, count: int) -> list[dict[str, Any]]:
    """One row for `prepare` on the table repeated to `count` rows."""
    large = repeat(table, count, work / f"repeated.{form}")
    row = {
        "system": "bertforge prepare",
        "format": form,
        **in_a_process(prepare_alone, large, work / "prepared", model),
    }
    large.unlink()
    shutil.rmtree(work / "prepared")
    print(row, flush=True)
    return [row]


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
        (rows, seconds, cpu_seconds), peak_gb = pool.apply(_with_peak_memory, (work, arguments))
    return {
        "rows": rows,
        "seconds": round(seconds, 2),
        "rows_per_s": round(rows / seconds, 1),
        "cpu_us_per_row": round(cpu_seconds / rows * 1e6, 1),
        "peak_memory_gb": peak_gb and round(peak_gb, 3),
    }


def _with_peak_memory(work: Callable[..., Timed], arguments: tuple[Path | str, ...]) -> tuple[Timed, float | None]:
    timed = work(*arguments)
    return timed, resident_gb()


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


if __name__ == "__main__":
    main()

"""What an engine needs in a process of its own: how long its first answer takes, and how much memory it holds.

A process that measured another engine before has imported, compiled and allocated what a first answer waits for. The
files are in the page cache, as they are wherever they were copied or checked a moment before.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from bertforge.benchmark.workload import Workload, load
from bertforge.data.prepared import PreparedData
from bertforge.engines.run import run
from bertforge.hardware import detect
from bertforge.peak_memory import PeakMemory

Figures = dict[str, float | str | None]


def fresh_process(folder: Path, framework: str, precision: str, data: Path, split: str, rows: int) -> Figures:
    """`first_answer_s` from the start of the process to the label of a text, `first_call_ms` of which the engine was
    loaded already, and `peak_memory_gb` (10^9 bytes) once it has answered the timed rows too.

    None where memory cannot be read, and all of them when the process fails: `fresh_missing` has its last line then.
    """
    arguments = [folder, framework, precision, data, split, rows, time.time()]
    command = [sys.executable, "-m", "bertforge.benchmark.fresh", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        why = (done.stderr.rstrip() or f"exit code {done.returncode}").rpartition("\n")[2]
        return {"first_answer_s": None, "first_call_ms": None, "peak_memory_gb": None, "fresh_missing": why}
    found: Figures = json.loads(done.stdout.rstrip().rpartition("\n")[2])  # libraries may print before it
    return found


def _main(folder: str, framework: str, precision: str, data: str, split: str, rows: str, started: str) -> None:
    """Prints the figures as JSON; `started` is the wall clock, the one that two processes share."""
    memory = PeakMemory(detect().device)
    predictor = load(Path(folder), framework, precision)
    question = pd.DataFrame(predictor.manifest["inputs"]).head(1)
    before = time.perf_counter()
    predictor.predict(question)
    found = {"first_answer_s": time.time() - float(started), "first_call_ms": 1e3 * (time.perf_counter() - before)}
    work = Workload.of(predictor, PreparedData.open(Path(data)), split, int(rows))
    run(predictor.engine, work.examples, work.timed)
    print(json.dumps({**found, "peak_memory_gb": memory.taken_gb()}))


if __name__ == "__main__":
    _main(*sys.argv[1:])

"""The memory an engine needs, in a process of its own: what a host of one such process has to have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bertforge.benchmark.workload import Workload, load
from bertforge.data.prepared import PreparedData
from bertforge.engines.run import run
from bertforge.hardware import detect
from bertforge.peak_memory import PeakMemory


def peak_memory_gb(folder: Path, framework: str, precision: str, data: Path, split: str, rows: int) -> float | None:
    """GB (10^9 bytes) of a process that loads the engine and answers the timed rows; None where it cannot be read, and
    when the process fails."""
    arguments = [folder, framework, precision, data, split, rows]
    command = [sys.executable, "-m", "bertforge.benchmark.memory", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = done.stdout.rstrip().rpartition("\n")[2]  # libraries may print before it
    return int(last) / 1e9 if done.returncode == 0 and last.isdigit() else None


def _main(folder: str, framework: str, precision: str, data: str, split: str, rows: str) -> None:
    """Prints bytes, or nothing where they cannot be read."""
    memory = PeakMemory(detect().device)
    predictor = load(Path(folder), framework, precision)
    work = Workload.of(predictor, PreparedData.open(Path(data)), split, int(rows))
    run(predictor.engine, work.examples, work.timed)
    if (taken := memory.taken_gb()) is not None:
        print(round(taken * 1e9))


if __name__ == "__main__":
    _main(*sys.argv[1:])

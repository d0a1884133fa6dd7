"""The memory an engine needs, in a process of its own: what a host of one such process has to have.

On a CPU the most that the process ever held, Python and the libraries included. On a GPU what it took of the device's
free memory; frameworks keep what they once took, so that is their peak.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

from bertforge.benchmark.workload import Workload, load
from bertforge.data.prepared import PreparedData
from bertforge.engines.run import run

_STATUS = Path("/proc/self/status")  # getrusage would count the parent's memory, inherited over fork


def peak_memory_gb(folder: Path, framework: str, precision: str, data: Path, split: str, rows: int) -> float | None:
    """GB (10^9 bytes) of a process that loads the engine and answers the timed rows; None where it cannot be read, and
    when the process fails."""
    arguments = [folder, framework, precision, data, split, rows]
    command = [sys.executable, "-m", "bertforge.benchmark.memory", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = done.stdout.rstrip().rpartition("\n")[2]  # libraries may print before it
    return int(last) / 1e9 if done.returncode == 0 and last.isdigit() else None


def _main(folder: str, framework: str, precision: str, data: str, split: str, rows: str) -> None:
    """Prints bytes."""
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    predictor = load(Path(folder), framework, precision)
    work = Workload.of(predictor, PreparedData.open(Path(data)), split, int(rows))
    run(predictor.engine, work.examples, work.timed)
    if free is not None:
        print(free - torch.cuda.mem_get_info()[0])
    elif _STATUS.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())):
        print(1024 * int(found[1]))


if __name__ == "__main__":
    _main(*sys.argv[1:])

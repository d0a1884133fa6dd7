"""How many threads the libraries below start, and how these wait for one another; read before torch is imported.

OpenMP, rayon (in `tokenizers`), OpenBLAS and Arrow take their number of threads from the environment, once, when they
are loaded. They count the machine's cores, or those this process is bound to; a container's share of CPU time they do
not see, and 64 threads on two cores' time wait for one another most of it.

They wait by spinning: GCC's OpenMP 300,000 turns of its loop before a thread sleeps. Where another process has the
core of the thread that is waited for, that burns the time it would need. Training steps of 640 tokens, two threads on
two cores, five other processes on these: more than 5 s as OpenMP comes, 2.6 s with 100,000 turns, 1.1 with 10,000, 1.3
with 1,000, and 0.9 to 1.2 without any, where CPU time was 1.7, 1.1, 0.6 and 0.6 s (a shared machine, one run each).
https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
"""

from __future__ import annotations

import math
import os
from pathlib import Path

_SPINS = 1000  # what GCC's OpenMP itself takes where it has started more threads than there are cores
_CGROUP = Path("/sys/fs/cgroup")


def count() -> int:
    """Threads for work on the CPU: OMP_NUM_THREADS where it is set, otherwise the cores that this process may use."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list names the nested levels' too
    return int(first) if first.isdecimal() and int(first) > 0 else usable_cores()


def usable_cores(cgroup: Path = _CGROUP, own: Path = Path("/proc/self/cgroup")) -> int:
    """The cores this process is bound to, or fewer where a container's quota gives less time than theirs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota(cgroup, own))))


def set_environment(threads: int | None = None) -> None:
    """For what this process loads from now on, and for its children; a variable that the user has set stays.

    `threads` goes before the variables: it was asked for in this very command.
    """
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        if threads:
            os.environ[name] = str(threads)
        else:
            os.environ.setdefault(name, str(count()))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(_SPINS))


def _quota(cgroup: Path, own: Path) -> float:
    """Cores' worth of CPU time that control groups leave to this process; infinite without a limit."""
    found = [math.inf]
    try:
        # https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files; in version 2 the line is 0::/path.
        path = next(line[3:].strip() for line in own.read_text().splitlines() if line.startswith("0::"))
        group = cgroup / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(cgroup) and (folder / "cpu.max").is_file():
                limit, period = (folder / "cpu.max").read_text().split()
                found.append(math.inf if limit == "max" else int(limit) / int(period))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        limit, period = (
            (cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
        )  # version 1
        found.append(math.inf if int(limit) < 0 else int(limit) / int(period))
    except (OSError, ValueError):
        pass
    return min(found)

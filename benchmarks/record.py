"""The frame of every record under benchmarks/results: what was run, on what, from which commit."""

from __future__ import annotations

import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from bertforge.artifact import versions
from bertforge.hardware import detect
from bertforge.threads import usable_cores


def record(benchmark: str, rows: list[dict[str, Any]], seed: int | list[int], *libraries: str) -> dict[str, Any]:
    """`rows` with what is needed to measure them again; `libraries` are the peers' names on PyPI."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "benchmark": benchmark,
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit if len(commit) == 40 else None,
        "date": datetime.now(UTC).date().isoformat(),
        "device": f"{detect().name}, {usable_cores()} CPU cores",
        "versions": versions() | {name: metadata.version(name) for name in libraries},
        "seed": seed,
        "rows": rows,
    }

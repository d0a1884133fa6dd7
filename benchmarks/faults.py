"""Whether anything goes wrong without a word: processes are killed at chosen and at random moments.

    python benchmarks/faults.py --work DIR [--only "crash points" ...] [--share 0.05] [--json FILE]

The tests hold each kind of fault a few times; this is the long form. Each part makes its faults and counts what came of
them; the program ends with 1 where a count that must be 0 is not. `--share` runs a part of each number of faults and
says how long the whole would take. DIR is made, and removed at the end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the models are tiny
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))  # the tests' tables, models and crashes

from bertforge.artifact import write_json
from killed import crash_points, kills_in_training
from record import record

SEED = 42
Part = Callable[[Path, int, int], dict[str, int]]
"""An empty folder to work in, how many faults, a seed -> what came of them, counted."""

PARTS: dict[str, tuple[Part, int]] = {
    "crash points": (crash_points, 200),
    "kills in training": (kills_in_training, 100),
}
# Of every part.
MUST_BE_0 = ("half-written", "not repaired", "other bits", "leftovers")


def main() -> int:
    """Runs the parts and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args()
    rows = []
    for name in options.only:
        part, whole = PARTS[name]
        count = max(1, round(options.share * whole))
        work = options.work.resolve() / name.replace(" ", "-")
        work.mkdir(parents=True)
        start = time.monotonic()
        found = part(work, count, SEED)
        seconds = time.monotonic() - start
        shutil.rmtree(work)
        rows.append({"part": name, "faults": count, **found, "seconds": round(seconds, 1)})
        print(", ".join(f"{key} {value:,}" if key != "part" else value for key, value in rows[-1].items()), flush=True)
        if count < whole:
            print(f"{whole} would take about {seconds * whole / count / 60:.0f} minutes")
    if options.json:
        print(f"wrote {write_json(options.json, record('faults', rows, SEED))}")
    return int(any(row.get(name, 0) for row in rows for name in MUST_BE_0))


if __name__ == "__main__":
    sys.exit(main())

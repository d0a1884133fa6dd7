"""Broken requests by the thousand: bytes on the socket, then whatever the OpenAPI document lets one think of.

    python benchmarks/fuzz_serve.py ENGINE PREPARED [--inputs 50000] [--examples 500] [--json FILE]

Ends with 1 where any answer was a 5xx other than 503 and 504, a good request among the broken ones was not answered
rightly, a process of the service died, or its log tells of a defect. The inputs are those of tests/serving/fuzz.py, 32
clients at a time; schemathesis makes --examples for each address, and checks the answers against the document.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # the tests' service and fuzzer

from tests.serving.fuzz import Fuzz

from bertforge.artifact import write_json
from record import record
from served import Setup

SEED = 42
CHECKS = "content_type_conformance,response_schema_conformance,status_code_conformance"


def main() -> int:
    """Runs both and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--inputs", type=int, default=50_000)
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args()
    setup = Setup.make(options.engine, options.prepared, 200, 1.0, 1, 1, None)
    rows: list[dict[str, Any]] = []
    with setup.serve() as served:
        before = served.processes("bertforge.serving")
        start = time.monotonic()
        told = Fuzz(served.address, setup.texts, SEED).run(options.inputs)
        rows.append({"part": "bytes", **told.told(), "seconds": time.monotonic() - start})
        print(rows[-1], flush=True)
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "run", f"{served.address}/openapi.json", "--checks", CHECKS,
             "--seed", str(SEED), "--max-examples", str(options.examples)],
            capture_output=True, text=True,
        )  # fmt: skip
        print(done.stdout[-3000:], flush=True)
        rows.append({"part": "schemathesis", "examples": options.examples, "code": done.returncode,
                     "seconds": time.monotonic() - start})  # fmt: skip
        last = {
            "part": "afterwards",
            "ready": served.is_ready(),
            "processes_died": int(served.processes("bertforge.serving") != before),
            "defects": served.said().count('"event": "defect"'),
        }
        rows.append(last)
        print(last)
    if options.json:
        found = record("fuzz_serve", rows, SEED, "fastapi", "uvicorn", "httptools", "schemathesis")
        print(f"wrote {write_json(options.json, found)}")
    bad = told.failures or done.returncode or last["processes_died"] or last["defects"] or not last["ready"]
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

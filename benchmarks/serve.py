"""The service beside the engine that it serves: throughput, latency, overload, fairness, faults and memory.

    python benchmarks/serve.py ENGINE PREPARED [--only throughput ...] [--json FILE]

ENGINE is what `bertforge compile` made, or another folder that `bertforge serve` takes, of a model that reads texts
alone; PREPARED holds the questions. The service runs as its users start it, on this machine's loopback address, and the
load generator (`load.py`) beside it on the same cores: what that takes is in the record as `generator_cores`. `wrk`,
where it is installed, sends the same requests.

- throughput: the bare rate is that of `Predictor.predict` from the same raw texts, which sorts all of them by length
  and needs no HTTP. Systems take turns, --repeats rounds of them; a rate is the median of the rounds.
- one client: latency of a request at a time, beside that of `Predictor.predict` of one text.
- load: requests at random moments, 70% of what the service can answer, from their intended moments on.
- overload: three times what it can answer. Every answer is compared with `Predictor`'s for its text (tokens and
  probabilities) and with the request's own id. `noticed` is the negative control: the share of answers that would have
  been found wrong if each had been another text's.
- fairness: single questions of one client, alone and beside another client that sends 1,000 texts a request.
- kills: `kill -9` of one front of two, of both, and of the engine process, under half of the load.
- memory: of every process under mixed load, for --minutes.

A machine with one GPU and 16 cores takes load from several processes to several fronts:

    python benchmarks/serve.py ENGINE PREPARED --only throughput load --texts 20000 --connections 2048 --processes 4 \\
        --fronts 8
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # the tests' service and fuzzer

from bertforge.artifact import write_json
from bertforge.threads import usable_cores
from load import run
from record import record
from serve_faults import kills, memory
from served import Service, Setup, percentiles

PACKED = 32  # texts a request where it has many
QUEUES = (2, 0.5, 0.1)  # seconds; the first is the service's own
MANY = 1000  # of the client that is to starve nobody
NEIGHBOUR = "127.0.0.2"  # its address
_SCRIPT = """
local bodies, place = {}, 0
for line in io.lines(os.getenv("BODIES")) do bodies[#bodies + 1] = line end
wrk.headers["Content-Type"] = "application/json"
request = function()
  place = place % #bodies + 1
  return wrk.format("POST", "/v1/classify", nil, bodies[place])
end
"""

Row = dict[str, Any]


def throughput(setup: Setup, options: argparse.Namespace) -> Iterator[Row]:
    """Questions a second at saturation, beside the bare engine's."""
    rates: dict[tuple[str, int], list[float]] = {}
    more: dict[tuple[str, int], Row] = {}
    with setup.serve() as served:
        setup.saturated(served)
        for _ in range(options.repeats):
            rates.setdefault(("Predictor.predict", 0), []).append(_bare(setup))
            for each in (1, PACKED):
                rate, found = setup.saturated(served, each)
                key = ("service", each)
                rates.setdefault(key, []).append(rate)
                more[key] = percentiles(found.latencies_ms()) | {
                    "statuses": found.statuses(),
                    "generator_cores": found.cpu / setup.seconds,
                }
                if shutil.which("wrk"):
                    rate, told = _wrk(setup, served, each)
                    rates.setdefault(("service, load by wrk", each), []).append(rate)
                    more["service, load by wrk", each] = told
    bare = np.array(rates["Predictor.predict", 0])
    for (system, each), found in rates.items():
        yield {
            "system": system,
            "texts_per_request": each or None,
            "questions_per_s": float(np.median(found)),
            "questions_per_s_low": min(found),
            "questions_per_s_high": max(found),
            "share_of_bare": float(np.median(np.array(found) / bare)),
            **more.get((system, each), {}),
        }


def _bare(setup: Setup) -> float:
    start = time.perf_counter()
    setup.predictor.predict(setup.texts)
    return len(setup.texts) / (time.perf_counter() - start)


def _wrk(setup: Setup, served: Service, each: int) -> tuple[float, Row]:
    """Questions a second, and what it said of errors."""
    with tempfile.TemporaryDirectory() as folder:
        script, bodies = Path(folder) / "script.lua", Path(folder) / "bodies"
        script.write_text(_SCRIPT)
        bodies.write_bytes(b"\n".join(setup.bodies(each)) + b"\n")
        connections = setup.connections if each == 1 else max(4, setup.connections * 4 // each)
        threads = min(setup.processes, connections)
        options = [f"-t{threads}", f"-c{connections // threads * threads}", f"-d{setup.seconds:.0f}s", "--timeout=30s"]
        said = subprocess.run(
            ["wrk", *options, "-s", script, served.address], capture_output=True, text=True, check=True,
            env={"BODIES": str(bodies)},
        ).stdout  # fmt: skip
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", said)
    total = re.search(r"(\d+) requests in", said)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", said)
    assert total
    assert rate
    share = 1 - int(refused[1]) / max(1, int(total[1])) if refused else 1.0
    return each * share * float(rate[1]), {"refused": int(refused[1]) if refused else 0}


def one_client(setup: Setup, options: argparse.Namespace) -> Iterator[Row]:
    """Latency of one request at a time, and what the service adds to `Predictor`'s."""
    bare, over_http = [], []
    count = min(len(setup.texts), 500)
    with setup.serve() as served:
        for _ in range(options.repeats):
            for text in setup.texts[:count]:
                start = time.perf_counter()
                setup.predictor.predict([text])
                bare.append(1000 * (time.perf_counter() - start))
            plan = setup.plan(served, setup.bodies()[:count], connections=1, requests=count, seconds=600.0)
            (found,) = run(plan)
            over_http.append(found.latencies_ms())
    added = float(np.median(np.concatenate(over_http)) - np.median(bare))
    yield {"system": "Predictor.predict", **percentiles(np.array(bare))}
    yield {"system": "service", **percentiles(np.concatenate(over_http)), "added_to_p50_ms": added}


def load(setup: Setup, options: argparse.Namespace) -> Iterator[Row]:
    """Latency at 70% of saturation."""
    with setup.serve() as served:
        most, _ = setup.saturated(served)
        yield _at(setup, served, 0.7 * most)


def _at(setup: Setup, served: Service, rate: float) -> Row:
    found = setup.load(setup.plan(served, setup.bodies(), rate=rate, seconds=3 * setup.seconds))
    row = {"requests_per_s": rate, "requests": len(found.due), "statuses": found.statuses()}
    row |= percentiles(found.latencies_ms()) | {"wrong": setup.wrong(found)}
    return row | {"p99_over_p50": row["p99_ms"] / row["p50_ms"]}


def overload(setup: Setup, options: argparse.Namespace) -> Iterator[Row]:
    """Three times more than can be answered, with the queue that is the default and with shorter ones."""
    for seconds in QUEUES:
        with setup.serve("--queue-seconds", seconds) as served:
            yield {"queue_seconds": seconds, **_overloaded(setup, served, options.requests)}


def _overloaded(setup: Setup, served: Service, requests: int) -> Row:
    most, full = setup.saturated(served)
    calm = _at(setup, served, 0.7 * most)
    rate = 3 * most
    plan = setup.plan(served, setup.bodies(), rate=rate, requests=requests, seconds=2 * requests / rate)
    found = setup.load(plan)
    accepted = found.latencies_ms()
    row = {"requests_per_s": rate, "requests": len(found.due), "statuses": found.statuses(), **percentiles(accepted)}
    return row | {
        "longest_ms": float(accepted.max()),
        "refused_p99_ms": percentiles(found.latencies_ms(429)).get("p99_ms"),
        "p99_over_that_at_70_percent": row["p99_ms"] / calm["p99_ms"],
        "p99_over_that_at_saturation": row["p99_ms"] / percentiles(full.latencies_ms())["p99_ms"],
        "answered_per_s": float((found.status == 200).sum() / found.seconds),
        "wrong": setup.wrong(found),
        "answered_twice": found.strays,
        "noticed": setup.wrong(found, shift=1) / max(1, len(accepted)),
    }


def fairness(setup: Setup, options: argparse.Namespace) -> Iterator[Row]:
    """Single questions beside a client that sends many."""
    with setup.serve() as served:
        most, _ = setup.saturated(served)
        singles = setup.plan(served, setup.bodies(), rate=0.2 * most, seconds=2 * setup.seconds)
        many = min(MANY, len(setup.texts))
        crowd = setup.plan(
            served, setup.bodies(many), connections=2, source=NEIGHBOUR, seconds=2 * setup.seconds, name="many"
        )
        (alone,) = run(singles)
        beside, crowded = run(singles, crowd)
    for system, found in (("single questions alone", alone), ("single questions beside many", beside)):
        told = {"statuses": found.statuses(), "wrong": setup.wrong(found)}
        yield {"system": system, "requests_per_s": 0.2 * most, **percentiles(found.latencies_ms()), **told}
    answered = many * float((crowded.status == 200).sum())
    yield {
        "system": f"requests of {many} texts",
        "questions_per_s": answered / crowded.seconds,
        "statuses": crowded.statuses(),
        **percentiles(crowded.latencies_ms()),
    }


Part = Callable[[Setup, argparse.Namespace], Iterator[Row]]
PARTS: dict[str, Part] = {
    "throughput": throughput,
    "one client": one_client,
    "load": load,
    "overload": overload,
    "fairness": fairness,
    "kills": kills,
    "memory": memory,
}


def main() -> None:
    """Measures, prints and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--texts", type=int, default=4000, help="questions, each unlike the others")
    parser.add_argument("--seconds", type=float, default=10, help="of one measure in a round")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--requests", type=int, default=100_000, help="of the overload")
    parser.add_argument("--minutes", type=float, default=10, help="of the mixed load")
    parser.add_argument("--connections", type=int, default=64, help="of single questions at saturation")
    parser.add_argument("--processes", type=int, default=1, help="that the load comes from")
    parser.add_argument("--fronts", type=int, help="of the service; its own choice where it is left out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(usable_cores())  # of the engine; the tests' service takes one
    setup = Setup.make(
        options.engine, options.prepared, options.texts, options.seconds, options.connections, options.processes,
        options.fronts,
    )  # fmt: skip
    rows: list[Row] = []
    for name in options.only:
        start = time.monotonic()
        for row in PARTS[name](setup, options):
            rows.append({"part": name, **row})
            print(", ".join(f"{key} {_shown(value)}" for key, value in rows[-1].items()), flush=True)
        print(f"{name} took {time.monotonic() - start:.0f} s", flush=True)
    if options.json:
        found = record("serve", rows, 0, "fastapi", "uvicorn", "uvloop", "httptools", "openvino")
        print(f"wrote {write_json(options.json, found)}")


def _shown(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())

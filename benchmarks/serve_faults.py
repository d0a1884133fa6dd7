"""Two parts of serve.py: processes of the service killed under load, and its memory under mixed load."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tests.serving.fuzz import Fuzz

from load import Outcome, run
from served import Service, Setup

_BEFORE, _AFTER = 5.0, 15.0  # seconds of load around a kill
_EVERY = 1.0  # seconds between two looks at the memory
_WARM = 0.2  # of the minutes, before its slope counts


def kills(setup: Setup, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """`kill -9`: what became of the requests, and when the service answered again."""
    with setup.serve("--fronts", "2") as served:
        most, _ = setup.saturated(served)
        for victim, module, number in (("a front", "front", 1), ("both fronts", "front", 2), ("engine", "process", 1)):
            module = f"bertforge.serving.{module}"
            plan = setup.plan(served, setup.bodies(), rate=0.5 * most, seconds=_BEFORE + _AFTER, connections=256)
            with ThreadPoolExecutor(1) as pool:
                loading = pool.submit(run, plan)
                time.sleep(1 + _BEFORE)
                before = served.processes(module)
                killed = time.monotonic()
                for process in before[:number]:
                    os.kill(process, signal.SIGKILL)
                ready = _seconds_until_ready(served, module, before[:number], len(before), killed)
                (found,) = loading.result()
            row = {"killed": victim, "requests_per_s": 0.5 * most, "ready_again_s": ready}
            yield row | _became(setup, found, killed)


def _seconds_until_ready(served: Service, module: str, gone: list[int], count: int, killed: float) -> float | None:
    """With as many processes as before, new ones in the place of those killed; None where that took too long."""
    while time.monotonic() < killed + _AFTER:
        now = served.processes(module)
        if len(now) == count and not {*now} & {*gone} and served.is_ready():
            return time.monotonic() - killed
        time.sleep(0.02)
    return None


def _became(setup: Setup, found: Outcome, killed: float) -> dict[str, Any]:
    """`whole_s` counts from the kill to the last request that was due and not answered in good order."""
    bad = found.status != 200
    before = bad & (found.done < killed)
    after = 0.0 if not bad.any() else float(np.nanmax(np.where(bad, found.due, -np.inf)) - killed)
    longest = found.latencies_ms().max()
    return {
        "requests": len(found.due),
        "statuses": found.statuses(),
        "bad_before_the_kill": int(before.sum()),
        "whole_s": max(0.0, after),
        "longest_ms": float(longest),
        "wrong": setup.wrong(found),
        "answered_twice": found.strays,
    }


def memory(setup: Setup, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """MiB of every process under single and many texts, refusals and broken requests, and their slopes."""
    seconds = 60 * options.minutes
    samples: dict[str, list[tuple[float, float]]] = {}
    with setup.serve() as served:
        most, _ = setup.saturated(served)
        bad = [json.dumps(body).encode() for body in ({"inputs": 3}, {"inputs": ["a", None]}, {"input": "a"})]
        mixed = [*setup.bodies(), *bad * (1 + len(setup.texts) // 30)]
        np.random.default_rng(0).shuffle(mixed)  # type: ignore[arg-type]
        plans = [
            setup.plan(served, mixed, rate=0.3 * most, seconds=seconds),
            setup.plan(served, setup.bodies(32), rate=0.2 * most / 32, seconds=seconds, name="packed"),
            setup.plan(served, setup.bodies(min(1000, len(setup.texts))), rate=0.05, seconds=seconds, name="many"),
        ]
        fuzz = Fuzz(served.address, setup.texts[:100], seed=0)
        with ThreadPoolExecutor(2) as pool:
            loading = pool.submit(run, *plans)
            fuzzing = pool.submit(fuzz.run, seconds=seconds, pause=0.05)
            start = time.monotonic()
            while time.monotonic() < start + seconds:
                for name, process in _processes(served):
                    samples.setdefault(name, []).append((time.monotonic() - start, _mib(process)))
                time.sleep(_EVERY)
            outcomes, broken = loading.result(), fuzzing.result()
        for name, found in samples.items():
            at, mib = np.array(found).T
            late = at > _WARM * seconds
            slope = np.polyfit(at[late], mib[late], 1)[0]
            yield {
                "process": name,
                "minutes": options.minutes,
                "mib_begin": float(np.median(mib[late][: late.sum() // 10 + 1])),
                "mib_end": float(np.median(mib[late][-(late.sum() // 10 + 1) :])),
                "mib_per_10_minutes": 600 * float(slope),
            }
        yield {"statuses": [each.statuses() for each in outcomes], "broken_requests": broken.told()}


def _processes(served: Service) -> list[tuple[str, int]]:
    fronts = served.processes("bertforge.serving.front")
    engine = served.processes("bertforge.serving.process")
    return [
        ("supervisor", served.process.pid),
        *((f"front {number}", process) for number, process in enumerate(sorted(fronts), 1)),
        *(("engine", process) for process in engine),
    ]


def _mib(process: int) -> float:
    """Its own part of the memory, with its share of what it shares."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024

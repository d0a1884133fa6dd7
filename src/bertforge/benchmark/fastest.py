"""The engine for the machine at hand: every candidate is built, proves itself and is timed; the fastest is kept."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bertforge.artifact import fresh_directory, read_manifest
from bertforge.backends.registry import TARGETS
from bertforge.benchmark.measure import throughput
from bertforge.benchmark.workload import Workload
from bertforge.data.prepared import PreparedData
from bertforge.errors import MachineError, UsageError, reason
from bertforge.hardware import Hardware
from bertforge.inference.compile import compile_model
from bertforge.inference.predictor import Predictor, check_merged
from bertforge.scales import SCALES, Scales
from bertforge.tensorrt_library import MODULES, unfit

AUTO = "auto"
TIMED_ROWS, REPEATS = 200, 3
_INT8_TAKES = 8.0  # times what an exact engine takes to build and prove, for calibration and accuracy control
# Which targets a device runs, the one to take unmeasured first.
_TARGETS = {"cpu": ("openvino", "onnxruntime"), "cuda": ("tensorrt", "tensorrt-rtx", "onnxruntime")}


@dataclass(frozen=True)
class Candidate:
    """An engine that was tried."""

    target: str
    precision: str
    questions_per_s: float = 0.0
    receipt: dict[str, Any] | None = None
    error: Exception | None = None
    """Why it is out, if it is."""

    @property
    def why(self) -> str:
        """The same in one line."""
        return reason(self.error) if self.error else ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for a table of those that were tried."""
        accuracy = self.receipt["validation_accuracy"] if self.receipt else None
        speed = {"questions_per_s": self.questions_per_s, "accuracy": accuracy}
        return {"target": self.target, "precision": self.precision, **speed, "why": self.why}

    @property
    def name(self) -> str:
        """As its folder is called."""
        return f"{self.target}-{self.precision}"


def candidates(model: Path, target: str, precision: str, hardware: Hardware, data: Path | None) -> list[Candidate]:
    """What `auto` stands for: without data the one to take unmeasured, otherwise all that are worth a measurement.

    A candidate has 8 bits, or the most exact type that is fast here. A target that is named is a candidate even where
    it cannot run, so that compiling it says why. Raises UsageError for an unknown target and for a precision that no
    candidate has, MachineError when no engine is installed.
    """
    if target not in (AUTO, *TARGETS):
        raise UsageError(f"target {target!r} does not exist; choose auto or one of {', '.join(TARGETS)}")
    device = hardware.device.type
    mine = [name for name in _TARGETS[device] if not (name in MODULES and unfit(name, hardware))]
    names = [name for name in mine if TARGETS[name].installed] if target == AUTO else [target]
    if not names:
        raise MachineError(f"no engine for this machine is installed; {TARGETS[mine[0]].hint}")
    if precision == AUTO and (model / SCALES).is_file():
        precision = Scales.load(model).format
    found = []
    for name in names:
        there = TARGETS[name].on(device)
        if precision != AUTO:
            wanted = [precision] if precision in there or target != AUTO else []
        else:
            wanted = [_exact(there, hardware)]
            if data and "int8" in there and name not in MODULES:  # those take 8 bits from a quantized model alone
                wanted.append("int8")
        found += [Candidate(name, each) for each in wanted]
    if not found:
        raise UsageError(f"none of {', '.join(names)} has precision {precision!r} on {hardware.name}")
    return found if data else found[:1]


def _exact(there: tuple[str, ...], hardware: Hardware) -> str:
    """The type the device is fastest in, 8 bits apart, of those that a target has `there`."""
    fast = {"bf16": hardware.bf16, "fp16": hardware.device.type == "cuda"}
    return next((name for name, is_fast in fast.items() if is_fast and name in there), "fp32")


def compile_fastest(
    model: Path,
    wanted: list[Candidate],
    data: Path,
    out: Path,
    say: Callable[[str], object],
    seconds: float = math.inf,
) -> list[Candidate]:
    """Builds and times `wanted`, keeps the fastest that proved itself as `out`; returns all, the kept one first.

    After the first, one that would hardly be done within `seconds` from now is passed over. Raises what is wrong with
    the model or the data, and the first candidate's error when none proved itself.
    """
    _check(model, data)
    end, exact = time.monotonic() + seconds, 0.0  # `exact`: seconds that an engine takes without calibration
    tried: list[Candidate] = []
    with fresh_directory(out) as folder:
        for candidate in wanted:
            began, times = time.monotonic(), _INT8_TAKES if candidate.precision == "int8" else 1.0
            if tried and began + exact * times > end:
                late = MachineError(f"passed over: it takes some {exact * times:.0f} s, which are not left")
                tried.append(replace(candidate, error=late))
                continue
            tried.append(_try(model, candidate, data, folder / candidate.name, say))
            exact = max(exact, (time.monotonic() - began) / times)
        tried.sort(key=lambda candidate: -candidate.questions_per_s)  # those that are out stay in order, at the end
        best = tried[0]
        if best.error is not None:
            raise best.error
        for path in (folder / best.name).iterdir():
            path.rename(folder / path.name)
        for candidate in tried:
            shutil.rmtree(folder / candidate.name, ignore_errors=True)
    return tried


def _check(model: Path, data: Path) -> None:
    """Raises here, once and before anything is written, what each candidate would raise."""
    read_manifest(model, "run", "model", "quantized")
    check_merged(model)
    Predictor.load(model, "fp32").examples(PreparedData.open(data), np.zeros(0, np.int64))


def _try(model: Path, candidate: Candidate, data: Path, folder: Path, say: Callable[[str], object]) -> Candidate:
    target, precision = candidate.target, candidate.precision
    say(f"{target} {precision}")
    try:
        receipt = compile_model(model, target, precision, data, folder, say)
        speed = _timed(folder, data, say)
    except Exception as error:  # of any library: what is wrong with one candidate must not lose the others
        out = Candidate(target, precision, error=error)
        say(out.why)
        return out
    return Candidate(target, precision, speed, receipt)


def _timed(folder: Path, data: Path, say: Callable[[str], object]) -> float:
    """Questions a second of the engine in `folder` on validation rows."""
    predictor = Predictor.load(folder)  # which refuses an engine that this machine can build but not run
    try:
        work = Workload.of(predictor, PreparedData.open(data), "validation", TIMED_ROWS)
        say(f"timing {len(work.timed)} validation rows")
        return throughput(predictor.backend, work.examples, work.timed, predictor.backend.shape, REPEATS).median
    finally:
        predictor.backend.close()

"""The engine for the machine at hand: every candidate is built, proves itself and is timed; the fastest is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertforge.artifact import fresh_directory
from bertforge.backends.registry import TARGETS
from bertforge.benchmark.measure import throughput
from bertforge.benchmark.workload import Workload
from bertforge.data.prepared import PreparedData
from bertforge.errors import BertforgeError, MachineError, UsageError
from bertforge.hardware import Hardware
from bertforge.inference.compile import compile_model
from bertforge.inference.predictor import Predictor
from bertforge.scales import SCALES, Scales

AUTO = "auto"
TIMED_ROWS, REPEATS = 200, 3
# Which targets a device runs, the one to take unmeasured first.
_TARGETS = {"cpu": ("openvino", "onnxruntime"), "cuda": ("tensorrt", "tensorrt-rtx", "onnxruntime")}


@dataclass(frozen=True)
class Candidate:
    """An engine that was tried."""

    target: str
    precision: str
    questions_per_s: float = 0.0
    receipt: dict[str, Any] | None = None
    error: BertforgeError | None = None
    """Why it is out, if it is."""

    @property
    def name(self) -> str:
        """As its folder is called."""
        return f"{self.target}-{self.precision}"


def candidates(model: Path, target: str, precision: str, hardware: Hardware, data: Path | None) -> list[Candidate]:
    """What `auto` stands for: without data the one to take unmeasured, otherwise all that are worth a measurement.

    A candidate has 8 bits, or the most exact type that is fast here. Raises UsageError for an unknown target,
    MachineError when no engine is installed.
    """
    if target not in (AUTO, *TARGETS):
        raise UsageError(f"target {target!r} does not exist; choose auto or one of {', '.join(TARGETS)}")
    mine = [name for name in _TARGETS[hardware.device.type] if name in TARGETS]
    names = [name for name in mine if TARGETS[name].installed] if target == AUTO else [target]
    if not names:
        raise MachineError(f"no engine for this machine is installed; {TARGETS[mine[0]].hint}")
    found = []
    for name in names:
        exact = "bf16" if hardware.bf16 and "bf16" in TARGETS[name].precisions else "fp32"
        if precision != AUTO:
            wanted = [precision] if precision in TARGETS[name].precisions or target != AUTO else []
        elif (model / SCALES).is_file():
            wanted = [Scales.load(model).format]
        else:
            wanted = [exact, "int8"] if data else [exact]
        found += [Candidate(name, each) for each in wanted]
    if not found:
        raise UsageError(f"none of {', '.join(names)} has precision {precision!r}")
    return found if data else found[:1]


def compile_fastest(
    model: Path, wanted: list[Candidate], data: Path, out: Path, say: Callable[[str], object]
) -> list[Candidate]:
    """Builds and times `wanted`, keeps the fastest that proved itself as `out`; returns all, the kept one first.

    Raises the first candidate's error when none proved itself.
    """
    with fresh_directory(out) as folder:
        tried = [_try(model, candidate, data, folder / candidate.name, say) for candidate in wanted]
        tried.sort(key=lambda candidate: -candidate.questions_per_s)  # those that are out stay in order, at the end
        best = tried[0]
        if best.error is not None:
            raise best.error
        for path in (folder / best.name).iterdir():
            path.rename(folder / path.name)
        for candidate in tried:
            shutil.rmtree(folder / candidate.name, ignore_errors=True)
    return tried


def _try(model: Path, candidate: Candidate, data: Path, folder: Path, say: Callable[[str], object]) -> Candidate:
    target, precision = candidate.target, candidate.precision
    say(f"{target} {precision}")
    try:
        receipt = compile_model(model, target, precision, data, folder, say)
        predictor = Predictor.load(folder)  # which refuses an engine that this machine can build but not run
    except BertforgeError as error:
        say(str(error))
        return Candidate(target, precision, error=error)
    work = Workload.of(predictor, PreparedData.open(data), "validation", TIMED_ROWS)
    say(f"timing {len(work.timed)} validation rows")
    speed = throughput(predictor.backend, work.examples, work.timed, predictor.backend.shape, REPEATS)
    predictor.backend.close()
    return Candidate(target, precision, speed.median, receipt)

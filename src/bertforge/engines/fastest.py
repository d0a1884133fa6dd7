"""The engine for the machine at hand: which candidates are worth a trial, and all of them tried, the fastest first.

How a candidate is built and timed is the caller's (`jobs.compile`). A candidate of 8 bits always has one of the exact
type beside it unless 8 bits were asked for by name: an 8-bit engine that is slower than a 16-bit one is no use.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bertforge.engines.registry import TARGETS
from bertforge.errors import MachineError, UsageError, reason
from bertforge.hardware import Hardware
from bertforge.scales import FORMATS, SCALES, Scales

AUTO = "auto"
_RANGES_TAKE = 1.5  # times what an exact engine takes to build and prove: ranges are found first


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
        found: dict[str, Any] = {"questions_per_s": self.questions_per_s, "accuracy": None}
        if self.receipt:
            found |= {
                "accuracy": self.receipt["validation_accuracy"],
                "accuracy_of_model": self.receipt["validation_accuracy_model"],
                "rows": self.receipt["accuracy_loss"]["rows"],
                "ran": self.receipt["products"]["label"] if self.receipt.get("products") else self.precision,
            }
        return {"target": self.target, "precision": self.precision, **found, "why": self.why}

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
    mine = [each.name for each in TARGETS.values() if each.on(hardware) and not each.unfit(hardware)]
    names = [name for name in mine if TARGETS[name].installed] if target == AUTO else [target]
    if not names:
        raise MachineError(f"no engine for this machine is installed; {TARGETS[mine[0]].hint}")
    eight = Scales.load(model).format if (model / SCALES).is_file() else ""  # of a quantized model
    found = []
    for name in names:
        here = TARGETS[name]
        there = here.on(hardware)
        if precision != AUTO:
            wanted = [precision] if precision in there or target != AUTO else []
        elif eight:
            wanted = [each for each in (eight, _exact(there, hardware)) if each in there]
        else:
            wanted = [_exact(there, hardware)]
            wanted += [each for each in here.calibrates if data and each in there]
        found += [Candidate(name, each) for each in wanted]
    if not found:
        raise UsageError(f"none of {', '.join(names)} has precision {precision!r} on {hardware.name}")
    timed = data and not (target != AUTO and TARGETS[target].unfit(hardware))
    return found if timed else found[:1]


def _exact(there: tuple[str, ...], hardware: Hardware) -> str:
    """The type the device is fastest in, 8 bits apart, of those that a target has `there`."""
    fast = {"bf16": hardware.bf16, "fp16": hardware.device.type == "cuda", "fp32": True}
    return next((name for name, is_fast in fast.items() if is_fast and name in there), (*there, "fp32")[0])


def fastest(
    wanted: list[Candidate],
    attempt: Callable[[Candidate], Candidate],
    say: Callable[[str], object],
    seconds: float = math.inf,
) -> list[Candidate]:
    """All of `wanted` after `attempt`, which builds, proves and times one, the fastest first.

    An error of `attempt`, of any library, is the candidate's own: what is wrong with one must not lose the others.
    After the first, a candidate that would hardly be done within `seconds` from now is passed over. Raises the first
    one's error when none proved itself.
    """
    end, usual = time.monotonic() + seconds, 0.0  # seconds that an engine takes without calibration
    tried: list[Candidate] = []
    for candidate in wanted:
        began, times = time.monotonic(), _RANGES_TAKE if candidate.precision in FORMATS else 1.0
        if tried and began + usual * times > end:
            late = MachineError(f"passed over: it takes some {usual * times:.0f} s, which are not left")
            tried.append(replace(candidate, error=late))
            continue
        say(candidate.name)
        try:
            tried.append(attempt(candidate))
        except Exception as error:
            tried.append(replace(candidate, error=error))
            say(tried[-1].why)
        usual = max(usual, (time.monotonic() - began) / times)
    tried.sort(key=lambda candidate: -candidate.questions_per_s)  # those that are out stay in order, at the end
    if tried[0].error is not None:
        raise tried[0].error
    return tried

"""Every target by name, in the order in which `auto` would take them unmeasured: adding one is a line here."""

from __future__ import annotations

from pathlib import Path

from bertforge.engines import native, onnxruntime, openvino, tensorrt
from bertforge.engines.base import Engine, Target
from bertforge.errors import MachineError, UsageError
from bertforge.hardware import Hardware

TARGETS = {
    target.name: target
    for target in (native.TARGET, tensorrt.TARGET, tensorrt.RTX_TARGET, openvino.TARGET, onnxruntime.TARGET)
}


def check_target(name: str, precision: str, hardware: Hardware) -> Target:
    """The target; raises UsageError for a name or precision it does not know, MachineError without its libraries, on
    a device it does not run on, and for a precision that it has on other hardware."""
    if name not in TARGETS:
        raise UsageError(f"target {name!r} does not exist; choose one of {', '.join(TARGETS)}")
    target = TARGETS[name]
    if precision not in target.precisions:
        raise UsageError(f"{name} has no precision {precision!r}; choose one of {', '.join(target.precisions)}")
    there = target.on(hardware)
    if not there:
        raise MachineError(f"{name} cannot build an engine here: {target.unfit(hardware)}")
    if precision not in there:
        raise MachineError(
            f"{name} computes in {' or '.join(there)} on {hardware.name}, not in {precision}; "
            f"bertforge compile MODEL --target {name} --precision {there[-1]}"
        )
    if not target.installed:
        raise MachineError(f"{name} needs {', '.join(target.libraries)}; {target.hint}")
    return target


def open_engine(directory: Path, target: str, precision: str, hardware: Hardware) -> Engine:
    """The engine in `directory`, ready to run."""
    return check_target(target, precision, hardware).open(directory, precision, hardware)

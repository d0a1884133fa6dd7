"""Target names -> what they can compute in, which library they need, and how an artifact of theirs is opened."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import util
from pathlib import Path

from bertforge.backends.base import Backend
from bertforge.errors import MachineError, UsageError
from bertforge.hardware import Hardware
from bertforge.tensorrt_library import ENGINE, MODULES


@dataclass(frozen=True)
class Target:
    """An engine that `bertforge compile` builds for."""

    precisions: tuple[str, ...]
    libraries: tuple[str, ...]
    """Modules to import, all of them."""
    extra: str
    """Of bertforge, which installs them."""
    file: str
    """What the engine is loaded from, in its folder."""
    only: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Type of device -> those of `precisions` it runs, none where it does not run; all where it is not named."""

    def on(self, device: str) -> tuple[str, ...]:
        """What it computes in on a type of device."""
        return self.only.get(device, self.precisions)

    @property
    def installed(self) -> bool:
        """Whether its libraries are there."""
        return all(util.find_spec(name) for name in self.libraries)

    @property
    def hint(self) -> str:
        """The command that installs them."""
        return f"pip install 'bertforge[{self.extra}]'"


_ALL = ("fp32", "fp16", "bf16", "int8", "fp8")
TARGETS = {
    "onnxruntime": Target(
        ("fp32", "fp16", "int8"),
        ("onnx", "onnxruntime"),
        "onnxruntime",
        "model.onnx",
        # Its float16 is emulated on a CPU; its int8 products are a CPU's, and on a GPU many times slower than float32.
        {"cpu": ("fp32", "int8"), "cuda": ("fp32", "fp16")},
    ),
    "openvino": Target(("fp32", "bf16", "int8"), ("onnx", "openvino", "nncf"), "openvino", "model.xml", {"cuda": ()}),
    "tensorrt": Target(_ALL, ("onnx", MODULES["tensorrt"]), "tensorrt", ENGINE),
    "tensorrt-rtx": Target(_ALL, ("onnx", MODULES["tensorrt-rtx"]), "tensorrt-rtx", ENGINE),
}


def check_target(name: str, precision: str, hardware: Hardware) -> Target:
    """The target; raises UsageError for a name or precision it does not know, MachineError without its libraries, on
    a device it does not run on, and for a precision that it has on other hardware."""
    if name not in TARGETS:
        raise UsageError(f"target {name!r} does not exist; choose one of {', '.join(TARGETS)}")
    target = TARGETS[name]
    if precision not in target.precisions:
        raise UsageError(f"{name} has no precision {precision!r}; choose one of {', '.join(target.precisions)}")
    there = target.on(hardware.device.type)
    if not there:
        raise MachineError(
            f"{name} runs on a CPU, and the device here is {hardware.name}; take another target, "
            "or hide the GPU: CUDA_VISIBLE_DEVICES=-1 bertforge ..."
        )
    if precision not in there:
        raise MachineError(
            f"{name} computes in {' or '.join(there)} on {hardware.name}, not in {precision}; "
            f"bertforge compile MODEL --target {name} --precision {there[-1]}"
        )
    if not target.installed:
        raise MachineError(f"{name} needs {', '.join(target.libraries)}; {target.hint}")
    return target


def open_engine(directory: Path, target: str, precision: str, hardware: Hardware) -> Backend:
    """The engine in `directory`, ready to run."""
    path = directory / check_target(target, precision, hardware).file
    if target == "onnxruntime":
        from bertforge.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(path, hardware, precision)
    if target in MODULES:
        from bertforge.backends.tensorrt import TensorRtBackend

        return TensorRtBackend(path, hardware, precision, target)
    from bertforge.backends.openvino import OpenVinoBackend

    return OpenVinoBackend(path, hardware, precision)

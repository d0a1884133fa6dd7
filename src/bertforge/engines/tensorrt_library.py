"""NVIDIA's two TensorRT libraries, as far as building and running share them.

`tensorrt` (10 and 11) builds an engine on the GPU it will run on. `tensorrt_rtx` has the same API under another name,
builds anywhere and compiles for the GPU at hand when the engine is loaded. Either refuses engines of another version.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from bertforge.errors import ArtifactError, MachineError
from bertforge.hardware import Hardware

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
ENGINE, GRAPH, BUILT_FOR = "model.engine", "model.onnx", "engine.json"
# What an engine folder keeps for the next time: timings of kernels (tensorrt), compiled kernels (tensorrt-rtx).
TIMING_CACHE, RUNTIME_CACHE = "timing.cache", "runtime.cache"
_RTX_GPUS = "GPUs of compute capability 8.0, 8.6, 8.9 and 12.x"


def load_library(target: str) -> Any:
    """The module of `target`; raises MachineError where it is not installed."""
    try:
        return importlib.import_module(MODULES[target])
    except ImportError as error:
        raise MachineError(f"{target} cannot be imported ({error}); pip install 'bertforge[{target}]'") from None


def unfit(target: str, hardware: Hardware) -> str | None:
    """Why no engine of `target` runs on this machine; None where one does."""
    if hardware.capability is None:
        return "this machine has no NVIDIA GPU"
    if target == "tensorrt-rtx" and not (
        hardware.capability in ((8, 0), (8, 6), (8, 9)) or hardware.capability[0] == 12
    ):
        return f"TensorRT-RTX runs on {_RTX_GPUS}, not on {_gpu(hardware)}; take --target tensorrt there"
    return None


def new_log(library: Any) -> Any:
    """A logger that prints nothing and keeps what counts: `errors`, and `layers`, the builder's list of them."""

    class Log(library.ILogger):  # type: ignore[misc]  # the base class is known at run time only
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, msg: str) -> None:
            if severity in (library.ILogger.INTERNAL_ERROR, library.ILogger.ERROR):
                self.errors.append(msg)
            elif msg.startswith("Layers:"):
                self.layers = msg

        @property
        def reason(self) -> str:
            """The first error in one line."""
            return " ".join(self.errors[0].split()) if self.errors else "no reason given"

    return Log()


def sizes_of(dims: Any) -> tuple[int, ...]:
    """A `Dims` as a tuple."""
    return tuple(int(size) for size in dims)


@dataclass(frozen=True)
class BuiltFor:
    """What an engine depends on: one built for the same need not be built again."""

    target: str
    version: str
    """Of the library."""
    gpu: str
    graph: str
    """Hash of the ONNX file."""
    shapes: tuple[tuple[int, int], ...]
    """Rows and tokens of each profile."""

    @classmethod
    def here(cls, target: str, hardware: Hardware, graph: str, shapes: tuple[tuple[int, int], ...]) -> Self:
        """What an engine built on this machine depends on."""
        gpu = _RTX_GPUS if target == "tensorrt-rtx" else _gpu(hardware)
        return cls(target, str(load_library(target).__version__), gpu, graph, shapes)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """From an engine's folder; raises ArtifactError when its record is missing or damaged."""
        try:
            found = json.loads((folder / BUILT_FOR).read_text())["built_for"]
            return cls(**found | {"shapes": tuple((rows, length) for rows, length in found["shapes"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{folder / BUILT_FOR} is missing or damaged ({error!r}); compile it again") from error

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def _gpu(hardware: Hardware) -> str:
    if hardware.capability is None:
        return hardware.name
    return f"{hardware.name} (compute capability {hardware.capability[0]}.{hardware.capability[1]})"

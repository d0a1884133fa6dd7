"""Libraries that call home or write into the home folder when they are imported, imported so that they do neither.

What they did on import alone, seen with strace on 2026-11-26:

| library | on import | how it is switched off here |
| --- | --- | --- |
| ONNX Runtime 1.32 | writes a device id and a data base of events under `~/.cache/Microsoft`, looks up and calls Microsoft's collector | `ORT_DISABLE_TELEMETRY=1`, which its Privacy.md documents; a call from Python comes after the first event |
| OpenVINO 2026.4 | writes `~/intel/openvino_ga_cid` and `~/intel/stats`, looks up and calls Google Analytics | its module openvino-telemetry is hidden during the import: OpenVINO then takes the stub that it brings along. What its documents name, `opt_in_out --opt_out`, writes into `~/intel` too and sends the news that somebody opted out |
| Matplotlib 3.11 | writes a list of fonts under `~/.cache/matplotlib` and makes `~/.config/matplotlib` | `MPLCONFIGDIR` names a temporary folder during the import, which is then removed: 0.2 s for each report |

ModelOpt 0.47, TensorRT-RTX 1.7, scikit-learn, TensorBoard, openpyxl, onnx and torch called nobody.

So these three are imported through `load` alone; `tests/test_architecture.py` holds the package to it. Child processes
load them the same way. What the user has set on purpose stays as it is: a value of ORT_DISABLE_TELEMETRY or
MPLCONFIGDIR, and a library that was imported before.
"""  # noqa: E501  (rows of a table)

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from tempfile import TemporaryDirectory
from typing import Any

_ONNX_RUNTIME_SWITCH = "ORT_DISABLE_TELEMETRY"
_OPENVINO_SENDER = "openvino_telemetry"
_MATPLOTLIB_FOLDER = "MPLCONFIGDIR"


def load(name: str) -> Any:
    """The module `name` of one of LIBRARIES, or any module inside it; raises ImportError where it is not installed."""
    library = name.partition(".")[0]
    with nullcontext() if library in sys.modules else LIBRARIES[library]():
        return import_module(name)


def telemetry() -> str:
    """What calls home, for `bertforge doctor`: nothing, unless the user has asked for it."""
    value = os.environ.get(_ONNX_RUNTIME_SWITCH, "1")
    if value.lower() in ("", "0", "false"):  # the values that ONNX Runtime takes for no
        return (
            f"ONNX Runtime calls home, for {_ONNX_RUNTIME_SWITCH}={value} asks for it; `unset {_ONNX_RUNTIME_SWITCH}`"
        )
    return "nothing calls home: ONNX Runtime's and OpenVINO's is switched off before their import"


@contextmanager
def _onnxruntime() -> Iterator[None]:
    os.environ.setdefault(_ONNX_RUNTIME_SWITCH, "1")
    yield


@contextmanager
def _openvino() -> Iterator[None]:
    """A module that is None in `sys.modules` cannot be imported."""
    before = sys.modules.get(_OPENVINO_SENDER)
    sys.modules[_OPENVINO_SENDER] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[_OPENVINO_SENDER]
        if before is not None:
            sys.modules[_OPENVINO_SENDER] = before


@contextmanager
def _matplotlib() -> Iterator[None]:
    """The list of fonts is made with the first import of `matplotlib.figure`, and never read again."""
    if _MATPLOTLIB_FOLDER in os.environ:
        yield
        return
    with TemporaryDirectory() as folder:
        os.environ[_MATPLOTLIB_FOLDER] = folder
        try:
            import_module("matplotlib.figure")
            yield
        finally:
            del os.environ[_MATPLOTLIB_FOLDER]


LIBRARIES = {"onnxruntime": _onnxruntime, "openvino": _openvino, "matplotlib": _matplotlib}

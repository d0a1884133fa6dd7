"""A real Triton server, out of NVIDIA's package `nvidia-pytriton`, for tests: `make test` puts it into `.venv/triton`.

The package has the server and its Python backend, but no backend of ONNX Runtime or OpenVINO. So a Python model runs
the engine's file, with the inputs, outputs and batches of the engine's own configuration. The server's Python must have
NumPy 1, for its Python backend is older than NumPy 2.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnxruntime
import pytest

import bertforge

PACKAGE = Path(sys.prefix) / "triton"
_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
_LIBRARIES = Path(sysconfig.get_config_var("LIBDIR") or "")  # the backend's process is linked to libpython
_THERE = (PACKAGE / "pytriton").is_dir() and (PACKAGE / "numpy").is_dir()
needs_triton = pytest.mark.skipif(
    not (_THERE and (_LIBRARIES / f"libpython{_VERSION}.so.1.0").is_file()),
    reason="needs a Triton server: make .venv/triton, on Python 3.11 or 3.12 with a shared libpython",
)

_ENGINE = """
import onnxruntime, os
import triton_python_backend_utils as triton

class TritonPythonModel:
    def initialize(self, args):
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        return [self.respond(request) for request in requests]

    def respond(self, request):
        tensors = {value.name: triton.get_input_tensor_by_name(request, value.name).as_numpy()
                   for value in self.session.get_inputs()}
        return triton.InferenceResponse([triton.Tensor("logits", self.session.run(["logits"], tensors)[0])])
"""


def run_engines_in_python(repository: Path) -> None:
    """Replaces the backend of ONNX Runtime, and nothing else."""
    for config in repository.glob("*/config.pbtxt"):
        text = config.read_text()
        if 'backend: "onnxruntime"' in text:
            config.write_text(text.replace('backend: "onnxruntime"', 'backend: "python"'))
            (config.parent / "1" / "model.py").write_text(_ENGINE)


@contextmanager
def serving(repository: Path, scratch: Path) -> Iterator[str]:
    """The address of a server of `repository`, once it is ready; fails with what it said if it ends before that."""
    address, log = f"127.0.0.1:{_free_port()}", scratch / "triton.log"
    options = {
        "model-repository": repository,
        "backend-directory": _backends(scratch / "backends"),
        "http-address": "127.0.0.1",
        "http-port": address.partition(":")[2],
        "allow-grpc": "false",
        "allow-metrics": "false",
        "exit-timeout-secs": 5,
    }
    environment = {
        **os.environ,
        "PATH": f"{_python(scratch / 'python')}:{os.environ['PATH']}",  # where its Python looks for packages
        "LD_LIBRARY_PATH": f"{PACKAGE / 'nvidia_pytriton.libs'}:{_LIBRARIES}",
    }
    command = [_executable(PACKAGE / "pytriton/tritonserver/bin/tritonserver")]
    command += [f"--{name}={value}" for name, value in options.items()]
    with log.open("wb") as said, subprocess.Popen(command, stdout=said, stderr=said, env=environment) as server:
        try:
            while not _ready(address):
                assert server.poll() is None, log.read_text()[-4000:]
                time.sleep(0.05)
            yield f"http://{address}"
        finally:
            server.terminate()


def _backends(folder: Path) -> Path:
    package = PACKAGE / "pytriton" / "tritonserver"
    python = folder / "python"
    python.mkdir(parents=True)
    stub = package / "python_backend_stubs" / _VERSION / "triton_python_backend_stub"
    for path in (*(package / "backends" / "python").iterdir(), _executable(stub)):
        (python / path.name).symlink_to(path)
    return folder


def _python(folder: Path) -> Path:
    """The `bin` of an environment with the packages of this one, NumPy aside."""
    venv.create(folder, symlinks=True)
    (folder / "lib" / f"python{_VERSION}" / "site-packages" / "these.pth").write_text(
        "\n".join(map(str, [PACKAGE, Path(bertforge.__file__).parents[1], Path(onnxruntime.__file__).parents[1]]))
    )
    return folder / "bin"


def _executable(path: Path) -> Path:
    path.chmod(0o755)  # which pip does not keep
    return path


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def _ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/v2/health/ready", timeout=1) as response:
            return bool(response.status == 200)
    except OSError:
        return False

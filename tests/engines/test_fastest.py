"""`auto`: what it tries on which machine."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bertforge.engines.fastest import candidates
from bertforge.engines.registry import TARGETS
from bertforge.errors import MachineError, UsageError
from bertforge.hardware import detect
from bertforge.scales import Scales

DATA = Path("data")
H100 = replace(detect(), device=torch.device("cuda"), name="NVIDIA H100", bf16=True, capability=(9, 0))


def names(*arguments, bf16=True):
    model, target, precision, data = arguments
    found = candidates(model, target, precision, replace(detect(), bf16=bf16), data)
    return [candidate.name for candidate in found]


def test_what_is_tried(tmp_path):
    assert names(tmp_path, "auto", "auto", None) == ["openvino-bf16"]
    assert names(tmp_path, "auto", "auto", None, bf16=False) == ["openvino-fp32"]
    every = ["openvino-bf16", "openvino-int8", "onnxruntime-fp32", "onnxruntime-int8"]
    assert names(tmp_path, "auto", "auto", DATA) == every
    assert names(tmp_path, "onnxruntime", "auto", DATA) == every[2:]
    assert names(tmp_path, "auto", "int8", DATA) == every[1::2]
    assert names(tmp_path, "openvino", "fp32", DATA) == ["openvino-fp32"]
    with pytest.raises(UsageError, match="'tpu' does not exist; choose auto or one of"):
        names(tmp_path, "tpu", "auto", DATA)
    with pytest.raises(UsageError, match="none of openvino, onnxruntime has precision 'fp4'"):
        names(tmp_path, "auto", "fp4", DATA)


@pytest.fixture
def all_installed(monkeypatch):
    for name, target in TARGETS.items():
        monkeypatch.setitem(TARGETS, name, replace(target, libraries=()))


def on_gpu(*arguments, **changes):
    model, target, precision, data = arguments
    return [each.name for each in candidates(model, target, precision, replace(H100, **changes), data)]


@pytest.mark.usefixtures("all_installed")
def test_what_is_tried_on_a_gpu_is_what_runs_there(tmp_path):
    own = ["native-bf16", "native-int8", "native-fp8"]
    assert on_gpu(tmp_path, "auto", "auto", DATA) == [*own, "tensorrt-bf16", "onnxruntime-fp16"]
    rtx = ["tensorrt-bf16", "tensorrt-rtx-bf16", "onnxruntime-fp16"]
    assert on_gpu(tmp_path, "auto", "auto", DATA, capability=(8, 9)) == [*own, *rtx]
    assert on_gpu(tmp_path, "auto", "auto", DATA, capability=(8, 6)) == [*own[:2], *rtx], "Ampere has no fp8"
    turing = {"capability": (7, 5), "bf16": False}
    assert on_gpu(tmp_path, "auto", "auto", DATA, **turing) == ["tensorrt-fp16", "onnxruntime-fp16"]
    assert on_gpu(tmp_path, "auto", "fp32", DATA) == ["tensorrt-fp32", "onnxruntime-fp32"]
    assert on_gpu(tmp_path, "auto", "bf16", DATA) == ["native-bf16", "tensorrt-bf16"]
    assert on_gpu(tmp_path, "auto", "auto", None) == ["native-bf16"]
    assert on_gpu(tmp_path, "onnxruntime", "auto", DATA) == ["onnxruntime-fp16"]
    assert on_gpu(tmp_path, "tensorrt-rtx", "auto", DATA) == ["tensorrt-rtx-bf16"], "named: it is built, not timed"
    Scales("int8", {}).save(tmp_path)
    quantized = ["native-int8", "native-bf16", "tensorrt-int8", "tensorrt-bf16", "onnxruntime-fp16"]
    assert on_gpu(tmp_path, "auto", "auto", DATA) == quantized


def test_quantized_candidates_have_its_format(tmp_path):
    Scales("int8", {}).save(tmp_path)
    exact = ["openvino-int8", "openvino-bf16", "onnxruntime-int8", "onnxruntime-fp32"]
    assert names(tmp_path, "auto", "auto", DATA) == exact, "8 bits are worth nothing where 16 are faster"
    assert names(tmp_path, "auto", "int8", DATA) == exact[::2]
    Scales("fp8", {}).save(tmp_path)
    assert names(tmp_path, "auto", "auto", DATA) == exact[1::2]
    with pytest.raises(UsageError, match="none of openvino, onnxruntime has precision 'fp8' on "):
        names(tmp_path, "auto", "fp8", DATA)


def test_a_machine_without_an_engine_is_told_what_to_install(tmp_path, monkeypatch):
    for name in ("openvino", "onnxruntime"):
        monkeypatch.setitem(TARGETS, name, replace(TARGETS[name], libraries=("no_such_library",)))
    with pytest.raises(MachineError, match="pip install 'bertforge\\[openvino\\]'"):
        names(tmp_path, "auto", "auto", None)

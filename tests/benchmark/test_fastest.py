"""`auto`: what it tries on which machine, and that the fastest engine which proved itself is the one kept."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bertforge.artifact import read_manifest
from bertforge.backends.onnxruntime import OnnxRuntimeBackend
from bertforge.backends.registry import TARGETS, Target
from bertforge.benchmark.fastest import Candidate, candidates, compile_fastest
from bertforge.benchmark.measure import throughput
from bertforge.errors import ArtifactError, MachineError, UsageError
from bertforge.hardware import detect
from bertforge.scales import Scales
from tests.runs import run_command

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
    assert on_gpu(tmp_path, "auto", "auto", DATA) == ["tensorrt-bf16", "onnxruntime-fp16"]
    rtx = ["tensorrt-bf16", "tensorrt-rtx-bf16", "onnxruntime-fp16"]
    assert on_gpu(tmp_path, "auto", "auto", DATA, capability=(8, 9)) == rtx
    turing = {"capability": (7, 5), "bf16": False}
    assert on_gpu(tmp_path, "auto", "auto", DATA, **turing) == ["tensorrt-fp16", "onnxruntime-fp16"]
    assert on_gpu(tmp_path, "auto", "fp32", DATA) == ["tensorrt-fp32", "onnxruntime-fp32"]
    assert on_gpu(tmp_path, "auto", "bf16", DATA) == ["tensorrt-bf16"]
    assert on_gpu(tmp_path, "auto", "auto", None) == ["tensorrt-bf16"]
    assert on_gpu(tmp_path, "onnxruntime", "auto", DATA) == ["onnxruntime-fp16"]
    assert on_gpu(tmp_path, "tensorrt-rtx", "auto", DATA) == ["tensorrt-rtx-bf16"], "named: it is built, not timed"
    Scales("int8", {}).save(tmp_path)
    assert on_gpu(tmp_path, "auto", "auto", DATA) == ["tensorrt-int8"]


def test_quantized_candidates_have_its_format(tmp_path):
    Scales("int8", {}).save(tmp_path)
    assert names(tmp_path, "auto", "auto", DATA) == ["openvino-int8", "onnxruntime-int8"]
    Scales("fp8", {}).save(tmp_path)
    with pytest.raises(UsageError, match="none of openvino, onnxruntime has precision 'fp8' on "):
        names(tmp_path, "auto", "auto", DATA)


@pytest.mark.usefixtures("all_installed")
def test_openvino_named_on_a_gpu_says_why_not(runs, data, tmp_path, monkeypatch):
    (wanted,) = candidates(runs["full"], "openvino", "auto", H100, data)
    monkeypatch.setattr("bertforge.inference.compile.detect", lambda: H100)
    with pytest.raises(MachineError, match="openvino runs on a CPU, and the device here is NVIDIA H100"):
        compile_fastest(runs["full"], [wanted], data, tmp_path / "auto", lambda text: None)


def test_a_machine_without_an_engine_is_told_what_to_install(tmp_path, monkeypatch):
    for name in ("openvino", "onnxruntime"):
        monkeypatch.setitem(TARGETS, name, Target(("fp32",), ("no_such_library",), name, "model"))
    with pytest.raises(MachineError, match="pip install 'bertforge\\[openvino\\]'"):
        names(tmp_path, "auto", "auto", None)


def test_the_fastest_is_kept_and_the_others_say_why_not(runs, data, tmp_path):
    said = []
    wanted = [Candidate("openvino", "fp4"), Candidate("onnxruntime", "fp32"), Candidate("openvino", "bf16")]
    tried = compile_fastest(runs["full"], wanted, data, tmp_path / "auto", said.append)
    assert tried[0].questions_per_s >= tried[1].questions_per_s > 0
    assert tried[2].name == "openvino-fp4"
    assert "choose one of fp32, bf16, int8" in str(tried[2].error)
    kept = read_manifest(tmp_path / "auto", "engine")
    assert (kept["target"], kept["precision"]) == (tried[0].target, tried[0].precision)
    assert not [path for path in (tmp_path / "auto").iterdir() if path.is_dir()]
    assert {"loading the model", "writing the ONNX graph", "onnxruntime fp32"} <= set(said)


def test_the_first_is_built_and_the_others_are_passed_over_where_no_time_is_left(runs, data, tmp_path):
    wanted = [Candidate("openvino", "fp32"), Candidate("onnxruntime", "fp32")]
    kept, late = compile_fastest(runs["full"], wanted, data, tmp_path / "auto", lambda text: None, seconds=0.0)
    assert (kept.name, kept.why) == ("openvino-fp32", "")
    assert (late.name, late.receipt) == ("onnxruntime-fp32", None)
    assert late.why.startswith("passed over: it takes some")
    assert read_manifest(tmp_path / "auto", "engine")["target"] == "openvino"


def test_what_a_library_raises_puts_one_candidate_out(runs, data, tmp_path, monkeypatch):
    def fail(backend, *arguments):
        if backend.name == "onnxruntime":
            raise RuntimeError("out of memory\ntensor 7")
        return throughput(backend, *arguments)

    opened, closed = [], []
    monkeypatch.setattr(OnnxRuntimeBackend, "_session", watched(OnnxRuntimeBackend._session, opened))
    monkeypatch.setattr(OnnxRuntimeBackend, "close", watched(OnnxRuntimeBackend.close, closed))
    monkeypatch.setattr("bertforge.benchmark.fastest.throughput", fail)
    wanted = [Candidate("onnxruntime", "fp32"), Candidate("openvino", "fp32")]
    kept, out = compile_fastest(runs["full"], wanted, data, tmp_path / "auto", lambda text: None)
    assert (kept.name, kept.why) == ("openvino-fp32", "")
    assert (out.name, out.why) == ("onnxruntime-fp32", "RuntimeError: out of memory")
    assert len(closed) == len(set(opened)) == 2, "the one that proved itself, and the one that was timed"
    with pytest.raises(RuntimeError, match="out of memory"):
        compile_fastest(runs["full"], wanted[:1], data, tmp_path / "none", lambda text: None)
    assert not (tmp_path / "none").exists()


def watched(method, calls):
    """`method`, which adds the object it is called on to `calls`."""

    def call(self, *arguments):
        calls.append(self)
        return method(self, *arguments)

    return call


def test_nothing_is_left_when_none_proves_itself(runs, data, tmp_path):
    with pytest.raises(ArtifactError, match="merge first"):
        compile_fastest(runs["lora"], [Candidate("onnxruntime", "fp32")], data, tmp_path / "auto", lambda text: None)
    assert not list(tmp_path.iterdir())


def test_from_the_command_line(runs, data, tmp_path, capsys):
    model = shutil.copytree(runs["full"], tmp_path / "model")
    assert run_command("compile", model, "--target", "onnxruntime", "--data", data) == 0
    said = capsys.readouterr()
    assert "the fastest: kept" in said.out
    assert "slower" in said.out
    assert f"next: bertforge predict {model / 'engines' / 'auto'} " in said.out
    assert "writing the ONNX graph\n" in said.err
    assert run_command("compile", model) == 0
    capsys.readouterr()
    precision = "bf16" if detect().bf16 else "fp32"
    assert (model / "engines" / f"openvino-{precision}").is_dir()

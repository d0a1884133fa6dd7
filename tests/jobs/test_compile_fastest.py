"""Every candidate is built and timed, and the fastest that proved itself is the one kept."""

import shutil
from dataclasses import replace

import pytest
import torch

from bertforge.engines.fastest import Candidate, candidates
from bertforge.engines.measure import throughput
from bertforge.engines.onnxruntime import OnnxRuntimeEngine
from bertforge.errors import ArtifactError, MachineError
from bertforge.hardware import detect
from bertforge.jobs.compile import compile_fastest
from bertforge.manifest import read_manifest
from tests.runs import run_command

H100 = replace(detect(), device=torch.device("cuda"), name="NVIDIA H100", bf16=True, capability=(9, 0))


def test_openvino_named_on_a_gpu_says_why_not(runs, data, tmp_path, monkeypatch):
    (wanted,) = candidates(runs["full"], "openvino", "auto", H100, data)
    monkeypatch.setattr("bertforge.jobs.compile.detect", lambda: H100)
    with pytest.raises(MachineError, match=r"openvino cannot .* it runs on a CPU, and the device here is NVI"):
        compile_fastest(runs["full"], [wanted], data, tmp_path / "auto", lambda text: None)


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
    assert {"loading the model", "writing the ONNX graph", "onnxruntime-fp32"} <= set(said)


def test_the_first_is_built_and_the_others_are_passed_over_where_no_time_is_left(runs, data, tmp_path):
    wanted = [Candidate("openvino", "fp32"), Candidate("onnxruntime", "fp32")]
    kept, late = compile_fastest(runs["full"], wanted, data, tmp_path / "auto", lambda text: None, seconds=0.0)
    assert (kept.name, kept.why) == ("openvino-fp32", "")
    assert (late.name, late.receipt) == ("onnxruntime-fp32", None)
    assert late.why.startswith("passed over: it takes some")
    assert read_manifest(tmp_path / "auto", "engine")["target"] == "openvino"


def test_what_a_library_raises_puts_one_candidate_out(runs, data, tmp_path, monkeypatch):
    def fail(engine, *arguments):
        if engine.name == "onnxruntime":
            raise RuntimeError("out of memory\ntensor 7")
        return throughput(engine, *arguments)

    opened, closed = [], []
    monkeypatch.setattr(OnnxRuntimeEngine, "_session", watched(OnnxRuntimeEngine._session, opened))
    monkeypatch.setattr(OnnxRuntimeEngine, "close", watched(OnnxRuntimeEngine.close, closed))
    monkeypatch.setattr("bertforge.jobs.compile.throughput", fail)
    wanted = [Candidate("onnxruntime", "fp32"), Candidate("openvino", "fp32")]
    kept, out = compile_fastest(runs["full"], wanted, data, tmp_path / "auto", lambda text: None)
    assert (kept.name, kept.why) == ("openvino-fp32", "")
    assert (out.name, out.why) == ("onnxruntime-fp32", "RuntimeError: out of memory")
    assert len(closed) == len(set(opened)) == 3, "exactly, as it will be served, and timed"
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

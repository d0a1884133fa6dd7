"""`auto`: what it tries on which machine, and that the fastest engine which proved itself is the one kept."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bertforge.artifact import read_manifest
from bertforge.backends.registry import TARGETS, Target
from bertforge.benchmark.fastest import Candidate, candidates, compile_fastest
from bertforge.errors import ArtifactError, MachineError, UsageError
from bertforge.hardware import detect
from tests.runs import run_command

DATA = Path("data")


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

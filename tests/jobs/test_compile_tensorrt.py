"""TensorRT engines are built where they can be, served once proved, and taken over while nothing has changed."""

import importlib.util
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from bertforge.artifact import hash_file
from bertforge.data.prepared import PreparedData
from bertforge.engines.base import Order
from bertforge.engines.buckets import choose_edges
from bertforge.engines.registry import TARGETS
from bertforge.engines.tensorrt_library import unfit
from bertforge.errors import ArtifactError, MachineError, UsageError
from bertforge.hardware import detect
from bertforge.inference.predictor import Predictor
from bertforge.jobs.compile import compile_model, verify_engine
from bertforge.manifest import read_manifest
from bertforge.scales import Scales
from tests.engines.fake_tensorrt import GPU, MAGIC, install
from tests.runs import reseal, run_command

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed"),
    pytest.mark.skipif(unfit("tensorrt-rtx", detect()) is None, reason="a GPU here verifies at once"),
]
TARGET = "tensorrt-rtx"


@pytest.fixture(scope="module")
def model(runs, tmp_path_factory):
    """A run trained in full, with an engine that no GPU here could run, in the folder it is looked for."""
    folder = shutil.copytree(runs["full"], tmp_path_factory.mktemp("trt") / "model")
    compile_model(folder, TARGET, "fp16", None, folder / "engines" / f"{TARGET}-fp16")
    return folder


@pytest.fixture
def copied(model, tmp_path):
    """A copy of the model whose engine a test may change."""
    return shutil.copytree(model, tmp_path / "model")


@pytest.fixture
def engine(copied):
    return copied / "engines" / f"{TARGET}-fp16"


def on_a_gpu(monkeypatch, engine):
    """From here on this machine has a GPU that runs TensorRT-RTX, played by a fake that computes the engine's graph."""
    shapes = [tuple(shape) for shape in json.loads((engine / "engine.json").read_text())["built_for"]["shapes"]]
    version = json.loads((engine / "engine.json").read_text())["built_for"]["version"]
    install(monkeypatch, "tensorrt_rtx", engine / "model.onnx", shapes, version)
    (engine / "model.engine").write_bytes(MAGIC)
    reseal(engine)
    for module in ("jobs.compile", "inference.predictor"):
        monkeypatch.setattr(f"bertforge.{module}.detect", lambda: GPU)
    monkeypatch.setattr("bertforge.engines.base.util.find_spec", lambda name: True)


def test_an_engine_that_nothing_here_runs_says_so_and_is_not_served(engine):
    receipt = read_manifest(engine, "engine")
    assert receipt["verified"] is False
    assert receipt["not_verified"] == "this machine has no NVIDIA GPU"
    assert receipt["layers"]["gemm_share"]["fp16"] > 0.9
    assert receipt["edges"] == [48]
    with pytest.raises(ArtifactError, match=r"is not verified \(this machine has no NVIDIA GPU\)") as error:
        Predictor.load(engine)
    assert f"bertforge compile {engine.parent.parent} --target {TARGET} --precision fp16 --verify" in str(error.value)


def test_verifying_runs_the_proof_and_opens_the_engine(copied, engine, data, monkeypatch):
    with pytest.raises(MachineError, match="has no NVIDIA GPU"):
        verify_engine(copied, engine, None)
    assert read_manifest(engine, "engine")["verified"] is False
    on_a_gpu(monkeypatch, engine)
    receipt = verify_engine(copied, engine, data)
    assert receipt == read_manifest(engine, "engine")
    assert receipt["verified"]
    assert "not_verified" not in receipt
    assert receipt["device"] == GPU.name
    assert receipt["golden_agreement"]["rows"] == 16
    assert receipt["validation_agreement"]["rows"] > 10
    texts = ["How do I sort a list?", "a " * 60]
    np.testing.assert_allclose(
        Predictor.load(engine).logits(texts), Predictor.load(copied, "fp32").logits(texts), atol=2e-2
    )


def test_what_was_shown_on_one_gpu_is_not_believed_of_another(copied, engine, monkeypatch):
    on_a_gpu(monkeypatch, engine)
    verify_engine(copied, engine, None)
    Predictor.load(engine)
    other = replace(GPU, name="Fake RTX 3090", capability=(8, 6))
    monkeypatch.setattr("bertforge.inference.predictor.detect", lambda: other)
    with pytest.raises(ArtifactError, match=f"verified on {GPU.name}, and this is {other.name}; .* --verify$"):
        Predictor.load(engine)
    monkeypatch.setattr("bertforge.jobs.compile.detect", lambda: other)
    verify_engine(copied, engine, None)
    Predictor.load(engine)
    monkeypatch.setattr("bertforge.inference.predictor.detect", lambda: replace(other, name="a CPU", capability=None))
    with pytest.raises(MachineError, match="has no NVIDIA GPU"):
        Predictor.load(engine)


def test_an_engine_that_computes_something_else_stays_unverified(copied, engine, monkeypatch):
    on_a_gpu(monkeypatch, engine)
    monkeypatch.setattr("tests.engines.fake_tensorrt.FakeContext.compute", lambda self: None)  # logits stay 0
    with pytest.raises(ArtifactError, match="probabilities of 16 rows move by"):
        verify_engine(copied, engine, None)
    assert read_manifest(engine, "engine")["verified"] is False


def test_an_engine_of_other_weights_is_not_verified(copied, engine):
    reseal(copied, changed=True)
    with pytest.raises(ArtifactError, match=r"compiled from other weights .* compile it again: bertforge compile"):
        verify_engine(copied, engine, None)


def test_compiling_again_takes_the_engine_over_unless_something_changed(copied, engine, tmp_path):
    before = (engine / "model.engine").stat().st_mtime_ns
    receipt = compile_model(copied, TARGET, "fp16", None, engine)
    assert receipt["reused"]
    assert (engine / "model.engine").stat().st_mtime_ns == before
    record = json.loads((engine / "engine.json").read_text())
    (engine / "engine.json").write_text(json.dumps(record | {"built_for": record["built_for"] | {"version": "0.1"}}))
    assert not compile_model(copied, TARGET, "fp16", None, engine)["reused"], "another version"
    (engine / "model.engine").write_bytes(b"damaged")
    assert not compile_model(copied, TARGET, "fp16", None, engine)["reused"]
    assert hash_file(engine / "model.engine") == json.loads((engine / "engine.json").read_text())["engine"]
    (tmp_path / "new").mkdir()
    model = Predictor.load(copied, "fp32").engine.model
    order = Order("fp16", model, 48, lengths=np.array([9, 9, 48]), older=engine)
    receipt = TARGETS[TARGET].build(tmp_path / "new", order, detect())
    assert receipt["edges"] == [16, 48]
    assert not receipt["reused"], "other edges"
    assert receipt["padding_waste"] == pytest.approx(80 / 66 - 1)


def test_edges_come_from_the_data(copied, engine, data):
    receipt = compile_model(copied, TARGET, "fp16", data, engine)
    predictor, prepared = Predictor.load(copied, "fp32"), PreparedData.open(data)
    rows = prepared.rows(predictor.manifest["recipe"]["split"], "train")
    lengths = np.minimum(prepared.tokens(predictor.tokenizer).lengths[rows], 48)
    assert tuple(receipt["edges"]) == choose_edges(lengths, 48, 16)
    assert 0 <= receipt["padding_waste"] < 1


def test_what_is_not_an_engine_is_never_replaced(copied, engine, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("ten years of work")
    with pytest.raises(ArtifactError, match="already exists"):
        compile_model(copied, TARGET, "fp16", None, other)
    with pytest.raises(ArtifactError, match="is of kind 'run'"):
        compile_model(copied, TARGET, "fp16", None, copied)
    assert (other / "thesis.txt").exists()


def test_eight_bits_come_from_a_quantized_model(copied, runs, tmp_path):
    with pytest.raises(UsageError, match=r"bertforge quantize .* --precision fp8"):
        compile_model(copied, TARGET, "fp8", None, tmp_path / "e")
    predictor = Predictor.load(copied, "fp32")
    linear = [name for name, module in predictor.engine.model.named_modules() if name.endswith("dense")]
    scales = Scales("fp8", {name: 4.0 for name in linear if ".layer." in name})
    (tmp_path / "q").mkdir()
    order = Order("fp8", predictor.engine.model, 48, scales=scales)
    receipt = TARGETS[TARGET].build(tmp_path / "q", order, detect())
    assert receipt["layers"]["gemm_share"]["fp8"] > 0.2


def test_tensorrt_builds_only_where_it_runs(copied, tmp_path, monkeypatch):
    monkeypatch.setattr("bertforge.engines.base.util.find_spec", lambda name: True)
    with pytest.raises(MachineError, match="no NVIDIA GPU; run this command there, or take --target native"):
        compile_model(copied, "tensorrt", "fp16", None, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_from_the_command_line(copied, engine, capsys, monkeypatch):
    arguments = ("compile", copied, "--target", TARGET, "--precision", "fp16")
    assert run_command(*arguments) == 0
    said = capsys.readouterr().out
    assert "in fp16" in said
    assert "attention fused in" in said
    assert "not verified: this machine has no NVIDIA GPU" in said
    assert f"bertforge compile {copied} --target {TARGET} --precision fp16 --verify" in said
    on_a_gpu(monkeypatch, engine)
    assert run_command(*arguments, "--verify") == 0
    assert "labels changed" in capsys.readouterr().out

"""Broken graphs are refused and healthy ones kept, for every target and precision of a CPU.

A graph is broken after it was written and before the engine is made of it, so that the engine's own tools see a graph
that is as well formed as ours.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bertforge.errors import ArtifactError
from bertforge.export import bert_onnx
from bertforge.jobs.compile import compile_model
from bertforge.jobs.quantize import QuantizeOptions, quantize_model
from bertforge.model.config import BertConfig
from bertforge.quantize import ranges
from bertforge.training.finetune import finetune
from tests.proof.sabotage import ALL, broken, pair_off_by_one, pair_scaled, pair_too_narrow
from tests.runs import quick_recipe, reseal

SILENT = lambda text: None  # noqa: E731
ENGINES = [
    ("onnxruntime", "fp32", "model"),
    ("onnxruntime", "int8", "model"),
    ("onnxruntime", "int8", "quantized"),
    ("openvino", "fp32", "model"),
    ("openvino", "bf16", "model"),
    ("openvino", "int8", "model"),
    ("openvino", "int8", "quantized"),
]


@pytest.fixture(scope="module")
def folders(runs, data, tmp_path_factory):
    """A model, and what `quantize` made of it."""
    folder = tmp_path_factory.mktemp("proof")
    options = QuantizeOptions(calibration="max", smooth=0.5, rows=32, validation_rows=16)
    quantize_model(runs["full"], data, folder / "quantized", options, None, SILENT)
    return {"model": runs["full"], "quantized": folder / "quantized"}


@pytest.mark.parametrize(("target", "precision", "source"), ENGINES, ids=map("-".join, ENGINES))
@pytest.mark.parametrize("sabotage", ALL.values(), ids=ALL)
def test_a_broken_graph_is_refused(folders, data, tmp_path, monkeypatch, target, precision, source, sabotage):
    heads = BertConfig.load(folders[source]).num_attention_heads
    export = bert_onnx.export_onnx

    def sabotaged(*arguments, **options):
        path = export(*arguments, **options)
        broken(path, sabotage, **({"heads": heads} if sabotage.__name__ == "head_zeroed" else {}))
        return path

    monkeypatch.setattr(bert_onnx, "export_onnx", sabotaged)
    with pytest.raises(ArtifactError, match=r"not compute what the model|probabilities of|loses accuracy|labels of"):
        compile_model(folders[source], target, precision, data, tmp_path / "engine")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.01, 0.1], ids="a {:.0%}".format)
def test_ranges_that_are_too_small_are_refused(folders, data, tmp_path, monkeypatch, share):
    """Graph and ranges agree, so structure holds; the simulation has ranges of its own."""
    find = ranges.find_ranges

    def small(*arguments):
        found = find(*arguments)
        return replace(found, activations={point: share * amax for point, amax in found.activations.items()})

    monkeypatch.setattr(ranges, "find_ranges", small)
    with pytest.raises(ArtifactError, match=r"probabilities of .* no layer is left to spare"):
        compile_model(folders["model"], "openvino", "int8", data, tmp_path / "engine")


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("defect", [pair_scaled, pair_off_by_one, pair_too_narrow], ids=lambda defect: defect.__name__)
def test_one_pair_of_one_activation_is_seen(folders, tmp_path, monkeypatch, target, defect):
    """8 bits blur it: the engine's own logits move by less than they do in a healthy engine."""
    export = bert_onnx.export_onnx

    def sabotaged(*arguments, **options):
        path = export(*arguments, **options)
        broken(path, defect)
        return path

    monkeypatch.setattr(bert_onnx, "export_onnx", sabotaged)
    with pytest.raises(ArtifactError, match="does not compute what the model does"):
        compile_model(folders["quantized"], target, "int8", None, tmp_path / "engine")


def test_weights_of_another_epoch_are_refused(folders, data, tmp_path, monkeypatch):
    """Hardly any label differs, and the engine is in 8 bits."""
    export = bert_onnx.export_onnx

    def stale(model, *arguments, **options):
        for parameter in model.parameters():
            parameter.data.mul_(1.01)
        try:
            return export(model, *arguments, **options)
        finally:
            for parameter in model.parameters():
                parameter.data.div_(1.01)

    monkeypatch.setattr(bert_onnx, "export_onnx", stale)
    with pytest.raises(ArtifactError, match="does not compute what the model does"):
        compile_model(folders["model"], "openvino", "int8", data, tmp_path / "engine")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_healthy_engines_are_kept(base, data, tmp_path, seed):
    """Of models of several seeds, all of ENGINES: with a quantized folder each, 21 of them."""
    model, quantized = tmp_path / "model", tmp_path / "quantized"
    finetune(data, model, quick_recipe(base, "full", seed=seed))
    options = QuantizeOptions(preset="attention", calibration="percentile", rows=32, validation_rows=16)
    quantize_model(model, data, quantized, options, None, SILENT)
    for target, precision, source in ENGINES:
        out = tmp_path / f"{target}-{precision}-{source}"
        receipt = compile_model(tmp_path / source, target, precision, data, out)
        assert receipt["verified"]
        assert receipt["spared"] == [], (target, precision, source)


def test_what_8_bits_cost_most_is_spared(folders, data, tmp_path):
    """One channel of an input is 3,000 times as large as the others, to which one scale for all leaves nothing."""
    model = shutil.copytree(folders["model"], tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    for layer in (0, 1):
        name = f"bert.encoder.layer.{layer}.attention.self.value"
        for part in ("weight", "bias"):
            weights[f"{name}.{part}"][0] *= 3000.0
        weights[f"bert.encoder.layer.{layer}.attention.output.dense.weight"][:, 0] /= 3000.0
    # As many rows of either label, so that what is lost is seen in labels.
    manifest = json.loads((model / "bertforge.json").read_text())
    logits = np.array(manifest["golden"]["logits"])
    middle = float(np.median(logits[:, 1] - logits[:, 0]))
    weights["classifier.bias"][1] -= middle
    logits[:, 1] -= middle
    manifest["golden"]["logits"] = logits.tolist()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    reseal(model, golden=manifest["golden"])
    said = []
    receipt = compile_model(model, "onnxruntime", "int8", data, tmp_path / "engine", said.append)
    spared = [unit["component"] for unit in receipt["spared"]]
    assert set(spared) == {"attention-output"}
    assert any("sparing attention-output of layer" in line for line in said)
    assert receipt["products"]["linear_shares"]["int8"] > 0.5

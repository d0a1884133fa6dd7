"""A quantized folder: what was measured stands in it, it predicts as it did, and engines compute with its ranges."""

import json
import shutil
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bertforge.data.loader import spread
from bertforge.data.prepared import PreparedData
from bertforge.engines.registry import TARGETS
from bertforge.errors import ArtifactError, DataError, UsageError
from bertforge.evaluation.logits import predict_logits
from bertforge.inference.predictor import Predictor, plain_model
from bertforge.jobs.compile import compile_model
from bertforge.jobs.quantize import QuantizeOptions, quantize_model
from bertforge.manifest import read_manifest, weights_of
from bertforge.scales import Scales
from bertforge.training.finetune import finetune
from bertforge.training.qat import tune
from tests.runs import made_up, prepare_frame, quick_recipe, reseal, run_command

TEXTS = ["How do I sort a list?", "Which laptop is best?", "a " * 60]
QUICK = {"rows": 16, "validation_rows": 16}


def silent(what):
    """Takes what a job says of its stages."""


@pytest.fixture(scope="module")
def hasty(data, base, tmp_path_factory):
    """A run whose steps were too large, so that fine-tuning has something to mend."""
    folder = tmp_path_factory.mktemp("hasty") / "run"
    finetune(data, folder, quick_recipe(base, "full", epochs=1, lr=0.1))
    return folder


@pytest.fixture(scope="module")
def folders(runs, hasty, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized")
    options = {
        "plain": QuantizeOptions(calibration="max", **QUICK),
        "all": QuantizeOptions(preset="attention", smooth=0.5, **QUICK),
        "fp8": QuantizeOptions("fp8", calibration="percentile", max_drop=0.5, **QUICK),
    }
    for name, chosen in options.items():
        quantize_model(runs["full"], data, out / name, chosen, None, silent)
    with patch("bertforge.training.qat.LR", 1e-3):
        quantize_model(hasty, data, out / "tuned", options["plain"], tune, silent)
    return out


@pytest.mark.parametrize("name", ["plain", "all", "fp8"])
def test_a_quantized_folder_predicts_close_to_its_model(folders, runs, name):
    found = Predictor.load(folders / name).logits(TEXTS)
    difference = np.abs(found - Predictor.load(runs["full"], "fp32").logits(TEXTS)).max()
    assert 1e-6 < difference < 0.3


def test_fine_tuning_moves_every_kind_of_weight_and_nothing_else_does(folders, runs, hasty):
    before, plain, untuned, tuned = (
        load_file(folder / "model.safetensors")
        for folder in (runs["full"], folders / "plain", hasty, folders / "tuned")
    )
    assert before.keys() == plain.keys() == tuned.keys()
    assert all(np.array_equal(before[name], plain[name]) for name in before)
    moved = {name for name in untuned if not np.array_equal(untuned[name], tuned[name])}
    assert {"classifier.weight", "bert.encoder.layer.0.output.dense.weight"} <= moved
    assert not (folders / "tuned" / "tuning").exists()
    digests = [weights_of(read_manifest(path, "run", "quantized")) for path in (runs["full"], folders / "plain")]
    assert digests[0] == digests[1], "so an engine of the one may be rechecked by the other"
    assert weights_of(read_manifest(folders / "tuned", "quantized")) != weights_of(read_manifest(hasty, "run"))


def test_what_was_measured_stands_in_the_manifest(folders):
    found = read_manifest(folders / "all", "quantized")["quantization"]
    assert len(found["calibrations"]) == 7
    best = min(found["calibrations"], key=lambda name: found["calibrations"][name]["divergence"])
    assert found["chosen_calibration"] == best
    names = [row["name"] for row in found["sensitivity"]]
    assert names == ["layer 0", "layer 1", "qkv", "attention-output", "ffn-up", "ffn-down", "attention-products"]
    assert all(row["alone"]["divergence"] > 0 for row in found["sensitivity"])
    assert found["quantized_share_of_work"] == pytest.approx(1.0)
    layers, components = (
        sum(row["work"] for row in part) for part in (found["sensitivity"][:2], found["sensitivity"][2:])
    )
    assert layers == pytest.approx(components) == pytest.approx(1.0)
    assert found["ptq"]["rows"] == 13, "of 17 validation rows four chose the calibration"
    assert "qat" not in found
    tuned = read_manifest(folders / "tuned", "quantized")["quantization"]["qat"]
    assert tuned["kept"]
    assert tuned["validation_loss"] < tuned["validation_loss_before"]


def test_ranges_are_those_of_train_rows(folders, runs, data):
    predictor, prepared = Predictor.load(runs["full"], "fp32"), PreparedData.open(data)
    model, point, seen = plain_model(predictor), "bert.encoder.layer.1.intermediate.dense", []
    model.get_submodule(point).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].abs().max()))

    def largest(part):
        seen.clear()
        rows = spread(prepared.rows("random", part), QUICK["rows"])
        predict_logits(model, predictor.examples(prepared, rows), rows, "fp32")
        return float(max(seen))

    found = Scales.load(folders / "plain").activations[point]
    assert found == pytest.approx(largest("train"), rel=1 / 2048)  # a bin of the histogram
    assert found != pytest.approx(largest("validation"), rel=1 / 2048)


def test_a_budget_that_all_of_it_meets_takes_nothing_back(folders):
    found = read_manifest(folders / "fp8", "quantized")["quantization"]
    assert len(found["frontier"]) == 1
    assert len(found["frontier"][0]["quantized"]) == 8


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_an_engine_computes_with_the_folders_ranges(tmp_path, folders, target):
    compile_model(folders / "plain", target, "int8", None, tmp_path / "engine")
    found, wanted = (Predictor.load(folder).logits(TEXTS) for folder in (tmp_path / "engine", folders / "plain"))
    np.testing.assert_allclose(found, wanted, atol=0.1)  # a value at the edge of two steps may round to either


def test_an_engine_of_other_ranges_is_not_kept(tmp_path, folders, monkeypatch):
    whole = TARGETS["onnxruntime"]

    def build(folder, order, hardware):
        wide = {point: 64 * amax for point, amax in order.scales.activations.items()}  # two bits are left
        return whole.build(folder, replace(order, scales=replace(order.scales, activations=wide)), hardware)

    monkeypatch.setitem(TARGETS, "onnxruntime", replace(whole, build=build))
    with pytest.raises(ArtifactError, match=r"does not compute what the model does: .*; nothing was written"):
        compile_model(folders / "plain", "onnxruntime", "int8", None, tmp_path / "engine")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_quantized_is_one_line_and_leaves_nothing(tmp_path, runs, folders, data):
    out = tmp_path / "out"
    with pytest.raises(ArtifactError, match="merge first: bertforge merge"):
        quantize_model(runs["lora"], data, out, QuantizeOptions(), None, silent)
    with pytest.raises(ArtifactError, match="is of kind 'quantized'"):
        quantize_model(folders / "plain", data, out, QuantizeOptions(), None, silent)
    with pytest.raises(UsageError, match="choose one of int8, fp8"):
        QuantizeOptions(precision="int4")
    with pytest.raises(UsageError, match="choose one of ffn, projections, attention"):
        QuantizeOptions(preset="everything")
    with pytest.raises(UsageError, match="lies between 0"):
        QuantizeOptions(smooth=2)
    with pytest.raises(UsageError, match="entropy calibration is defined for int8"):
        QuantizeOptions("fp8", calibration="entropy")
    with pytest.raises(UsageError, match="was quantized to fp8, not to int8"):
        compile_model(folders / "fp8", "openvino", "int8", None, out)
    assert not list(tmp_path.iterdir())


def test_calibration_rows_of_one_class_are_refused(tmp_path, runs, data):
    with pytest.raises(DataError, match="one class only"):
        quantize_model(runs["full"], data, tmp_path / "out", QuantizeOptions(rows=1), None, silent)
    assert not list(tmp_path.iterdir())


def worse(model, examples, train, validation, recipe, folder, say):
    """A fine-tuning that harms."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return {"validation_loss_before": 0.5, "validation_loss": 0.6}


def test_a_fine_tuning_that_does_not_help_leaves_no_trace(tmp_path, runs, folders, data):
    found = quantize_model(
        runs["full"], data, tmp_path / "out", QuantizeOptions(calibration="max", **QUICK), worse, silent
    )
    assert not found["qat"]["kept"]
    before, after = (load_file(folder / "model.safetensors") for folder in (folders / "plain", tmp_path / "out"))
    assert all(np.array_equal(before[name], after[name]) for name in before)
    np.testing.assert_array_equal(*(Predictor.load(f).logits(TEXTS) for f in (folders / "plain", tmp_path / "out")))


def better_but_too_far(model, examples, train, validation, recipe, folder, say):
    """A fine-tuning with a lower loss, after which every row has the rarer label."""
    with torch.no_grad():
        model.classifier.bias[np.bincount(examples.labels[validation]).argmin()] += 100
    return {"validation_loss_before": 0.5, "validation_loss": 0.4}


def test_a_fine_tuning_past_the_budget_is_not_kept(tmp_path, runs, data, monkeypatch):
    monkeypatch.setattr("bertforge.jobs.quantize.tuning", lambda validation: validation[:13])
    options = QuantizeOptions(calibration="max", max_drop=0.07, **QUICK)  # a row of 13
    found = quantize_model(runs["full"], data, tmp_path / "out", options, better_but_too_far, silent)
    assert found["qat"]["tuning_drop"] > 0.07
    assert not found["qat"]["kept"]


def test_a_model_with_columns_is_quantized_and_compiled(tmp_path, runs, data):
    quantize_model(runs["columns"], data, tmp_path / "q", QuantizeOptions(calibration="max", **QUICK), None, silent)
    compile_model(tmp_path / "q", "onnxruntime", "int8", data, tmp_path / "engine")
    engine, simulated, plain = (Predictor.load(f) for f in (tmp_path / "engine", tmp_path / "q", runs["columns"]))
    prepared = PreparedData.open(data)
    rows = prepared.rows("random", "validation")
    columns = prepared.columns(plain.transform.spec.columns).iloc[rows]
    found, wanted, exact = (each.logits(prepared.texts(rows), columns) for each in (engine, simulated, plain))
    np.testing.assert_allclose(found, wanted, atol=0.1)
    assert not np.array_equal(wanted, exact)


def test_data_the_model_was_not_trained_on_is_refused(tmp_path, runs, base):
    other = prepare_frame(made_up(160, seed=9), tmp_path / "other", base)
    with pytest.raises(DataError, match="was trained on other data"):
        quantize_model(runs["full"], other, tmp_path / "out", QuantizeOptions(**QUICK), None, silent)
    assert not (tmp_path / "out").exists()


def test_simulated_bits_have_one_precision(folders):
    with pytest.raises(UsageError, match="in float32, which alone is exact, not bf16"):
        Predictor.load(folders / "plain", "bf16")


def test_the_command_says_what_it_found(tmp_path, runs, data, capsys):
    arguments = ("--data", data, "--out", tmp_path / "q", "--rows", 16, "--validation-rows", 16, "--max-drop", 100)
    assert run_command("quantize", runs["full"], *arguments, "--qat", "--json", tmp_path / "found.json") == 0
    said = capsys.readouterr()
    for words in ("ways to calibrate", "sensitivity", "frontier", "as calibrated", "next: bertforge compile"):
        assert words in said.out
    assert "fine-tuning the quantized model" in said.err
    assert json.loads((tmp_path / "found.json").read_text())["max_drop"] == 1.0
    assert run_command("quantize", runs["lora"], *arguments) == 4
    assert "merge first" in capsys.readouterr().err


def test_changed_scales_are_noticed(tmp_path, folders):
    broken = tmp_path / "broken"
    shutil.copytree(folders / "plain", broken)
    manifest = json.loads((broken / "bertforge.json").read_text())
    assert manifest["kind"] == "quantized"
    shutil.copy(folders / "fp8" / "scales.safetensors", broken / "scales.safetensors")
    with pytest.raises(ArtifactError, match=r"scales\.safetensors is damaged.*bertforge quantize"):
        Predictor.load(broken)
    reseal(broken)
    with pytest.raises(ArtifactError, match="does not compute what it did"):
        Predictor.load(broken)
    (broken / "scales.safetensors").write_bytes(b"no scales")
    reseal(broken)
    with pytest.raises(ArtifactError, match="make the folder again: bertforge quantize"):
        Predictor.load(broken)

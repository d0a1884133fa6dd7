"""An engine proves itself before it is kept, and predicts like the model it was compiled from."""

import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest

from bertforge.benchmark.run import run_benchmark
from bertforge.data.prepare import PrepareOptions, prepare
from bertforge.data.prepared import PreparedData
from bertforge.data.tokens import Tokenizer
from bertforge.digests import digest_file, write_sealed
from bertforge.engines.registry import TARGETS
from bertforge.errors import ArtifactError, DataError, UsageError
from bertforge.inference.predict import predict_table
from bertforge.inference.predictor import Predictor
from bertforge.jobs import compile as compile_job
from bertforge.jobs.compile import compile_model, verify_engine
from bertforge.manifest import peek_manifest, read_manifest
from bertforge.model.points import Unit
from bertforge.proof.gate import PrecisionError
from bertforge.quantize import ranges
from bertforge.scales import Scales
from bertforge.training.finetune import finetune
from tests.runs import made_up, prepare_frame, quick_recipe, reseal, run_command

TEXTS = ["How do I sort a list?", "Which laptop is best?", "a " * 60]


@pytest.fixture(scope="module")
def engines(runs, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    pairs = [("onnxruntime", "fp32"), ("openvino", "bf16"), ("openvino", "int8")]
    for target, precision in pairs:
        compile_model(runs["full"], target, precision, data, folder / f"{target}-{precision}")
    return folder


@pytest.mark.parametrize(
    ("name", "tolerance"), [("onnxruntime-fp32", 1e-5), ("openvino-bf16", 5e-2), ("openvino-int8", 0.2)]
)
def test_an_engine_predicts_like_its_model(engines, runs, name, tolerance):
    model, engine = Predictor.load(runs["full"], "fp32"), Predictor.load(engines / name)
    np.testing.assert_allclose(engine.logits(TEXTS), model.logits(TEXTS), atol=tolerance)
    assert list(engine.predict(TEXTS).columns) == list(model.predict(TEXTS).columns)


@pytest.fixture(scope="module")
def with_gaps(tmp_path_factory, base):
    """A run on a table of which numbers and dates are missing here and there, and the table."""
    folder = tmp_path_factory.mktemp("gaps")
    frame = made_up(160)
    frame.loc[::5, "ReputationAtPostCreation"] = ""
    data = prepare_frame(frame, folder / "questions", base)
    finetune(data, folder / "run", quick_recipe(base, "columns", epochs=1, seed=2))
    return folder / "run", data


@pytest.mark.parametrize(
    ("target", "precision", "tolerance"),
    [
        ("onnxruntime", "fp32", 1e-5),
        ("onnxruntime", "int8", 0.2),
        ("openvino", "bf16", 5e-2),
        ("openvino", "int8", 0.2),
    ],
)
def test_a_model_with_columns_takes_the_raw_table(tmp_path, with_gaps, target, precision, tolerance):
    model, data = with_gaps
    receipt = compile_model(model, target, precision, data, tmp_path / "engine")
    assert receipt["golden_agreement"]["max_logit_difference"] < tolerance
    engine, reference = Predictor.load(tmp_path / "engine"), Predictor.load(model, "fp32")
    assert engine.transform.learnt["numeric"].indicators == ("reputation",)
    frame = made_up(40, seed=5)
    frame.loc[3:9, "ReputationAtPostCreation"] = ["", "many", "1e400", "-5", "1e6", "0", "7"]
    frame.loc[10, "Tag1"] = "never-seen"
    frame.to_csv(tmp_path / "t.csv", index=False)
    for predictor, name in ((engine, "engine"), (reference, "model")):
        assert predict_table(predictor, tmp_path / "t.csv", tmp_path / f"{name}.csv").rows == 40
    found, wanted = (pd.read_csv(tmp_path / f"{name}.csv")["p_closed"] for name in ("engine", "model"))
    np.testing.assert_allclose(found, wanted, atol=tolerance)
    assert wanted.std() > 1e-3


def test_the_receipt_says_what_was_shown(engines):
    receipt = read_manifest(engines / "openvino-int8", "engine")
    assert receipt["golden_agreement"]["rows"] == 16
    assert (
        receipt["validation_agreement"]["rows"] == receipt["accuracy_loss"]["rows"] == receipt["margin"]["rows"] == 13
    )
    assert receipt["validation_accuracy"] >= receipt["validation_accuracy_model"] - 0.003
    assert receipt["structure"]["largest_difference"] < receipt["structure"]["limit"]
    assert receipt["accuracy_loss"]["low"] <= receipt["accuracy_loss"]["value"] <= receipt["accuracy_loss"]["high"]
    assert receipt["padding_waste"] >= 0
    assert receipt["files"]["model.bin"] == digest_file(engines / "openvino-int8" / "model.bin")
    assert {"openvino"} <= receipt["versions"].keys()
    assert {"build_seconds", "bytes", "device", "parent", "weights"} <= receipt.keys()
    products = receipt["products"]
    assert products["label"] == "int8"
    assert products["linear_shares"]["int8"] > 0.8
    assert products["attention_shares"].keys() & {"int8"} == set()
    assert sum(products["shares"].values()) == pytest.approx(1)


def test_what_cannot_be_compiled_is_refused_and_nothing_written(tmp_path, runs, engines, data):
    out = tmp_path / "engine"
    with pytest.raises(ArtifactError, match="merge first: bertforge merge"):
        compile_model(runs["lora"], "onnxruntime", "fp32", None, out)
    with pytest.raises(UsageError, match="--data DIR"):
        compile_model(runs["full"], "openvino", "int8", None, out)
    with pytest.raises(UsageError, match="choose one of fp32, bf16, int8"):
        compile_model(runs["full"], "openvino", "fp4", None, out)
    with pytest.raises(UsageError, match="choose one of native, tensorrt, tensorrt-rtx, openvino, onnxr"):
        compile_model(runs["full"], "tpu", "fp32", None, out)
    with pytest.raises(ArtifactError, match="is of kind 'engine'"):
        compile_model(engines / "openvino-bf16", "openvino", "bf16", None, out)
    assert not list(tmp_path.iterdir())


class Wrong:
    """An engine whose logits are wrong: `change(logits, from_golden_rows)` is what comes out."""

    def __init__(self, engine, change):
        self.engine, self.change, self.golden = engine, change, 24  # which are run first, alone and together

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def logits(self, batch):
        found = self.engine.logits(batch)
        self.golden -= len(found)
        return self.change(found, self.golden >= 0)


def becomes_wrong(monkeypatch, change):
    """From here on every engine that `compile` opens is `Wrong`."""
    for name, target in list(TARGETS.items()):
        opened = partial(lambda target, *given: Wrong(target.open(*given), change), target)
        monkeypatch.setitem(TARGETS, name, replace(target, open=opened))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits, golden: logits * [1.05, 1], r"probabilities of 16 rows move by 0\.\d+ on average"),
        (lambda logits, golden: logits * np.nan, "gives no finite logits for 24 of 24 golden rows"),
        (lambda logits, golden: logits if golden else logits * np.nan, "no finite logits for 13 of 13 validation rows"),
        (lambda logits, golden: logits if golden else -logits, r"probabilities of 13 rows move by 0\.\d+ on average"),
    ],
    ids=["stretched", "NaN", "NaN on validation rows", "flipped on validation rows"],
)
def test_an_engine_that_computes_something_else_is_not_kept(tmp_path, runs, data, monkeypatch, change, message):
    becomes_wrong(monkeypatch, change)
    with pytest.raises(ArtifactError, match=f"the onnxruntime engine .*{message}.*; nothing was written"):
        compile_model(runs["full"], "onnxruntime", "fp32", data, tmp_path / "engine")
    assert not list(tmp_path.iterdir())


def test_a_difference_that_moves_no_probability_is_kept_and_told(tmp_path, runs, data, monkeypatch):
    becomes_wrong(monkeypatch, lambda logits, golden: logits + 1e-3)
    receipt = compile_model(runs["full"], "onnxruntime", "fp32", data, tmp_path / "engine")
    assert receipt["golden_agreement"]["max_logit_difference"] == pytest.approx(1e-3, rel=0.01)
    assert receipt["validation_accuracy"] == receipt["validation_accuracy_model"]


def test_an_engine_that_fails_its_second_proof_is_served_no_more(tmp_path, runs, engines, data, monkeypatch):
    engine = shutil.copytree(engines / "onnxruntime-fp32", tmp_path / "engine")
    assert verify_engine(runs["full"], engine, data)["verified"]
    Predictor.load(engine)
    with monkeypatch.context() as patch:
        becomes_wrong(patch, lambda logits, golden: logits * [1.05, 1])
        with pytest.raises(ArtifactError, match="move by"):
            verify_engine(runs["full"], engine, data)
    receipt = read_manifest(engine, "engine")
    assert receipt["verified"] is False
    assert receipt["not_verified"].endswith("in simulation"), "and not that nothing was written"
    with pytest.raises(ArtifactError, match=r"is not verified \(the onnxruntime engine in fp32: .* --verify"):
        Predictor.load(engine)
    assert "not_verified" not in verify_engine(runs["full"], engine, data)
    Predictor.load(engine)


def test_a_verification_that_cannot_begin_takes_nothing_back(tmp_path, runs, engines):
    engine = shutil.copytree(engines / "onnxruntime-fp32", tmp_path / "engine")
    (engine / "model.onnx").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"is damaged: it is not what was written; .*bertforge compile"):
        verify_engine(runs["full"], engine, None)
    assert peek_manifest(engine, "engine")["verified"]


def test_verify_from_the_command_line_names_its_engine(tmp_path, runs, engines, capsys):
    engine = shutil.copytree(engines / "onnxruntime-fp32", tmp_path / "engine")
    for given in ((), ("--target", "onnxruntime"), ("--precision", "fp32")):
        assert run_command("compile", runs["full"], *given, "--verify") == 2
        assert "name it with --out ENGINE, or with --target and --precision" in capsys.readouterr().err
    assert run_command("compile", runs["full"], "--out", engine, "--verify") == 0
    said = capsys.readouterr().out
    assert f"verified {engine}: " in said
    assert "linear layers run 100% in fp32" in said, "as its receipt says, whatever auto would choose"


def test_a_model_that_computes_something_else_than_it_did_is_not_compiled(tmp_path, runs):
    model = tmp_path / "model"
    shutil.copytree(runs["full"], model)
    manifest = json.loads((model / "bertforge.json").read_text())
    for row in manifest["golden"]["logits"]:
        row[0] += 2.5e-3
    reseal(model, golden=manifest["golden"])
    with pytest.raises(ArtifactError, match="does not compute what it did"):
        compile_model(model, "onnxruntime", "fp32", None, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("engine", "file", "keep"),
    [
        ("openvino-bf16", "model.xml", 4),
        ("openvino-bf16", "model.xml", -200),
        ("openvino-bf16", "model.bin", 1000),
        ("openvino-bf16", "model.bin", 0),
        ("onnxruntime-fp32", "model.onnx", 1000),
        ("onnxruntime-fp32", "model.onnx", 0),
    ],
)
def test_a_file_cut_short_is_one_line_and_nothing_is_written(tmp_path, engines, data, capsys, engine, file, keep):
    broken, table, out = tmp_path / "engine", data.with_suffix(".csv"), tmp_path / "p.csv"
    shutil.copytree(engines / engine, broken)
    (broken / file).write_bytes((broken / file).read_bytes()[:keep])
    assert run_command("predict", broken, table, "--out", out) == 4
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{file} is damaged: it is not what was written; make it again: " in said
    assert {path.name for path in tmp_path.iterdir()} == {"engine"}


def test_an_engine_has_one_precision(engines):
    with pytest.raises(UsageError, match="was compiled in bf16, not in fp32"):
        Predictor.load(engines / "openvino-bf16", "fp32")


def test_calibration_rows_of_one_class_are_refused(tmp_path, runs, data):
    one_class = tmp_path / "data"
    shutil.copytree(data, one_class)
    np.save(one_class / "labels.npy", np.zeros_like(np.load(data / "labels.npy")))
    reseal(one_class)
    with pytest.raises(DataError, match="the calibration rows hold one class only"):
        compile_model(runs["full"], "openvino", "int8", one_class, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_rows_that_the_model_may_have_learnt_from_prove_nothing(tmp_path, runs, data, base):
    other = tmp_path / "other"
    prepare(data.with_suffix(".csv"), other, Tokenizer.load(base), PrepareOptions(seed=7))
    with pytest.raises(DataError, match=r"or on another split of it, .* name the folder it was trained on with"):
        compile_model(runs["full"], "onnxruntime", "fp32", other, tmp_path / "engine")
    with pytest.raises(DataError, match="or on another split of it"):
        run_benchmark(runs["full"], other, "all", split="test", rows=32, repeats=1, say=lambda text: None)


def test_a_model_whose_head_was_never_trained_is_refused(tmp_path, runs, base):
    with pytest.raises(ArtifactError, match=r"holds no bertforge.json; it should be a folder made by"):
        compile_model(base, "onnxruntime", "fp32", None, tmp_path / "engine")
    model = tmp_path / "model"
    shutil.copytree(runs["full"], model)
    shutil.copy(base / "model.safetensors", model)  # an encoder without a head
    reseal(model)
    with pytest.raises(ArtifactError, match="holds no trained classifier; fine-tune it first: bertforge train"):
        compile_model(model, "onnxruntime", "fp32", None, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_a_long_text_is_cut_as_the_model_cuts_it(engines, runs):
    engine, longest = Predictor.load(engines / "openvino-bf16"), 48 - 2  # [CLS] and [SEP] stay
    logits = engine.logits(["a " * 3000, "a " * longest, "a " * (longest - 20)])
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-6)
    assert np.abs(logits[1] - logits[2]).max() > 1e-4


def test_compile_and_predict_from_the_command_line(tmp_path, runs, data, capsys):
    engine = tmp_path / "engine"
    assert run_command("compile", runs["full"], "--target", "openvino", "--data", data, "--out", engine) == 0
    said = capsys.readouterr().out
    assert "labels changed" in said
    assert "linear layers run 100% in " in said
    assert f"bertforge predict {engine}" in said
    table = data.with_suffix(".csv")
    assert run_command("predict", engine, table, "--out", tmp_path / "p.csv") == 0
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 161


def test_an_engine_with_other_bytes_than_were_proved_is_refused(tmp_path, engines):
    """As long as before, so that the library has nothing to complain of."""
    broken = tmp_path / "engine"
    shutil.copytree(engines / "openvino-bf16", broken)
    weights = bytearray((broken / "model.bin").read_bytes())
    weights[len(weights) // 2] ^= 0xFF
    (broken / "model.bin").write_bytes(weights)
    with pytest.raises(ArtifactError, match=r"is damaged: it is not what was written; .*bertforge compile"):
        Predictor.load(broken)


@pytest.fixture
def costs_too_much_at_first(monkeypatch):
    """The first proof of an engine finds its precision too costly."""
    real, calls = compile_job.prove, []

    def prove(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise PrecisionError("it costs too much")
        return real(*arguments)

    monkeypatch.setattr(compile_job, "prove", prove)
    return calls


def test_an_int8_engine_with_spared_parts_can_be_proved_again(tmp_path, runs, data, costs_too_much_at_first):
    engine, said = tmp_path / "engine", []
    receipt = compile_model(runs["full"], "openvino", "int8", data, engine, said.append)
    parts = [(unit["layer"], unit["component"]) for unit in receipt["spared"]]
    assert 1 <= len(parts) < 8
    assert all(unit["shift"] > 0 for unit in receipt["spared"])
    assert any("it costs too much; sparing" in line for line in said)
    left = Scales.load(engine).activations
    assert not left.keys() & {point for layer, component in parts for point in Unit(layer, component).points}
    assert receipt["products"]["linear_shares"]["int8"] < 1
    again = verify_engine(runs["full"], engine, None)
    assert again["verified"]
    assert again["structure"]["largest_difference"] < again["structure"]["limit"]
    assert "validation_accuracy" not in again, "it was shown of no row this time"
    assert verify_engine(runs["full"], engine, data)["validation_accuracy"] == receipt["validation_accuracy"]


def test_rows_that_calibrate_tune_and_prove_are_disjoint(tmp_path, runs, data, monkeypatch, costs_too_much_at_first):
    used = {}
    real_ranges, real_shifts = ranges.find_ranges, compile_job.shifts_alone

    def find_ranges(model, form, examples, calibration, tuned):
        used.update(calibrate=calibration, tune=tuned)
        return real_ranges(model, form, examples, calibration, tuned)

    def shifts_alone(model, precision, examples, rows, names):
        used["spare"] = rows
        return real_shifts(model, precision, examples, rows, names)

    monkeypatch.setattr(ranges, "find_ranges", find_ranges)
    monkeypatch.setattr(compile_job, "shifts_alone", shifts_alone)
    compile_model(runs["full"], "openvino", "int8", data, tmp_path / "engine")
    prepared = PreparedData.open(data)
    train, validation = (set(prepared.rows("random", part).tolist()) for part in ("train", "validation"))
    proved = set(costs_too_much_at_first[0][3].rows.tolist())
    tuned = set(used["tune"].tolist())
    assert set(used["calibrate"].tolist()) <= train
    assert tuned | proved == validation
    assert not tuned & proved
    assert set(used["spare"].tolist()) == tuned


def test_an_engine_is_not_proved_again_when_a_file_of_it_has_changed(tmp_path, runs, engines):
    engine = shutil.copytree(engines / "openvino-bf16", tmp_path / "engine")
    weights = bytearray((engine / "model.bin").read_bytes())
    weights[len(weights) // 2] ^= 0xFF
    (engine / "model.bin").write_bytes(weights)
    with pytest.raises(ArtifactError, match=r"is damaged: it is not what was written; .*bertforge compile"):
        verify_engine(runs["full"], engine, None)


def test_an_engine_of_an_earlier_gate_is_compiled_again(tmp_path, runs, engines):
    engine = shutil.copytree(engines / "openvino-bf16", tmp_path / "engine")
    manifest = json.loads((engine / "bertforge.json").read_text())
    del manifest["spared"]
    write_sealed(engine / "bertforge.json", {name: manifest[name] for name in manifest if name != "digest"})
    for use in (Predictor.load, lambda folder: verify_engine(runs["full"], folder, None)):
        with pytest.raises(ArtifactError, match=r"it lacks 'spared'.*bertforge compile"):
            use(engine)

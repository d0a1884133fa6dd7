"""Prepared rows and the raw rows they came from score alike, and runs are compared on the same rows only."""

import json
from dataclasses import replace
from html import unescape

import numpy as np
import pandas as pd
import pytest
import torch

from bertforge.data.prepare import PrepareOptions, prepare
from bertforge.data.prepared import PreparedData
from bertforge.data.tokens import Tokenizer
from bertforge.errors import DataError, UsageError
from bertforge.evaluation.baselines import COLUMNS, MAJORITY, TEXT
from bertforge.evaluation.metrics import classification_metrics
from bertforge.inference import scoring
from bertforge.inference.evaluate import evaluate_run
from bertforge.inference.predictor import Predictor
from bertforge.inference.scoring import score
from bertforge.jobs.compile import compile_model
from bertforge.jobs.quantize import QuantizeOptions, quantize_model
from bertforge.training.finetune import finetune
from tests.runs import KINDS, made_up, prepare_frame, quick_recipe


@pytest.fixture(scope="module")
def raw_test_rows(tmp_path_factory, data):
    """The source's rows of the test part, as a table of their own."""
    rows = PreparedData.open(data).rows("random", "test")
    path = tmp_path_factory.mktemp("raw") / "test.csv"
    made_up(160).iloc[rows].to_csv(path, index=False)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_and_raw_rows_score_alike(data, runs, raw_test_rows, kind):
    predictor = Predictor.load(runs[kind], "fp32")
    prepared, raw = score(predictor, data, "test"), score(predictor, raw_test_rows)
    np.testing.assert_allclose(prepared.logits, raw.logits, atol=1e-5)
    assert prepared.labels.tolist() == raw.labels.tolist()
    assert prepared.lengths.tolist() == raw.lengths.tolist()
    assert prepared.texts == raw.texts
    assert prepared.dates.tolist() == raw.dates.tolist()
    assert (prepared.made_up, raw.made_up) == (True, True)
    assert len(set(prepared.labels.tolist())) == 2
    assert not np.allclose(score(predictor, data, "validation").logits[:5], prepared.logits[:5], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_validation_loss_of_training_is_found_again(data, runs, kind):
    found = evaluate_run(runs[kind], data, "validation")
    metrics = json.loads((runs[kind] / "bertforge.json").read_text())["metrics"]
    # `evaluate` chooses its own precision, and training used float32. The temperature lowers the loss further.
    raw = classification_metrics(found.scored.logits * found.temperature, found.scored.labels, "ab", bootstrap=1)
    assert raw.loss.value == pytest.approx(metrics["validation_loss"], abs=2e-3)
    assert raw.calibration_error.value == pytest.approx(found.raw_calibration_error.value, abs=1e-9)
    assert found.metrics.loss.value <= raw.loss.value
    exact = score(Predictor.load(runs[kind], "fp32"), data, "validation")
    surprise = np.log(np.exp(exact.logits).sum(1)) - exact.logits[np.arange(len(exact.labels)), exact.labels]
    assert surprise.mean() == pytest.approx(metrics["validation_loss"], rel=1e-5)


def test_the_test_part_is_scored_where_none_is_named(data, runs):
    prepared = PreparedData.open(data)
    expected = {part: prepared.lines[prepared.rows("random", part)].tolist() for part in ("train", "test")}
    assert score(Predictor.load(runs["full"]), data).lines.tolist() == expected["test"] != expected["train"]
    found = evaluate_run(runs["full"], data)
    assert found.scored.lines.tolist() == expected["test"]
    assert found.standing.part == "test"


def test_rows_without_text_or_label_are_left_out_and_counted(tmp_path, runs):
    frame = made_up(12, seed=4)
    frame.loc[1, "OpenStatus"] = "?"
    frame.loc[2, ["Title", "BodyMarkdown"]] = ""
    frame.to_csv(tmp_path / "t.csv", index=False)
    found = score(Predictor.load(runs["full"]), tmp_path / "t.csv")
    assert found.left_out == 2
    assert len(found.labels) == len(found.texts) == len(found.logits) == 10
    frame.assign(OpenStatus="?").to_csv(tmp_path / "none.csv", index=False)
    said = r"holds no row with a text and a known OpenStatus; known: open, closed; unknown: '\?'$"
    with pytest.raises(DataError, match=said):
        score(Predictor.load(runs["full"]), tmp_path / "none.csv")
    frame.iloc[:0].to_csv(tmp_path / "header.csv", index=False)
    with pytest.raises(DataError, match=r"holds no row with a text and a known OpenStatus; known: open, closed$"):
        score(Predictor.load(runs["full"]), tmp_path / "header.csv")


def test_an_empty_chunk_at_the_end_is_no_row(runs, raw_test_rows, monkeypatch):
    read_raw = scoring.read_raw

    def with_empty_end(*arguments, **options):
        *chunks, last = read_raw(*arguments, **options)
        none = slice(0, 0)
        rows = {name: value[none] for name, value in vars(last).items() if name != "done"}
        yield from [*chunks, last, replace(last, **rows)]

    predictor = Predictor.load(runs["columns"], "fp32")
    whole = score(predictor, raw_test_rows)
    monkeypatch.setattr(scoring, "read_raw", with_empty_end)
    assert np.array_equal(score(predictor, raw_test_rows).logits, whole.logits)


def test_rows_the_run_may_have_learnt_from_are_called_so(tmp_path, data, base, runs, raw_test_rows):
    predictor, warning = Predictor.load(runs["full"]), "rows which the run may have been trained on"
    assert warning not in score(predictor, data).source
    assert warning in score(predictor, raw_test_rows).source
    other = prepare_frame(made_up(160, seed=2), tmp_path / "other", base)
    assert warning in score(predictor, other).source
    assert warning in evaluate_run(runs["full"], other).write_report(tmp_path / "r.html").read_text()


def test_another_split_of_the_same_table_is_refused(tmp_path, data, base, runs):
    """Its test rows are rows that the model was trained on."""
    options = PrepareOptions(seed=7)
    prepare(data.with_suffix(".csv"), tmp_path / "other", Tokenizer.load(base), options)
    with pytest.raises(DataError, match=r"or on another split of it, .* name the folder it was trained on with --data"):
        score(Predictor.load(runs["full"]), tmp_path / "other")


def test_a_part_of_a_raw_table_is_refused(runs, raw_test_rows):
    with pytest.raises(UsageError, match=r"test\.csv is a raw table and scored whole; leave --split test out"):
        score(Predictor.load(runs["full"]), raw_test_rows, "test")


def test_a_made_up_table_is_called_so_whatever_the_model_was_trained_on(tmp_path, runs):
    frame = made_up(6, seed=4)
    frame.to_csv(tmp_path / "made_up.csv", index=False)
    frame.assign(PostId=[str(number) for number in range(6)]).to_csv(tmp_path / "real.csv", index=False)
    predictor = Predictor.load(runs["full"])
    told = replace(predictor.codec, manifest=predictor.manifest | {"data": {"made_up": False}})
    real = replace(predictor, codec=told)
    assert score(real, tmp_path / "made_up.csv").made_up
    assert not score(real, tmp_path / "real.csv").made_up
    assert score(predictor, tmp_path / "real.csv").made_up, "so is what a made-up table taught"
    table = replace(real, codec=replace(told, schema=replace(real.schema, kind="table")))
    assert not table.made_up(frame), "another table's PostId means something else"


def test_two_runs_are_compared_row_by_row(data, runs):
    found = evaluate_run(runs["full"], data, "test", against=runs["lora"])
    comparison = found.to_dict()["comparison"]
    assert (comparison["first"], comparison["second"]) == (str(runs["lora"]), str(runs["full"]))
    own = {kind: evaluate_run(runs[kind], data, "test").metrics for kind in ("full", "lora")}
    assert comparison["second_accuracy"] == own["full"].accuracy.value
    difference = own["full"].loss.value - own["lora"].loss.value
    assert comparison["loss_difference"]["value"] == pytest.approx(difference, abs=1e-3)
    assert comparison["verdict"]
    same = evaluate_run(runs["full"], data, "test", against=runs["full"]).comparison
    assert (same.changed_labels, same.accuracy_difference.value, same.loss_difference.value) == (0, 0, 0)
    assert evaluate_run(runs["full"], data).comparison is None


@pytest.fixture(scope="module")
def full(tmp_path_factory, data, runs):
    """One model three times: as it was trained, in simulated 8 bits, and as an INT8 engine."""
    folder = tmp_path_factory.mktemp("full")
    options = QuantizeOptions(calibration="max", rows=16, validation_rows=16)
    quantize_model(runs["full"], data, folder / "quantized", options, None, lambda stage: None)
    compile_model(runs["full"], "onnxruntime", "int8", data, folder / "engine")
    return {"model": runs["full"], "quantized": folder / "quantized", "engine": folder / "engine"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="ONNX Runtime's INT8 is a CPU's")
@pytest.mark.parametrize(
    ("first", "second"),
    [("engine", "model"), ("model", "engine"), ("quantized", "model"), ("model", "quantized"), ("engine", "quantized")],
)
def test_each_is_compared_in_the_precision_it_has(data, full, first, second):
    """And a model, which has none of its own, in float32 beside what has one."""

    def loss(name, precision):
        predictor = Predictor.load(full[name], precision)
        scored = score(predictor, data, "test")
        logits = scored.logits / predictor.temperature
        return classification_metrics(logits, scored.labels, "ab", bootstrap=1).loss.value

    found = evaluate_run(full[first], data, "test", against=full[second])
    assert found.precision == {"engine": "int8", "quantized": "fp32"}.get(first, found.precision)
    beside = loss(second, "fp32" if second == "model" else "auto")
    assert found.comparison.loss_difference.value == pytest.approx(loss(first, found.precision) - beside, abs=1e-6)
    assert found.comparison.loss_difference.value != 0


@pytest.mark.parametrize("kind", ["full", "columns"])
def test_the_baselines_of_the_runs_own_data_stand_beside_it(tmp_path, data, base, runs, raw_test_rows, kind):
    found = evaluate_run(runs[kind], data, "test")
    names = [rival.name for rival in found.standing.rivals]
    assert names == [MAJORITY, TEXT, COLUMNS][: 3 if kind == "columns" else 2]
    assert (found.standing.part, found.standing.accuracy) == ("test", found.metrics.accuracy.value)
    assert found.to_dict()["baselines"]["macro_f1"] == found.metrics.macro_f1.value
    assert found.standing.verdict[1:] in unescape(found.write_report(tmp_path / "r.html").read_text())
    manifest = json.loads((runs[kind] / "bertforge.json").read_text())
    kept = evaluate_run(runs[kind], data, "validation").standing.to_dict()
    assert [rival["accuracy"] for rival in manifest["baselines"]["rivals"]] == [r["accuracy"] for r in kept["rivals"]]
    other = prepare_frame(made_up(160, seed=2), tmp_path / "other", base)
    for source, part in ((data, "train"), (raw_test_rows, None), (other, "test")):
        assert evaluate_run(runs[kind], source, part).standing is None


def test_runs_of_different_splits_are_not_compared(tmp_path, data, base, runs):
    finetune(data, tmp_path / "by_time", quick_recipe(base, epochs=1, split="time"))
    with pytest.raises(DataError, match=r"cannot be compared: .* test part of the random split .* of the time split"):
        evaluate_run(runs["full"], data, "test", against=tmp_path / "by_time")


def test_labels_the_model_does_not_know_are_refused(tmp_path, base, runs):
    frame = pd.DataFrame({"text": [f"text {number}" for number in range(60)], "label": ["ham", "spam"] * 30})
    options = PrepareOptions(text_columns=("text",), label_column="label")
    mails = prepare_frame(frame, tmp_path / "mails", base, options)
    with pytest.raises(DataError, match="the data is labelled ham, spam, but the model knows open, closed"):
        evaluate_run(runs["full"], mails)


def test_a_report_is_written_with_the_runs_curves(tmp_path, data, runs):
    found = evaluate_run(runs["columns"], data, "test", against=runs["full"])
    html = found.write_report(tmp_path / "report.html").read_text()
    assert found.calibration[1:] in html
    for said in ("columns on", "Made-up data.", found.scored.fingerprint, "the test part of the random split"):
        assert said in html, said
    assert found.comparison.verdict in html


def test_a_run_reads_the_split_it_was_told_and_records_the_one_it_took(tmp_path, base):
    frame = pd.DataFrame({"text": [f"text {i}" for i in range(60)], "label": ["a", "b"] * 30})
    options = PrepareOptions(text_columns=("text",), label_column="label", folds=3)
    data = prepare_frame(frame, tmp_path / "data", base, options)
    prepared = PreparedData.open(data)
    first = finetune(data, tmp_path / "first", quick_recipe(base, epochs=1))
    assert first["recipe"]["split"] == "random"
    finetune(data, tmp_path / "fold", quick_recipe(base, epochs=1, split="fold-2"))
    evaluation = evaluate_run(tmp_path / "fold", data)
    assert evaluation.scored.lines.tolist() == prepared.lines[prepared.rows("fold-2", "test")].tolist()
    assert "the test part of the fold-2 split" in evaluation.scored.source

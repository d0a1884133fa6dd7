"""Close rows are answered by the second engine, all others by the first, and nobody but its own model may be asked."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bertforge.data.prepared import PreparedData
from bertforge.errors import ArtifactError, UsageError
from bertforge.inference.cascade import Recheck
from bertforge.inference.evaluate import evaluate_run
from bertforge.inference.predict import predict_table
from bertforge.inference.predictor import Predictor
from bertforge.jobs.compile import compile_model
from bertforge.manifest import read_manifest, weights_of
from bertforge.proof.margin import gaps
from tests.runs import made_up, reseal, run_command


@pytest.fixture(scope="module")
def engines(tmp_path_factory, runs, data):
    """An engine in 8 bits, whose margin is widened to hold half of the rows, and one in 32."""
    folder = tmp_path_factory.mktemp("engines")
    for precision in ("int8", "fp32"):
        compile_model(runs["full"], "onnxruntime", precision, data, folder / precision)
    texts = PreparedData.open(data).texts(np.arange(100))
    half = float(np.median(gaps(Predictor.load(folder / "int8").logits(texts))))
    margin = read_manifest(folder / "int8", "engine")["margin"]
    reseal(folder / "int8", margin={**margin, "value": half})
    return folder


def test_close_rows_are_the_seconds_and_others_the_firsts(engines, runs, data):
    texts = PreparedData.open(data).texts(np.arange(100))
    first, second = Predictor.load(engines / "int8").logits(texts), Predictor.load(engines / "fp32").logits(texts)
    both = Predictor.load(engines / "int8", recheck=engines / "fp32")
    found = both.logits(texts)
    close = gaps(first) <= both.recheck.margin
    assert close.sum() == 50
    assert np.array_equal(found[~close], first[~close])
    np.testing.assert_allclose(found[close], second[close], atol=1e-5)
    assert np.abs(first - second)[close].max(1).min() > 1e-5, "they can be told apart"
    assert (both.recheck.rows, both.recheck.asked) == (100, 50)
    assert str(both.recheck) == "asked 50.0% of the rows again in fp32"
    closest = int(gaps(first).argmin())
    np.testing.assert_allclose(both.logits([texts[closest]])[0], second[closest], atol=1e-5)
    assert (both.recheck.rows, both.recheck.asked) == (101, 51)
    by_model = Predictor.load(engines / "int8", recheck=runs["full"])
    np.testing.assert_allclose(by_model.logits(texts), found, atol=1e-5)
    assert by_model.recheck.engine.precision == "fp32", "whatever the machine is fastest in"


def test_rows_tokenized_in_parts_are_asked_again_too(engines, data, monkeypatch):
    texts = PreparedData.open(data).texts(np.arange(100))
    both = Predictor.load(engines / "int8", recheck=engines / "fp32")
    monkeypatch.setattr("bertforge.inference.predictor._FIRST_ROWS", 40)
    monkeypatch.setattr("bertforge.inference.predictor._MOST_ROWS", 60)
    found, second = both.logits(texts), Predictor.load(engines / "fp32").logits(texts)
    assert both.recheck.rows == 100
    same = np.isclose(found, second, atol=1e-5).all(axis=1)
    assert 10 < both.recheck.asked <= same.sum() < 90


def test_a_logit_that_is_no_number_is_asked_again(engines, data):
    prepared, second = PreparedData.open(data), Predictor.load(engines / "fp32")
    rows = np.arange(20)
    examples = second.examples(prepared, rows)
    recheck = Recheck(second.engine, margin=-1.0)
    logits = np.zeros((20, 2), np.float32)
    logits[7, 0] = np.nan
    found = recheck.settle(logits.copy(), examples, rows)
    np.testing.assert_allclose(found[7], second.example_logits(examples, rows)[7], atol=1e-5)
    assert np.array_equal(np.delete(found, 7, 0), np.delete(logits, 7, 0)), "nothing else is within this margin"
    assert recheck.asked == 1


def test_predict_and_evaluate_say_how_many_were_asked_again(engines, runs, data, tmp_path, capsys):
    table, out = tmp_path / "questions.csv", tmp_path / "predictions.csv"
    made_up(30, seed=3).to_csv(table, index=False)
    arguments = ("predict", engines / "int8", table, "--out", out)
    assert run_command(*arguments) == 0
    alone = pd.read_csv(out)
    assert "again" not in capsys.readouterr().out
    assert run_command(*arguments, "--recheck", engines / "fp32") == 0
    predictor = Predictor.load(engines / "int8", recheck=engines / "fp32")
    predict_table(predictor, table, tmp_path / "other.csv")
    assert 0 < predictor.recheck.asked < 30
    assert f"{predictor.recheck}\nwrote {out}: 30 rows" in capsys.readouterr().out
    rechecked = pd.read_csv(out)
    assert (alone["p_open"] != rechecked["p_open"]).sum() == predictor.recheck.asked
    metrics = tmp_path / "metrics.json"
    assert run_command(
        "evaluate", engines / "int8", "--data", data, "--recheck", engines / "fp32", "--json", metrics
    ) == 0  # fmt: skip
    again = json.loads(metrics.read_text())["recheck"]
    assert again["rows"] == len(PreparedData.open(data).rows("random", "test"))
    assert again["precision"] == "fp32"
    assert f"asked {again['asked'] / again['rows']:.1%} of the rows again in fp32" in capsys.readouterr().out
    assert evaluate_run(engines / "int8", data).to_dict()["recheck"] is None


def test_who_may_not_be_asked_again_is_told_in_one_line(engines, runs, tmp_path):
    for first in (runs["full"], engines / "fp32"):
        with pytest.raises(UsageError, match=r"does not answer in 8 bits: .* leave recheck out"):
            Predictor.load(first, recheck=engines / "fp32")
    with pytest.raises(UsageError, match="int8 answers in 8 bits itself; recheck by its model"):
        Predictor.load(engines / "int8", recheck=engines / "int8")
    with pytest.raises(ArtifactError, match=r"columns does not hold the weights that .*int8 was compiled from"):
        Predictor.load(engines / "int8", recheck=runs["columns"])
    with pytest.raises(ArtifactError, match="lora does not hold the weights"):
        Predictor.load(engines / "int8", recheck=runs["lora"])
    older = shutil.copytree(engines / "int8", tmp_path / "older")
    reseal(older, margin=None)
    with pytest.raises(ArtifactError, match=r"older has no margin.* --target onnxruntime .*--data DATA --verify"):
        Predictor.load(older, recheck=runs["full"])


def test_an_engine_of_a_copied_model_is_of_the_same_weights(engines, runs, tmp_path):
    copied = shutil.copytree(runs["full"], tmp_path / "copied")
    assert weights_of(read_manifest(copied, "run")) == read_manifest(Path(engines / "int8"), "engine")["weights"]
    assert weights_of(read_manifest(runs["lora"], "run")) is None

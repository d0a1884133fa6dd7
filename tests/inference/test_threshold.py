"""Thresholds chosen on validation rows stand in the folder, and whatever is made of it or asks it goes by them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from bertforge.artifact import hash_file
from bertforge.data.prepare import PrepareOptions, prepare
from bertforge.data.prepared import PreparedData
from bertforge.data.tokens import Tokenizer
from bertforge.errors import DataError, UsageError
from bertforge.evaluation.decisions import Policy
from bertforge.evaluation.prior import corrected
from bertforge.inference import threshold
from bertforge.inference.evaluate import evaluate_run
from bertforge.inference.predict import predict_table
from bertforge.inference.predictor import Predictor
from bertforge.inference.scoring import score
from bertforge.inference.threshold import Wanted, choose_thresholds
from bertforge.jobs.compile import compile_model, verify_engine
from bertforge.jobs.merge import merge_run
from bertforge.manifest import DECISION, MANIFEST, check_folder, identity, read_manifest, write_manifest
from tests.runs import reseal, run_command

TEXTS = ["How do I sort a list?", "Which laptop should I buy?", "", "Why is the sky blue at noon?"]
LOW = Wanted(precision={"closed": 0.2})  # what a model that learnt little, and 16 rows, can show


@pytest.fixture
def run(tmp_path, runs):
    return shutil.copytree(runs["lora"], tmp_path / "run")


def kept(folder):
    return json.loads((folder / MANIFEST).read_text()).get(DECISION)


def test_a_folder_with_thresholds_gives_decisions_and_the_same_probabilities(tmp_path, run, data):
    before = Predictor.load(run, "fp32").predict(TEXTS)
    assert list(before.columns) == ["label", "probability", "p_open", "p_closed"]
    chosen = choose_thresholds(run, data, LOW)
    assert chosen.folder == run
    assert check_folder(run) == ("run", [])
    assert kept(run) == json.loads(json.dumps(chosen.kept))
    predictor = Predictor.load(run, "fp32")
    found = predictor.predict(TEXTS)
    pd.testing.assert_frame_equal(found.drop(columns="decision"), before)
    closed = found["p_closed"] >= chosen.policy.thresholds[1]
    assert found["decision"][[0, 1, 3]].tolist() == ["closed" if said else "open" for said in closed[[0, 1, 3]]]
    assert found["decision"].isna().tolist() == found["label"].isna().tolist() == [False, False, True, False]
    assert list(predictor.predict_proba(TEXTS).columns) == ["open", "closed"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_table_of_predictions_says_who_goes_to_a_person(tmp_path, run, data, suffix):
    choose_thresholds(run, data, Wanted(costs={"open": 1.0}, person=1e-3))
    predictor, out = Predictor.load(run, "fp32"), tmp_path / f"p{suffix}"
    done = predict_table(predictor, data.with_suffix(".csv"), out)
    read = {".csv": pd.read_csv, ".jsonl": lambda path: pd.read_json(path, lines=True), ".parquet": pd.read_parquet}
    found = read[suffix](out)
    assert list(found.columns[-2:]) == ["decision", "problem"]
    assert (found["decision"] == "abstain").sum() == done.abstained > 0


def test_the_validation_rows_choose_and_no_others(run, data, monkeypatch):
    asked = []

    def watched(predictor, folder, part):
        asked.append(part)
        return score(predictor, folder, part)

    score = threshold.score
    monkeypatch.setattr(threshold, "score", watched)
    chosen = choose_thresholds(run, data, LOW)
    assert asked == ["validation"]
    assert "the validation part of the random split" in chosen.source
    assert chosen.outcome.rows == len(PreparedData.open(data).rows("random", "validation"))


def test_thresholds_go_along_and_an_engine_made_before_is_still_this_models(tmp_path, run, data):
    parent = hash_file(run / MANIFEST)
    assert identity(run) == parent
    choose_thresholds(run, data, LOW)
    assert identity(run) == parent != hash_file(run / MANIFEST)
    model, engine = tmp_path / "model", tmp_path / "engine"
    merge_run(run, model)
    assert read_manifest(model, "model")["parent"] == parent
    compile_model(model, "onnxruntime", "fp32", None, engine)
    for folder in (model, engine):
        manifest, of = read_manifest(folder, "model", "engine"), read_manifest(run, "run")
        for name in (DECISION, "reference", "label_shares", "temperature"):
            assert manifest[name] == of[name] != {}, (folder, name)
    choose_thresholds(model, data, Wanted(precision={"": 0.2}))
    assert kept(model) != kept(engine)
    assert verify_engine(model, engine, None)["verified"]
    assert kept(engine) == kept(run), "verifying forgets nothing"
    choose_thresholds(engine, data, Wanted(precision={"": 0.25}))
    assert kept(engine)["precision"] == 0.25


def test_of_a_fit_the_folder_that_it_serves_keeps_them(tmp_path, runs, data):
    shutil.copytree(runs["full"], tmp_path / "fit" / "run")
    write_manifest(tmp_path / "fit", "fit", serves="run")
    assert choose_thresholds(tmp_path / "fit", data, LOW).folder == tmp_path / "fit" / "run"
    assert "decision" in Predictor.load(tmp_path / "fit").predict(TEXTS)
    assert read_manifest(tmp_path / "fit", "fit")


def test_thresholds_for_other_shares_bring_these_shares_along(run, data):
    plain = Predictor.load(run, "fp32").predict_proba(TEXTS)
    prior = {"closed": 0.2}
    at_new_shares = Predictor.load(run, "fp32", prior=prior).predict_proba(TEXTS)
    trained = read_manifest(run, "run")["label_shares"]
    expected = corrected(plain, trained, (0.8, 0.2))
    np.testing.assert_allclose(at_new_shares, expected, rtol=1e-5)
    assert not np.allclose(plain.dropna(), at_new_shares.dropna(), atol=0.05)
    chosen = choose_thresholds(run, data, replace(LOW, precision={"": 0.2}, prior=prior))
    assert "for shares of open=0.8, closed=0.2" in chosen.source
    for same in (None, prior, {"open": 0.8}):
        pd.testing.assert_frame_equal(Predictor.load(run, "fp32", prior=same).predict_proba(TEXTS), at_new_shares)
    with pytest.raises(
        UsageError, match=r"other shares .*, open=0\.8, closed=0\.2, than open=0\.9, closed=0\.1; choose"
    ):
        Predictor.load(run, prior={"closed": 0.1})
    dropped, *_ = choose_thresholds(run, data, LOW).doubts
    assert "were for shares of open=0.8, closed=0.2; these are for those of training" in dropped
    assert dropped.endswith("--prior closed=0.2")
    pd.testing.assert_frame_equal(Predictor.load(run, "fp32").predict_proba(TEXTS), plain)
    with pytest.raises(UsageError, match=r"those of training, than open=0\.8, closed=0\.2; choose them anew"):
        Predictor.load(run, prior=prior)


def test_evaluate_at_other_shares_reads_rows_that_have_them(tmp_path, run, data):
    plain = evaluate_run(run, data)
    found = evaluate_run(run, data, prior={"closed": 0.25})
    assert found.prior == pytest.approx({"open": 0.75, "closed": 0.25})
    assert (found.scored.labels == 1).mean() == pytest.approx(0.25, abs=0.1)
    assert (plain.scored.labels == 1).mean() > 0.4, "or nothing is shown"
    assert set(found.scored.lines) < set(plain.scored.lines)
    assert found.standing is None
    assert plain.standing is not None
    assert "for shares of open=0.75, closed=0.25" in found.write_report(tmp_path / "r.html").read_text()
    assert evaluate_run(run, data, prior={"closed": 0.25}, against=run).comparison.changed_labels == 0


def test_evaluate_shows_what_decisions_do_and_calibration_before_and_after(tmp_path, run, data, runs):
    assert evaluate_run(runs["lora"], data).decisions is None
    choose_thresholds(run, data, LOW)
    found = evaluate_run(run, data)
    assert found.decisions.rows == len(found.scored.labels)
    assert found.to_dict()["decisions"]["answers"][1]["label"] == "closed"
    raw = found.raw_calibration_error
    assert raw.low <= raw.value <= raw.high
    assert f"{raw.value:.2%} ({raw.low:.2%} to {raw.high:.2%}) without it" in found.calibration
    html = found.write_report(tmp_path / "r.html").read_text()
    assert "without the temperature" in html
    assert "100.0% (" in html
    np.testing.assert_allclose(found.raw_logits, found.scored.logits * found.temperature, rtol=1e-5)


@pytest.mark.parametrize(
    ("wanted", "error", "said"),
    [
        ({"precision": {"": 0.999}}, DataError, "no threshold gives answers a precision of 0.999"),
        ({"precision": {"shut": 0.9}}, UsageError, "names the label 'shut'"),
        ({"precision": {"": 95}}, UsageError, "precision 95 must lie between 0 and 1"),
        ({"costs": {"closed": -5}}, UsageError, "costs must be above 0"),
        ({"costs": {"closed": 5}, "person": 9}, UsageError, "--abstain 9 is never worth it"),
        ({"precision": {"": 0.5}, "prior": {"shut": 0.1}}, UsageError, "prior names the label 'shut'"),
        ({}, UsageError, "either --precision 0.95 or --cost LABEL=COST"),
        ({"precision": {"": 0.5}, "costs": {"open": 1}}, UsageError, "either --precision"),
        ({"precision": {"": 0.5}, "person": 1.0}, UsageError, "--abstain is what a person costs, beside --cost"),
    ],
)
def test_what_cannot_be_chosen_leaves_the_folder_as_it_was(run, data, wanted, error, said, monkeypatch):
    computed = []
    monkeypatch.setattr(threshold, "score", lambda *given: computed.append(given) or score(*given))
    before = (run / MANIFEST).read_bytes()
    with pytest.raises(error, match=said):
        choose_thresholds(run, data, Wanted(**wanted))
    assert (run / MANIFEST).read_bytes() == before
    assert len(computed) == (error is DataError), "what is no number or label is refused at once"


def test_other_data_and_a_label_called_abstain_are_refused(tmp_path, run, data, base):
    prepare(data.with_suffix(".csv"), tmp_path / "other", Tokenizer.load(base), PrepareOptions(seed=7))
    with pytest.raises(DataError, match="or on another split of it"):
        choose_thresholds(run, tmp_path / "other", LOW)
    schema = read_manifest(run, "run")["schema"] | {"label_names": ["open", "abstain"]}
    reseal(run, labels=["open", "abstain"], schema=schema)
    with pytest.raises(UsageError, match="'abstain' is a label of this model"):
        choose_thresholds(run, data, LOW)


def test_labels_that_were_numbers_are_numbers_in_decisions(runs):
    codec = Predictor.load(runs["full"], "fp32").codec
    numbers = replace(codec.schema, label_names=("0", "1"), label_kind="integer")
    manifest = codec.manifest | {"labels": ["0", "1"]}
    asked = replace(codec, schema=numbers, manifest=manifest, policy=Policy(("0", "1"), (0.75, 0.75)))
    chances = np.array([[0.8, 0.2], [0.5, 0.5], [0.1, 0.9]], np.float32)
    assert asked.labelled(chances, pd.RangeIndex(3))["decision"].tolist() == [0, "abstain", 1]


def test_a_label_that_no_row_is_given_is_told(run, data):
    chances = Predictor.load(run, "fp32").predict_proba(PreparedData.open(data).texts(np.arange(100)))["closed"]
    middle = float(chances.median() / (1 - chances.median()))
    for cost, never in ((1e6, ["closed"]), (middle, []), (1e-6, ["open"])):
        doubts = choose_thresholds(run, data, Wanted(costs={"closed": cost})).doubts
        assert [label for label in ("open", "closed") if f"is given the label {label!r}" in " ".join(doubts)] == never


def test_the_command_says_what_the_thresholds_cost(tmp_path, run, data, capsys):
    out = tmp_path / "t.json"
    assert run_command("threshold", run, "--data", data, "--cost", "closed=5", "--abstain", "0.5", "--json", out) == 0
    said = capsys.readouterr().out
    assert "| closed | 0.9000 |" in said
    assert "| open | 0.5000 |" in said
    assert " rows are answered, " in said
    assert "by its most probable label" in said
    assert json.loads(out.read_text()) == kept(run)
    table = data.with_suffix(".csv")
    assert run_command("predict", run, table, "--out", tmp_path / "p.csv") == 0
    assert "rows go to a person: their decision is `abstain`" in capsys.readouterr().out
    for arguments, expected in (
        (("--precision", "closed=much"), "--precision 'closed=much' is not LABEL=NUMBER"),
        (("--precision", "closed=0.5", "--precision", "closed=0.6"), "--precision names closed twice"),
        (("--precision", "closed=0.5", "--prior", "closed=2"), "prior closed=2: a share lies between 0 and 1"),
    ):
        assert run_command("threshold", run, "--data", data, *arguments) == 2
        assert expected in capsys.readouterr().err
    assert run_command("predict", run, table, "--out", tmp_path / "q.csv", "--prior", "0.3") == 2
    assert "--prior '0.3' is not LABEL=NUMBER" in capsys.readouterr().err

"""`fit`: one call from a table to a model; interrupted anywhere, it goes on and repeats nothing that was done."""

import json
import signal

import numpy as np
import pandas as pd
import pytest

import bertforge
from bertforge.autofit import fit as module
from bertforge.autofit import search
from bertforge.autofit.fit import STATE, FitOptions, fit, fit_table
from bertforge.engines.fastest import Candidate
from bertforge.errors import ArtifactError, DataError, UsageError
from bertforge.inference.predictor import Predictor
from bertforge.manifest import MANIFEST, read_manifest
from bertforge.training import schedule
from bertforge.training.finetune import finetune
from tests.autofit.tables import mails


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Two settings to try, short runs and one engine to build, so that a fit takes seconds."""
    settings = [search.Candidate(True, 0.2, True), search.Candidate(True, 0.2, False)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "candidates", lambda columns: settings if columns else settings[1:])
        patch.setattr(search, "LEAST_STEPS", 4)
        patch.setattr(schedule, "MOST_EPOCHS", 6)
        patch.setattr(module, "candidates", lambda *arguments: [Candidate("onnxruntime", "fp32")])
        yield


@pytest.fixture(scope="module")
def mails_csv(tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "mails.csv"
    mails().to_csv(path, index=False)
    return path


def options(base, **changes):
    return FitOptions(**{"label_column": "folder", "minutes": 2.0, "model": str(base), **changes})


@pytest.fixture(scope="module")
def whole(quick, tmp_path_factory, mails_csv, base):
    """A fit that nothing interrupted, and what it said."""
    said, out = [], tmp_path_factory.mktemp("whole") / "model"
    fit_table(mails_csv, out, options(base), say=said.append)
    return out, said


def test_a_fit_ends_with_a_proved_engine_and_says_what_it_did(whole, mails_csv, base):
    out, said = whole
    manifest = read_manifest(out, "fit")
    assert manifest["serves"] == "engine"
    assert manifest["metrics"]["accuracy"]["value"] > 0.8
    assert [engine["target"] for engine in manifest["engines"]] == ["onnxruntime"]
    assert manifest["seconds"] < 120
    assert not (out / STATE).exists()
    assert "text: message; label: folder" in said
    assert "LoRA, learning rate x 0.2, with columns</td>" in (out / "report.html").read_text()
    assert "onnxruntime fp32" in (out / "report.html").read_text()
    others = mails(100, seed=5)
    assert (Predictor.load(out).predict(others)["label"] == others["folder"]).mean() > 0.9


def test_the_same_call_on_a_finished_fit_does_nothing(whole, mails_csv, base):
    out, _ = whole
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    said = []
    assert fit_table(mails_csv, out, options(base), say=said.append) == read_manifest(out, "fit")
    assert said == [f"{out} holds this fit, finished: nothing to do"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_another_table_or_other_options_are_refused(whole, mails_csv, base, tmp_path):
    out, _ = whole
    other = tmp_path / "other.csv"
    mails(seed=3).to_csv(other, index=False)
    with pytest.raises(
        ArtifactError, match=r"holds a fit of another table, mails\.csv; name another folder with --out"
    ):
        fit_table(other, out, options(base))
    with pytest.raises(ArtifactError, match=r"holds a fit with --minutes 2\.0, not 3\.0; name another folder"):
        fit_table(mails_csv, out, options(base, minutes=3.0))
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="notes is not an empty folder; name another one with --out"):
        fit_table(mails_csv, notes, options(base))
    assert [path.name for path in notes.iterdir()] == ["mine.txt"]


def interrupt(monkeypatch, owner, name, call=1):
    """The call number `call` of `owner.name` raises KeyboardInterrupt."""
    original, calls = getattr(owner, name), []

    def stop(*arguments, **named):
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, stop)


def interrupt_training(monkeypatch):
    """As Ctrl-C does, in the second epoch."""

    def stop(progress, sequences, loss):
        if progress.epoch == 1:
            signal.raise_signal(signal.SIGINT)

    def stopped(data, run, recipe, resume):
        return finetune(data, run, recipe, resume=resume, show=stop)

    monkeypatch.setattr(module, "finetune", stopped)


STAGES = {  # how the first call is stopped
    "after prepare": lambda patch: interrupt(patch, module, "baselines"),
    "in a trial": lambda patch: interrupt(patch, search.Workbench, "trial", 2),
    "in training": interrupt_training,
    "before the engine": lambda patch: interrupt(patch, module, "compile_fastest"),
    "before the end": lambda patch: interrupt(patch, module, "write_manifest"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_fit_goes_on_as_if_nothing_had_been(stage, whole, mails_csv, base, tmp_path, monkeypatch):
    out = tmp_path / "model"
    with monkeypatch.context() as patch:
        STAGES[stage](patch)
        with pytest.raises(KeyboardInterrupt):
            fit_table(mails_csv, out, options(base), say=lambda line: None)
    assert not (out / MANIFEST).is_file()
    state = json.loads((out / STATE).read_text())
    assert state["seconds"] > 0
    with pytest.raises(ArtifactError, match="holds a fit with --seed 42, not 1"):
        fit_table(mails_csv, out, options(base, seed=1))
    made, trial = [], search.Workbench.trial
    monkeypatch.setattr(search.Workbench, "trial", lambda *given: made.append(given) or trial(*given))
    fit_table(mails_csv, out, options(base), say=lambda line: None)
    done, expected = read_manifest(out, "fit"), read_manifest(whole[0], "fit")
    assert done["recipe"] | {"minutes": None} == expected["recipe"] | {"minutes": None}
    assert done["seconds"] > state["seconds"]
    assert len(made) == len(done["trials"]) - len(state["trials"])
    assert [(t["name"], t["rows_seen"]) for t in done["trials"]] == [
        (t["name"], t["rows_seen"]) for t in expected["trials"]
    ]
    assert not (out / STATE).exists()
    found, uninterrupted = (Predictor.load(each).predict(mails(40, seed=5)) for each in (out, whole[0]))
    assert found["label"].equals(uninterrupted["label"])


def test_what_was_tried_is_kept_when_no_engine_can_be_had(mails_csv, base, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "candidates", lambda *arguments: [Candidate("openvino", "fp4")])
    said = []
    fit_table(mails_csv, tmp_path / "model", options(base), say=said.append)
    assert any(line.startswith("note: no engine was compiled, so PyTorch serves the model (") for line in said)
    assert read_manifest(tmp_path / "model", "fit")["serves"] == "model"
    assert Predictor.load(tmp_path / "model").predict(mails(2))["label"].tolist() == ["inbox", "spam"]


def labelled(values):
    """`mails` of text alone, with `values` for inbox and spam, and an index of its own."""
    frame = mails(80)[["message", "folder"]]
    frame["folder"] = [values[name == "spam"] for name in frame["folder"]]
    return frame.set_index(pd.Index([f"row {i}" for i in range(len(frame))]))


@pytest.mark.parametrize("values", [(0, 3), (False, True)], ids=["int", "bool"])
def test_in_python_labels_come_back_as_they_were_given(values, base):
    frame = labelled(values)
    model = bertforge.fit(frame, label="folder", minutes=2, model=str(base), say=lambda line: None)
    found = model.predict(frame)
    assert found["label"].tolist() == frame["folder"].tolist()
    assert {type(label) for label in found["label"].tolist()} == {type(values[0])}
    assert found.index.equals(frame.index)
    chances = model.predict_proba(frame["message"].tolist())
    assert chances.shape == (80, 2)
    np.testing.assert_allclose(chances.sum(axis=1), 1.0, rtol=1e-5)


def test_in_python_a_frame_and_its_folder_go_on_too(base, tmp_path, monkeypatch):
    frame, out = labelled(("inbox", "spam")), tmp_path / "model"
    given = {"minutes": 2, "model": str(base), "out": out, "say": lambda line: None}
    with monkeypatch.context() as patch:
        interrupt(patch, module, "evaluate_run")
        with pytest.raises(KeyboardInterrupt):
            fit(frame, "folder", "message", **given)
    with pytest.raises(ArtifactError, match="holds a fit of another table"):
        fit(frame.iloc[::-1], "folder", "message", **given)
    assert fit(frame, "folder", "message", **given).predict(["free prize cash bonus winner"])["label"].tolist() == [
        "spam"
    ]
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) in (
        ["data", "engine", "model", "run"],
        ["data", "engine", "run"],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda frame: frame.assign(folder="spam"),
            "all 200 good rows have the label 'spam'; a classifier needs two labels or more",
        ),
        (lambda frame: frame.head(4), "good rows are too few"),
        (lambda frame: frame.rename(columns={"folder": "foldr"}), "the table has no column folder; did you mean foldr"),
        (lambda frame: frame[["folder"]].assign(size=1.5), "reads like text; name one with --text-columns"),
        (lambda frame: frame.assign(size=[1, "a"] * 100), "the frame cannot be stored .*; give each column one type"),
    ],
    ids=["one class", "few rows", "no such column", "no text", "mixed types"],
)
def test_a_table_that_cannot_be_learnt_from_leaves_nothing_behind(change, message, base, tmp_path):
    with pytest.raises(DataError, match=message):
        fit(change(mails()), "folder", out=tmp_path / "model", model=str(base), say=lambda line: None)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("minutes", [0.5, -1, float("nan"), float("inf")])
def test_time_that_cannot_be_kept_is_refused(minutes):
    with pytest.raises(UsageError, match=rf"--minutes {minutes:g} "):
        FitOptions("folder", minutes=minutes)


def test_thirty_rows_make_a_model(base):
    model = fit(mails(30), "folder", minutes=1, model=str(base), say=lambda line: None)
    assert set(model.predict(mails(30))["label"]) <= {"inbox", "spam"}

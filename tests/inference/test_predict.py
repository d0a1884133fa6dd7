"""Every row of a table gets its line in the output, in order, whatever is wrong with it."""

import json
import os
import threading
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from bertforge.data import tables
from bertforge.data.dialect import Dialect
from bertforge.errors import DataError, MachineError, UsageError
from bertforge.inference import predict as module
from bertforge.inference.predict import predict_table
from bertforge.inference.predictor import Predictor
from bertforge.inference.scoring import score
from tests.cli.test_outputs import full_at
from tests.runs import made_up, run_command

BAD = {3: ("Title", " "), 5: ("PostCreationDate", "the other day"), 7: ("ReputationAtPostCreation", "many")}


@pytest.fixture(scope="module")
def predictor(runs):
    return Predictor.load(runs["columns"], "fp32")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """30 questions: row 2 has neither title nor body, three others one fault each."""
    frame = made_up(30, seed=3).drop(columns=["OpenStatus", "PostClosedDate"])
    frame.loc[2, ["Title", "BodyMarkdown"]] = ""
    for row, (column, value) in BAD.items():
        frame.loc[row, column] = value
    path = tmp_path_factory.mktemp("table") / "questions.parquet"  # whose lines are row numbers
    frame.to_parquet(path, index=False)
    return path


def read(path):
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    if path.suffix == ".jsonl":
        return pd.DataFrame([json.loads(line) for line in path.read_text().splitlines()])
    return pd.read_csv(path, dtype={"problem": str}).fillna({"problem": ""})


def test_every_row_comes_out_in_order(tmp_path, predictor, table):
    assert predict_table(predictor, table, tmp_path / "p.parquet") == (30, 1, True, None)
    found = read(tmp_path / "p.parquet")
    assert list(found.columns) == ["line", "label", "probability", "p_open", "p_closed", "problem"]
    assert found["line"].tolist() == list(range(1, 31))
    assert found.index[found["label"].isna()].tolist() == [2], "a row without any text, and no other"
    assert found.loc[2, ["probability", "p_open", "p_closed"]].isna().all()
    assert found["problem"].tolist() == [
        {2: "missing Title", 3: "missing Title"}.get(row)
        or ("" if row not in BAD else f"unparsable {'date' if row == 5 else 'number'} in {BAD[row][0]}")
        for row in range(30)
    ]


def test_it_says_what_the_predictor_says(tmp_path, predictor, table):
    predict_table(predictor, table, tmp_path / "p.parquet")
    found = read(tmp_path / "p.parquet").drop(index=2).reset_index(drop=True)
    (chunk,) = module.read_raw(table, predictor.schema, require_labels=False)
    good = [row for row in range(30) if row != 2]
    expected = predictor.predict([chunk.texts[row] for row in good], chunk.frame.iloc[good])
    pd.testing.assert_frame_equal(found[list(expected.columns)], expected, check_dtype=False, atol=1e-6)
    assert expected["probability"].nunique() > 20


def test_stages_beside_one_another_give_what_they_give_in_turn(tmp_path, predictor, table, monkeypatch):
    read_chunks = tables.read_chunks
    monkeypatch.setattr("bertforge.data.raw.read_chunks", lambda source, **named: read_chunks(source, 4))
    predict_table(predictor, table, tmp_path / "p.parquet")
    found = read(tmp_path / "p.parquet")
    in_turn = [
        predictor.predict_proba(chunk.texts, chunk.frame)
        for chunk in module.read_raw(table, predictor.schema, require_labels=False)
    ]
    assert len(in_turn) == 8
    chances = found[["p_open", "p_closed"]].to_numpy()
    assert np.array_equal(chances, np.concatenate(in_turn).astype(np.float32), equal_nan=True), "the same shapes"
    assert len(np.unique(chances[:, 0])) > 20


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_formats_agree(tmp_path, predictor, table, suffix):
    for name in ("p.parquet", f"p{suffix}"):
        predict_table(predictor, table, tmp_path / name)
    one, other = read(tmp_path / "p.parquet"), read(tmp_path / f"p{suffix}")
    assert other["line"].tolist() == one["line"].tolist()
    assert other["problem"].tolist() == one["problem"].tolist()
    assert other["label"].fillna("none").tolist() == one["label"].fillna("none").tolist()
    for name in ("probability", "p_open", "p_closed"):
        np.testing.assert_allclose(other[name].astype(float), one[name], rtol=1e-6)


def test_json_lines_hold_null_where_there_is_no_label(tmp_path, predictor, table):
    predict_table(predictor, table, tmp_path / "p.jsonl")
    line = json.loads((tmp_path / "p.jsonl").read_text().splitlines()[2])
    assert line == {
        "line": 3, "label": None, "probability": None, "p_open": None, "p_closed": None, "problem": "missing Title"
    }  # fmt: skip


def labelled(predictor, *labels):
    """As if the training table had written its labels so."""
    schema, manifest = replace(predictor.schema, label_names=labels), {**predictor.manifest, "labels": labels}
    return replace(predictor, codec=replace(predictor.codec, schema=schema, manifest=manifest))


@pytest.mark.parametrize("label", ["=1+1", "+1;=2", "-1+1", "@SUM(1)", "\tx", "＝1", "'x", "plain"])
def test_labels_are_as_the_table_gave_them_and_safe_for_a_spreadsheet_when_asked(tmp_path, predictor, table, label):
    changed = labelled(predictor, label, f"{label}0")
    given, safe = tmp_path / "given.csv", tmp_path / "safe.csv"
    written = predict_table(changed, table, given)
    assert written == predict_table(changed, table, safe, safe_csv=True) == (30, 1, True, None)
    one, other = read(given), read(safe)
    known = set(one["label"].dropna().map(str))
    assert known <= {label, f"{label}0"}
    escaped = "" if label in ("'x", "plain") else "'"
    assert set(other["label"].dropna().map(str)) == {escaped + name for name in known}
    assert other["label"].isna().tolist() == one["label"].isna().tolist()
    assert other.drop(columns="label").equals(one.drop(columns="label"))
    assert f',"{escaped}{one.loc[0, "label"]}",' in safe.read_text(), "in quotes: no other separator splits it"


def test_a_safe_csv_is_a_csv(tmp_path, runs, data, capsys):
    arguments = ("predict", runs["full"], data.with_suffix(".csv"), "--safe-csv", "--out")
    assert run_command(*arguments, tmp_path / "p.parquet") == 2
    assert "--safe-csv is for .csv files, and --out is " in capsys.readouterr().err
    assert run_command(*arguments, tmp_path / "p.csv") == 0
    assert (tmp_path / "p.csv").read_text().startswith('"line","label","probability","p_open","p_closed","problem"\n')


@pytest.mark.parametrize("name", ["p.parquet", "p.csv", "p.jsonl"])
def test_chunks_leave_no_trace(tmp_path, predictor, table, monkeypatch, name):
    predict_table(predictor, table, tmp_path / f"whole_{name}")
    read_raw, read_chunks = module.read_raw, tables.read_chunks
    monkeypatch.setattr("bertforge.data.raw.read_chunks", lambda source, **named: read_chunks(source, 3))
    assert len(list(read_raw(table, predictor.schema, require_labels=False))) == 10
    assert predict_table(predictor, table, tmp_path / name) == (30, 1, True, None)
    whole, pieces = read(tmp_path / f"whole_{name}"), read(tmp_path / name)
    pd.testing.assert_frame_equal(pieces, whole, atol=1e-5)


def test_rows_that_cannot_be_read_keep_their_line(tmp_path, predictor):
    frame = made_up(6, seed=3)
    frame["BodyMarkdown"] = "a naïve text of one line"  # which shows that the table is UTF-8
    path = tmp_path / "t.csv"
    frame.to_csv(path, index=False)
    lines = path.read_bytes().split(b"\n")
    lines[3] = lines[3].replace(b"one line", b"one l\xefne")
    path.write_bytes(b"\n".join(lines))
    assert predict_table(predictor, path, tmp_path / "p.csv") == (6, 1, True, None)
    found = read(tmp_path / "p.csv")
    assert found["line"].tolist() == [2, 3, 4, 5, 6, 7]
    assert found["problem"].tolist() == ["", "", "not UTF-8", "", "", ""]
    assert found["label"].isna().tolist() == [False, False, True, False, False, False]


def test_a_table_without_any_text_is_all_unlabelled(tmp_path, predictor):
    frame = made_up(3, seed=3).assign(Title="", BodyMarkdown="")
    frame.to_csv(tmp_path / "t.csv", index=False)
    for suffix in (".csv", ".parquet", ".jsonl"):
        assert predict_table(predictor, tmp_path / "t.csv", tmp_path / f"p{suffix}") == (3, 3, True, None)
        assert read(tmp_path / f"p{suffix}")["label"].isna().all()


@pytest.mark.parametrize("name", ["p.parquet", "p.csv", "p.jsonl"])
def test_what_a_killed_process_left_is_not_added_to(tmp_path, predictor, table, name):
    (tmp_path / f".{name}.{os.getpid()}.partial").write_text("half a row")
    predict_table(predictor, table, tmp_path / name)
    assert read(tmp_path / name)["line"].tolist() == list(range(1, 31))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_table_is_not_overwritten_by_its_own_predictions(tmp_path, predictor):
    made_up(3).to_csv(tmp_path / "t.csv", index=False)
    before = (tmp_path / "t.csv").read_text()
    with pytest.raises(UsageError, match=r"t\.csv is the table itself, which would be overwritten; name another file"):
        predict_table(predictor, tmp_path / "t.csv", tmp_path / "." / "t.csv")
    assert (tmp_path / "t.csv").read_text() == before


def test_another_suffix_is_refused_before_anything_is_read(tmp_path, predictor):
    with pytest.raises(UsageError, match=r"--out .*p\.xlsx should end in \.csv, \.parquet, \.jsonl"):
        predict_table(predictor, tmp_path / "absent.csv", tmp_path / "p.xlsx")


def test_a_missing_text_column_is_named(tmp_path, predictor):
    made_up(3).drop(columns="Title").to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match="the table has no column Title, which the model needs"):
        predict_table(predictor, tmp_path / "t.csv", tmp_path / "p.csv")


def test_a_missing_column_that_a_model_reads_is_named(tmp_path, predictor):
    made_up(3).drop(columns="ReputationAtPostCreation").to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(
        DataError, match="the model reads 'reputation', made from ReputationAtPostCreation, which the table lacks"
    ):
        predict_table(predictor, tmp_path / "t.csv", tmp_path / "p.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_a_table_without_rows_is_an_error(tmp_path, predictor):
    made_up(1).iloc[:0].to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match="holds no rows to predict"):
        predict_table(predictor, tmp_path / "t.csv", tmp_path / "p.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


class FailingEngine:
    """Answers one batch and fails in the second."""

    def __init__(self, engine, error):
        self._engine, self._error, self._batches = engine, error, 0

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def logits(self, batch):
        self._batches += 1
        if self._batches == 2:
            raise self._error
        return self._engine.logits(batch)


@pytest.fixture
def fails(predictor, monkeypatch):
    """Makes `predict` read ten rows at a time and fail in a stage; the predictor, and the error it ends with."""
    read_chunks = tables.read_chunks

    def start(stage):
        def chunks(source, **named):
            for number, chunk in enumerate(read_chunks(source, 10)):
                if (stage, number) == ("reader", 2):
                    raise DataError("row 20 is damaged")
                yield chunk

        monkeypatch.setattr("bertforge.data.raw.read_chunks", chunks)
        if stage == "reader":
            return predictor, DataError
        if stage == "writer":
            return predictor, OSError
        error = {"engine": MachineError, "Ctrl-C": KeyboardInterrupt}[stage]
        return replace(predictor, engine=FailingEngine(predictor.engine, error("the device is gone"))), error

    return start


@pytest.mark.parametrize("stage", ["reader", "engine", "writer", "Ctrl-C"])
@pytest.mark.parametrize("name", ["p.parquet", "p.csv", "p.jsonl"])
def test_what_fails_on_the_way_leaves_no_file_an_older_one_alone_and_no_thread(tmp_path, table, fails, name, stage):
    before = {thread.name for thread in threading.enumerate()}
    for older in ([], ["older"]):
        predictor, error = fails(stage)
        for text in older:
            (tmp_path / name).write_text(text)
        with pytest.raises(error) as raised, full_at(500) if stage == "writer" else nullcontext():
            predict_table(predictor, table, tmp_path / name)
        assert [path.read_text() for path in tmp_path.iterdir()] == older
        assert stage != "writer" or raised.value.filename == str(tmp_path / name)
        assert {thread.name for thread in threading.enumerate()} <= before


def test_a_run_without_columns_needs_the_texts_alone(tmp_path, runs):
    made_up(4)[["Title", "BodyMarkdown"]].to_csv(tmp_path / "t.csv", index=False)
    text_only = Predictor.load(runs["full"], "fp32")
    assert predict_table(text_only, tmp_path / "t.csv", tmp_path / "p.csv") == (4, 0, True, None)
    title = replace(text_only.schema, text_columns=("Title",))
    one_label = replace(text_only, codec=replace(text_only.codec, schema=title))
    assert predict_table(one_label, tmp_path / "t.csv", tmp_path / "q.csv") == (4, 0, True, None)
    assert (tmp_path / "q.csv").read_text() != (tmp_path / "p.csv").read_text()


def test_a_table_is_read_as_the_user_says_it_is_written(tmp_path, runs, capsys):
    frame = made_up(4, seed=3)[["Title", "BodyMarkdown", "OpenStatus"]].assign(BodyMarkdown="Größe; Tür")
    plain, other = tmp_path / "plain.csv", tmp_path / "other.csv"
    frame.to_csv(plain, index=False)
    frame.to_csv(other, index=False, sep="#", encoding="cp437")  # neither of which is found by itself
    written = ("--separator", "#", "--encoding", "cp437")
    for table, options in ((plain, ()), (other, written)):
        assert run_command("predict", runs["full"], table, "--out", tmp_path / f"p-{table.name}", *options) == 0
    assert read(tmp_path / "p-other.csv").equals(read(tmp_path / "p-plain.csv"))
    assert run_command("predict", runs["full"], other, "--out", tmp_path / "p.csv") == 3
    assert "the table has no columns Title, BodyMarkdown" in capsys.readouterr().err
    predictor = Predictor.load(runs["full"], "fp32")
    found, expected = score(predictor, other, dialect=Dialect("cp437", "#")), score(predictor, plain)
    assert found.texts == expected.texts
    assert np.array_equal(found.labels, expected.labels)


def test_prepared_data_has_no_encoding_to_name(data, runs, capsys):
    assert run_command("evaluate", runs["full"], "--data", data, "--separator", "tab") == 2
    assert "is prepared already; leave --encoding and --separator out" in capsys.readouterr().err

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from bertforge.data import prepare as prepare_module
from bertforge.data.features import FEATURES
from bertforge.data.prepare import PrepareOptions, prepare
from bertforge.data.prepared import PreparedData
from bertforge.data.sample import MADE_UP_FIRST_POST_ID
from bertforge.data.tokens import Tokenizer
from bertforge.errors import ArtifactError, DataError, UsageError
from bertforge.manifest import write_manifest

from .tables import COLUMNS, question, questions, write_csv, write_every_format


def folders_and_files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_every_format_is_prepared_alike(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = [
        prepare(path, tmp_path / f"out{number}", tokenizer)
        for number, path in enumerate(write_every_format(tmp_path, questions(200)))
    ]
    first = made[0]
    for data in made[1:]:
        assert data.labels.tolist() == first.labels.tolist()
        assert data.split("random").tolist() == first.split("random").tolist()
        assert data.split("time").tolist() == first.split("time").tolist()
        assert data.tokens(tokenizer).ids.tolist() == first.tokens(tokenizer).ids.tolist()
        pd.testing.assert_frame_equal(data.columns(list(FEATURES)), first.columns(list(FEATURES)))
        assert data.fingerprint != first.fingerprint, "the fingerprint is of the file's bytes"


def test_what_was_prepared_is_what_stood_in_the_table(tmp_path: Path, tokenizer: Tokenizer) -> None:
    frame = questions(100)
    data = prepare(write_csv(tmp_path / "t.csv", frame), tmp_path / "out", tokenizer)
    assert len(data) == 100
    assert data.label_names == ("open", "closed")
    assert data.labels.tolist() == (frame["OpenStatus"] != "open").astype(int).tolist()
    assert data.columns(COLUMNS).astype(object).values.tolist() == frame.values.tolist()
    texts = (frame["Title"] + " " + frame["BodyMarkdown"]).tolist()
    assert data.texts([99, 0, 50, 0]) == [texts[99], texts[0], texts[50], texts[0]]
    ids, offsets = tokenizer.encode(texts)
    store = data.tokens(tokenizer)
    assert (store.ids == ids).all()
    assert (store.offsets == offsets).all()
    assert data.dates is not None
    assert data.dates[3] == np.datetime64("2010-01-04T10:30:00")
    assert data.lines[:2].tolist() == [2, 7]
    for split in ("random", "time"):
        parts = [data.rows(split, part).tolist() for part in ("train", "validation", "test")]
        assert [len(part) for part in parts] == [80, 10, 10]
        assert sorted(row for part in parts for row in part) == list(range(100))


def test_chunks_leave_no_trace(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = questions(100).drop(index=[5]).reset_index(drop=True)
    frame.loc[40, "Title"] = ""
    table = write_csv(tmp_path / "t.csv", frame)
    whole = prepare(table, tmp_path / "whole", tokenizer)
    read = prepare_module.read_chunks
    monkeypatch.setattr(prepare_module, "read_chunks", lambda path, **options: read(path, 7, **options))
    pieces = prepare(table, tmp_path / "pieces", tokenizer)
    assert pq.ParquetFile(pieces.directory / "table.parquet").num_row_groups > 10
    for name in ("labels.npy", "lines.npy", "dates.npy", "splits/random.npy", "splits/time.npy", "set_aside.jsonl"):
        assert (pieces.directory / name).read_bytes() == (whole.directory / name).read_bytes(), name
    assert pieces.tokens(tokenizer).ids.tolist() == whole.tokens(tokenizer).ids.tolist()
    assert pieces.texts([60, 3]) == whole.texts([60, 3])


def test_bad_rows_are_counted_with_their_lines_and_kept_in_a_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [question(i, BodyMarkdown=f"one line {i}, naïve") for i in range(100)]
    rows[10]["Title"] = ""
    rows[20]["PostCreationDate"] = "99/99/2010 00:00:00"
    rows[30]["OpenStatus"] = "deleted"
    rows[31]["OpenStatus"] = "deleted"
    table = write_csv(tmp_path / "t.csv", pd.DataFrame(rows, columns=COLUMNS))
    lines = table.read_bytes().split(b"\n")
    lines[41] = lines[41].replace(b"one line", b'"one" line')  # line 42: quotes in an unquoted field are fine
    lines[51] = lines[51].replace(b"one line 50", b'"one" line 50')  # line 52: but not after a closing quote
    lines[61] = lines[61].replace(b"one line", b"one l\xefne")
    table.write_bytes(b"\n".join(lines))
    data = prepare(table, tmp_path / "out", tokenizer)
    assert data.manifest["set_aside"] == {
        "missing Title": {"rows": 1, "lines": [12]},
        "unparsable date in PostCreationDate": {"rows": 1, "lines": [22]},
        "unknown OpenStatus": {"rows": 2, "lines": [32, 33]},
        "broken quoting": {"rows": 2, "lines": [42, 52]},
        "not UTF-8": {"rows": 1, "lines": [62]},
    }
    assert len(data) == 93
    kept = [json.loads(line) for line in (data.directory / "set_aside.jsonl").read_text().splitlines()]
    assert [row["line"] for row in kept] == [12, 22, 32, 33, 42, 52, 62]
    assert kept[0]["raw"] == rows[10]
    assert kept[4]["reason"].startswith("broken quoting: ")
    assert kept[4]["raw"] == (lines[41] + b"\n").decode()
    assert not set(data.lines.tolist()) & {row["line"] for row in kept}


def test_made_up_rows_are_labelled_so(tmp_path: Path, tokenizer: Tokenizer) -> None:
    frame = questions(60)
    real = prepare(write_csv(tmp_path / "real.csv", frame), tmp_path / "real", tokenizer)
    frame.loc[30, "PostId"] = str(MADE_UP_FIRST_POST_ID)
    mixed = prepare(write_csv(tmp_path / "mixed.csv", frame), tmp_path / "mixed", tokenizer)
    assert (real.made_up, mixed.made_up) == (False, True)


def test_duplicates_stay_together_and_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [question(i) for i in range(100)]
    for i in range(50, 100):  # the second half repeats the first, in other case and spacing
        rows[i] |= {"Title": rows[i - 50]["Title"].upper() + "  ", "BodyMarkdown": rows[i - 50]["BodyMarkdown"]}
    data = prepare(write_csv(tmp_path / "t.csv", pd.DataFrame(rows)), tmp_path / "out", tokenizer)
    closed = [row["OpenStatus"] != "open" for row in rows]
    conflicts = sum(closed[i] != closed[i + 50] for i in range(50))
    assert data.manifest["duplicates"] == {"rows": 50, "conflicting_texts": conflicts}
    for name in ("random", "time"):
        part = data.split(name)
        assert (part[:50] == part[50:]).all()


def test_a_table_of_ones_own_with_many_classes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    frame = pd.DataFrame(
        {
            "subject": [f"list {i}" for i in range(90)],
            "message": ["sort" if i % 2 else "" for i in range(90)],
            "folder": [("10", "9", "2")[i % 3] for i in range(90)],
            "size": range(90),
        }
    )
    table = tmp_path / "t.parquet"
    frame.to_parquet(table)
    options = PrepareOptions(text_columns=("subject", "message"), label_column="folder")
    data = prepare(table, tmp_path / "out", tokenizer, options)
    assert data.label_names == ("2", "9", "10")
    assert [data.label_names[label] for label in data.labels] == frame["folder"].tolist()
    assert data.texts([1, 2]) == ["list 1 sort", "list 2 "]
    assert data.columns(["size"])["size"].tolist() == [str(i) for i in range(90)]
    assert list(data.manifest["splits"]) == ["random"]
    assert data.dates is None
    with pytest.raises(UsageError, match="has no split 'time'"):
        data.split("time")
    with pytest.raises(DataError, match=r"no column sizes .* there are: subject, message, folder, size"):
        data.columns(["sizes"])


def label_tables(folder: Path, labels: list[object]) -> list[Path]:
    """The same rows as CSV and as Parquet."""
    frame = pd.DataFrame({"text": [f"text {i}" for i in range(len(labels))], "y": labels})
    frame.to_parquet(folder / "t.parquet")
    return [write_csv(folder / "t.csv", frame), folder / "t.parquet"]


@pytest.mark.parametrize(
    ("labels", "kind", "original"),
    [
        ([True, False], "boolean", (False, True)),
        ([1, 0], "integer", (0, 1)),
        ([1.0, 0.0, float("nan")], "integer", (0, 1)),  # whole numbers with a gap are floats to pandas
        (["b", "a"], "text", ("a", "b")),
    ],
)
def test_labels_are_the_same_from_csv_and_parquet(
    tmp_path: Path, tokenizer: Tokenizer, labels: list[object], kind: str, original: tuple[object, ...]
) -> None:
    options = PrepareOptions(text_columns=("text",), label_column="y")
    made = [prepare(path, tmp_path / path.suffix, tokenizer, options) for path in label_tables(tmp_path, labels * 30)]
    for data in made:
        assert data.schema.label_kind == kind
        assert data.schema.original_labels() == original
        assert data.label_names == made[0].label_names
        assert data.labels.tolist() == made[0].labels.tolist()


def test_digits_that_a_source_calls_text_stay_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    options = PrepareOptions(text_columns=("text",), label_column="y")
    table, parquet = label_tables(tmp_path, ["1", "0"] * 30)
    assert prepare(parquet, tmp_path / "typed", tokenizer, options).schema.original_labels() == ("0", "1")
    lines = pd.read_parquet(parquet)
    lines.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    assert prepare(tmp_path / "t.jsonl", tmp_path / "lines", tokenizer, options).schema.original_labels() == ("0", "1")
    assert prepare(table, tmp_path / "csv", tokenizer, options).schema.original_labels() == (0, 1)


def test_dates_with_the_day_first_are_refused_and_not_read_month_first(tmp_path: Path, tokenizer: Tokenizer) -> None:
    days = pd.date_range("2012-01-01", periods=60)
    frame = pd.DataFrame({"text": map(str, range(60)), "label": ["a", "b"] * 30, "on": days.strftime("%d/%m/%Y")})
    options = PrepareOptions(text_columns=("text",), label_column="label", date_column="on")
    with pytest.raises(DataError, match=r"column on .* day first, such as '13/01/2012'; write them as MM/DD/YYYY"):
        prepare(write_csv(tmp_path / "t.csv", frame), tmp_path / "out", tokenizer, options)
    month_first = write_csv(tmp_path / "t.csv", frame.assign(on=days.strftime("%m/%d/%Y")))
    data = prepare(month_first, tmp_path / "out", tokenizer, options)
    assert data.dates is not None
    assert data.dates.tolist() == days.to_pydatetime().tolist()
    wrong = write_csv(tmp_path / "t.csv", frame.assign(on="yesterday"))
    with pytest.raises(DataError, match=r"unparsable date in on: 60 rows.*; dates are read as MM/DD/YYYY"):
        prepare(wrong, tmp_path / "other", tokenizer, options)


def test_preparing_again_returns_at_once_and_another_table_replaces(tmp_path: Path, tokenizer: Tokenizer) -> None:
    table = write_csv(tmp_path / "t.csv", questions(60))
    first = prepare(table, tmp_path / "out", tokenizer)
    stamp = (first.directory / "table.parquet").stat().st_mtime_ns
    again = prepare(table, tmp_path / "out", tokenizer)
    assert (again.reused, first.reused) == (True, False)
    assert (again.directory / "table.parquet").stat().st_mtime_ns == stamp
    seeded = prepare(table, tmp_path / "out", tokenizer, PrepareOptions(seed=7))
    assert not seeded.reused
    assert seeded.fingerprint != first.fingerprint
    write_csv(table, questions(61))
    assert len(prepare(table, tmp_path / "out", tokenizer, PrepareOptions(seed=7))) == 61


def test_another_tokenizer_is_added_to_the_folder(tmp_path: Path, tokenizer: Tokenizer, vocabulary: Path) -> None:
    table = write_csv(tmp_path / "t.csv", questions(60))
    prepare(table, tmp_path / "out", tokenizer)
    (vocabulary / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased = Tokenizer.load(vocabulary)
    data = prepare(table, tmp_path / "out", cased)
    assert data.reused
    assert len(folders_and_files(data.directory / "tokens")) == 2
    texts = data.texts(range(60))
    assert data.tokens(cased).ids.tolist() == cased.encode(texts)[0].tolist()
    assert data.tokens(tokenizer).ids.tolist() == tokenizer.encode(texts)[0].tolist()


def test_of_two_that_need_the_same_tokens_one_makes_them_and_the_other_waits(
    tmp_path: Path, tokenizer: Tokenizer, vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = prepare(write_csv(tmp_path / "t.csv", questions(30)), tmp_path / "out", tokenizer)
    (vocabulary / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    other, make, made = Tokenizer.load(vocabulary), PreparedData._tokenize, []

    def slowly(found: PreparedData, *arguments: Any) -> None:
        made.append(arguments)
        time.sleep(0.2)
        make(found, *arguments)

    monkeypatch.setattr(PreparedData, "_tokenize", slowly)
    with ThreadPoolExecutor(2) as threads:
        stores = list(threads.map(lambda _: data.tokens(other), range(2)))
    assert [len(store) for store in stores] == [30, 30]
    assert len(made) == 1


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path, tokenizer: Tokenizer) -> None:
    table = write_csv(tmp_path / "t.csv", questions(60))
    thesis = tmp_path / "out" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(ArtifactError, match="not empty"):
        prepare(table, tmp_path / "out", tokenizer)
    write_manifest(tmp_path / "out", "run")
    with pytest.raises(ArtifactError, match="kind 'run'"):
        prepare(table, tmp_path / "out", tokenizer)
    assert thesis.read_text() == "years of work"


@pytest.mark.parametrize(
    ("frame", "options", "error", "message"),
    [
        (questions(60).drop(columns="Title"), {}, DataError, "the table has no column Title"),
        (questions(60).iloc[:0], {}, DataError, "only a header"),
        (questions(60).assign(Title=""), {}, DataError, "no row of the table is good: missing Title: 60 rows"),
        (questions(60).assign(OpenStatus="open"), {}, DataError, "all 60 good rows have the label 'open'"),
        (questions(4), {}, DataError, "too few .* 10 different texts are needed"),
        (questions(60).assign(hour="1", tags="x"), {}, DataError, "columns of the names hour, tags; rename those"),
        (questions(60), {"splits": ("month",)}, UsageError, "unknown split 'month'"),
        (questions(60), {"text_columns": ("Title",)}, UsageError, "--label-column"),
        (
            questions(60),
            {"splits": ("time",), "text_columns": ("Title",), "label_column": "OpenStatus"},
            UsageError,
            "--date-column",
        ),
        (
            pd.DataFrame({"a": map(str, range(2000)), "b": map(str, range(2000))}),
            {"text_columns": ("a",), "label_column": "b"},
            DataError,
            "more than 1,000 different values",
        ),
        (
            pd.DataFrame({"a": map(str, range(300)), "b": [f"id {i}" for i in range(300)]}),
            {"text_columns": ("a",), "label_column": "b"},
            DataError,
            "column b holds 300 different values in 300 rows, so it is no column of classes",
        ),
    ],
)
def test_a_failed_prepare_leaves_nothing(
    tmp_path: Path, tokenizer: Tokenizer, frame: pd.DataFrame, options: dict[str, object], error: type, message: str
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    table = write_csv(folder / "t.csv", frame)
    with pytest.raises(error, match=message) as caught:
        prepare(table, folder / "out", tokenizer, PrepareOptions(**options))
    assert "\n" not in str(caught.value)
    assert folders_and_files(folder) == {"t.csv"}


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_nothing_half_written(tmp_path: Path, vocabulary: Path, sent: signal.Signals) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    table = folder / "t.parquet"
    pd.concat([questions(5000)] * 40).to_parquet(table)
    (vocabulary / "config.json").touch()  # which makes it a model's folder
    command = [sys.executable, "-m", "bertforge", "prepare", str(table), "--out", str(folder / "out")]
    command += ["--model", str(vocabulary)]

    def listen() -> None:  # a shell's background job ignores SIGINT, and so do its children unless told otherwise
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=dict(os.environ), preexec_fn=listen) as process:
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size > 10_000 for path in folder.glob(".out*/tokens/*/ids.npy")):
            assert process.poll() is None, "it was done before it could be interrupted"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(sent)
        assert process.wait(60) == 130
    assert folders_and_files(folder) == {"t.parquet"}


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name in (".out.partial", ".outer.partial"):
        (tmp_path / "there" / name / "tokens").mkdir(parents=True)
    prepare(write_csv(tmp_path / "t.csv", questions(60)), tmp_path / "there" / "out", tokenizer)
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"out", ".outer.partial"}


def test_a_damaged_folder_is_noticed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = prepare(write_csv(tmp_path / "t.csv", questions(60)), tmp_path / "out", tokenizer)
    labels = data.directory / "labels.npy"
    labels.write_bytes(labels.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match=r"labels.npy is damaged.*bertforge prepare TABLE --out"):
        PreparedData.open(data.directory)
    labels.unlink()
    with pytest.raises(ArtifactError, match=r"labels.npy is missing"):
        PreparedData.open(data.directory)
    with pytest.raises(ArtifactError, match="bertforge prepare"):
        PreparedData.open(tmp_path / "nowhere")


OWN = PrepareOptions(text_columns=("text",), label_column="y")


def own_table(rows: range) -> pd.DataFrame:
    return pd.DataFrame({"text": [f"text {i}" for i in rows], "y": ["ab"[i % 2] for i in rows], "more": "x"})


def texts_of(data: PreparedData, split: str, part: str) -> list[str]:
    return data.texts(data.rows(split, part))


def test_files_of_validation_and_test_rows_are_those_parts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    frames = {
        "train": own_table(range(100)),
        "validation": own_table(range(98, 120)),
        "test": own_table(range(115, 150)),
    }
    frames["test"] = frames["test"][["more", "y", "text"]].assign(extra="z")
    frames["test"].loc[3, "text"] = " "
    paths = {name: write_csv(tmp_path / f"{name}.csv", frame) for name, frame in frames.items()}
    both = {"validation": paths["validation"], "test": paths["test"]}
    data = prepare(paths["train"], tmp_path / "out", tokenizer, OWN, **both)
    assert list(data.manifest["splits"]) == ["given"]
    assert data.split_name() == "given"
    assert texts_of(data, "given", "train") == [f"text {i}" for i in range(98)]
    assert texts_of(data, "given", "validation") == [f"text {i}" for i in range(98, 120) if i < 115 or i == 118]
    assert texts_of(data, "given", "test") == [f"text {i}" for i in range(115, 150) if i != 118]
    assert data.manifest["given"] == {"repeated": {"train": 2, "validation": 4, "test": 0}, "drawn": []}
    assert data.manifest["set_aside"] == {"missing text (text) in test.csv": {"rows": 1, "lines": [5]}}
    assert json.loads((data.directory / "set_aside.jsonl").read_text())["file"] == "test.csv"
    assert prepare(paths["train"], tmp_path / "out", tokenizer, OWN, **both).reused
    assert not prepare(paths["train"], tmp_path / "out", tokenizer, OWN, test=paths["test"]).reused
    lacks = write_csv(tmp_path / "lacks.csv", own_table(range(10)).drop(columns="more"))
    with pytest.raises(DataError, match=r"lacks.csv has no column more, which the table of train rows has"):
        prepare(paths["train"], tmp_path / "other", tokenizer, OWN, test=lacks)


def test_a_column_can_say_the_split(tmp_path: Path, tokenizer: Tokenizer) -> None:
    frame = own_table(range(90)).assign(part=["Train", "dev", "TEST"] * 30)
    options = replace(OWN, split_column="part", splits=("random",))
    data = prepare(write_csv(tmp_path / "t.csv", frame), tmp_path / "out", tokenizer, options)
    assert list(data.manifest["splits"]) == ["given", "random"]
    assert data.split().tolist() == [0, 1, 2] * 30
    with pytest.raises(UsageError, match="both give a split"):
        prepare(tmp_path / "t.csv", tmp_path / "x", tokenizer, options, test=tmp_path / "t.csv")
    frame.loc[4, "part"] = "holdout"
    with pytest.raises(DataError, match="split column part holds 'holdout'; it may hold train, validation"):
        prepare(write_csv(tmp_path / "t.csv", frame), tmp_path / "x", tokenizer, options)
    with pytest.raises(DataError, match="the table has no column prt; did you mean part"):
        prepare(tmp_path / "t.csv", tmp_path / "x", tokenizer, replace(options, split_column="prt"))


def test_folds_are_splits_besides_the_others(tmp_path: Path, tokenizer: Tokenizer) -> None:
    table = write_csv(tmp_path / "t.csv", own_table(range(100)))
    data = prepare(table, tmp_path / "out", tokenizer, replace(OWN, folds=5))
    assert list(data.manifest["splits"]) == ["random", *(f"fold-{i}" for i in range(1, 6))]
    assert data.split_name() == "random"
    tested = np.concatenate([data.rows(f"fold-{i}", "test") for i in range(1, 6)])
    assert sorted(tested.tolist()) == list(range(100))
    with pytest.raises(UsageError, match=r"no split 'fold-6', but random, .*; prepare with --folds for others"):
        data.split("fold-6")
    lonely = write_csv(
        tmp_path / "t.csv", pd.concat([own_table(range(100)), own_table(range(1)).assign(y="c", text="one")])
    )
    with pytest.raises(
        DataError, match="label 'c' has no two different texts, so one of the 5 folds could not learn it"
    ):
        prepare(lonely, tmp_path / "x", tokenizer, replace(OWN, folds=5))
    with pytest.raises(UsageError, match="--folds 1 cannot be"):
        replace(OWN, folds=1)


@pytest.mark.parametrize(
    ("test", "options", "message"),
    [
        (range(50), {}, "leaves no row to train on: each of its 50 train rows repeats a text of a later part"),
        (range(100, 120), {"label": "c"}, "has no train row of label 'c', but 20 other rows of it; add train rows"),
    ],
)
def test_test_rows_that_leave_nothing_to_learn_are_told(
    tmp_path: Path, tokenizer: Tokenizer, test: range, options: dict[str, str], message: str
) -> None:
    def table(name: str, rows: range, label: str = "") -> Path:
        frame = pd.DataFrame(
            {"text": [f"text {row}" for row in rows], "label": [label or "ab"[row % 2] for row in rows]}
        )
        return write_csv(tmp_path / f"{name}.csv", frame)

    columns = PrepareOptions(text_columns=("text",), label_column="label")
    train = table("train", range(50))
    with pytest.raises(DataError, match=message):
        prepare(train, tmp_path / "out", tokenizer, columns, test=table("test", test, **options))
    assert not (tmp_path / "out").exists()
    prepare(train, tmp_path / "out", tokenizer, columns, test=table("test", range(100, 120)))


def test_a_split_column_without_train_rows_is_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    table = write_csv(tmp_path / "t.csv", questions(40).assign(part=["validation", "test"] * 20))
    with pytest.raises(DataError, match="leaves no row to train on: it names none"):
        prepare(table, tmp_path / "out", tokenizer, PrepareOptions(split_column="part"))


def test_more_folds_than_texts_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    table = write_csv(tmp_path / "t.csv", questions(40))
    with pytest.raises(DataError, match="--folds 41 is more than the 40 different texts"):
        prepare(table, tmp_path / "out", tokenizer, PrepareOptions(folds=41))

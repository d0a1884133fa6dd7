"""A saved run computes what the trained model computed, or is refused."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from bertforge.data.prepare import PrepareOptions
from bertforge.data.prepared import PreparedData
from bertforge.determinism import seed_everything
from bertforge.errors import ArtifactError, DataError, UsageError
from bertforge.evaluation.logits import predict_logits
from bertforge.inference.predict import predict_table
from bertforge.inference.predictor import Predictor
from bertforge.training.finetune import assemble, finetune
from bertforge.training.loop import Trainer
from tests.runs import KINDS, WEIGHTS, made_up, make_base, prepare_frame, quick_recipe, reseal


@pytest.fixture
def copied(tmp_path, runs):
    """A run of the kind asked for, to be changed."""

    def copy(kind):
        shutil.copytree(runs[kind], tmp_path / kind)
        return tmp_path / kind

    return copy


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_run_is_the_model_that_was_trained(tmp_path, data, base, runs, kind):
    prepared, recipe = PreparedData.open(data), quick_recipe(base, kind)
    seed_everything(recipe.seed)  # as `finetune` does, which keeps the model to itself
    run = assemble(prepared, recipe, torch.device("cpu"))
    Trainer(run.model, run.split, recipe, tmp_path, "fp32").fit(lambda progress, sequences, loss: None)
    rows = prepared.rows("random", "test")
    trained = predict_logits(run.model, run.split.examples, rows, "fp32")
    predictor = Predictor.load(runs[kind], "fp32")
    columns = None if kind != "columns" else prepared.columns(predictor.transform.spec.columns).iloc[rows]
    loaded = predictor.logits(prepared.texts(rows), columns)
    np.testing.assert_allclose(loaded, trained, atol=1e-5)
    assert np.abs(trained).max() > 0.01
    assert not predictor.engine.model.training


def test_predictions_are_labels_with_their_probabilities(data, runs):
    predictor, prepared = Predictor.load(runs["full"], "fp32"), PreparedData.open(data)
    texts = prepared.texts(np.arange(20))
    found = predictor.predict(texts)
    assert list(found.columns) == ["label", "probability", "p_open", "p_closed"]
    both = found[["p_open", "p_closed"]].to_numpy()
    assert both.sum(axis=1) == pytest.approx(np.ones(20))
    assert found["probability"].tolist() == both.max(axis=1).tolist()
    assert found["label"].tolist() == [("open", "closed")[index] for index in both.argmax(axis=1)]
    expected = (torch.from_numpy(predictor.logits(texts)) / predictor.temperature).softmax(1).numpy()
    np.testing.assert_allclose(both, expected, rtol=1e-6)  # another library's exponential


def test_the_temperature_moves_probabilities_and_no_label(data, copied):
    folder, texts = copied("full"), PreparedData.open(data).texts(np.arange(40))

    def predict(**changes):
        reseal(folder, **changes)
        return Predictor.load(folder, "fp32").predict(texts)

    cold, hot = predict(temperature=0.5), predict(temperature=5.0)
    assert cold["label"].tolist() == hot["label"].tolist()
    assert (cold["probability"] > hot["probability"] + 1e-3).all()
    assert predict(temperature=None).equals(predict(temperature=1.0))


def test_many_texts_are_tokenized_in_parts_that_double(data, runs, monkeypatch):
    predictor, prepared = Predictor.load(runs["columns"], "fp32"), PreparedData.open(data)
    rows, told = np.arange(40), []
    texts, columns = prepared.texts(rows), prepared.columns(predictor.transform.spec.columns).iloc[rows]
    whole = predictor.logits(texts, columns)
    monkeypatch.setattr("bertforge.inference.predictor._FIRST_ROWS", 3)
    monkeypatch.setattr("bertforge.inference.predictor._MOST_ROWS", 8)
    parts = predictor.logits(texts, columns, told.append)
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    assert told == [3, 6, 8, 8, 8, 7]
    assert np.abs(parts - np.roll(whole, 1, axis=0)).max() > 1e-3


def test_a_texts_prediction_does_not_hang_on_its_company(runs):
    predictor = Predictor.load(runs["full"], "fp32")
    texts = ["How do I sort a list?", "why " * 40, "x", "", "Which editor is best?"]
    together = predictor.logits(texts)
    alone = np.concatenate([predictor.logits([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(predictor.logits(texts[::-1])[::-1], together, atol=1e-5)
    assert np.abs(np.diff(together, axis=0)).max() > 1e-3
    assert predictor.logits([]).shape == (0, 2)
    assert len(predictor.predict([])) == 0


def test_columns_are_asked_for_by_name(runs):
    predictor = Predictor.load(runs["columns"])
    with pytest.raises(DataError, match=r"reads columns beside the text: account_age_days, reputation, .*tags"):
        predictor.predict(["How do I sort a list?"])


def test_one_text_and_columns_of_another_length_are_refused(data, runs):
    predictor = Predictor.load(runs["columns"])
    columns = PreparedData.open(data).columns(predictor.transform.spec.columns)
    with pytest.raises(UsageError, match=r"takes a list of texts, not one text; write predict\(\[text\]\)"):
        predictor.predict("Why?", columns)
    with pytest.raises(UsageError, match="2 texts, but columns of 160 rows; pass one row a text"):
        predictor.predict(["Why?", "How?"], columns)


def test_examples_of_some_rows_are_those_of_all(data, runs):
    predictor, prepared = Predictor.load(runs["columns"], "fp32"), PreparedData.open(data)
    everything = predictor.examples(prepared, np.arange(len(prepared)))
    rows = np.array([70, 3, 159])
    (some, labels), (same, _) = (examples.pack(rows) for examples in (predictor.examples(prepared, rows), everything))
    assert torch.equal(some.input_ids, same.input_ids)
    assert labels.tolist() == prepared.labels[rows].tolist()
    assert torch.equal(some.tabular["numeric"], same.tabular["numeric"])
    assert torch.equal(some.tabular["categorical"], same.tabular["categorical"])
    values = some.tabular["multi"].shape[1]  # as many as these rows need
    assert torch.equal(some.tabular["multi"], same.tabular["multi"][:, :values])
    assert not same.tabular["multi"][:, values:].any()
    assert some.tabular["numeric"].abs().nansum() > 0
    assert Predictor.load(runs["full"]).examples(prepared, rows).tabular is None


# ------------------------------------------------------------------------------------------ golden rows


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_weight_file_is_refused(copied, kind):
    run = copied(kind)
    path = run / WEIGHTS[kind]
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("classifier.weight"))
    tensors[name][0] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=f"{WEIGHTS[kind]} is damaged"):
        Predictor.load(run)
    reseal(run)
    with pytest.raises(ArtifactError, match=r"does not compute what it did .*: logits differ by") as error:
        Predictor.load(run)
    assert "\n" not in str(error.value)


def test_a_weight_that_is_no_number_is_refused(copied):
    run = copied("full")
    tensors = load_file(run / "model.safetensors")
    tensors["classifier.bias"][0] = float("nan")
    save_file(tensors, run / "model.safetensors", metadata={"format": "pt"})
    reseal(run)
    with pytest.raises(ArtifactError, match="logits differ by nan"):
        Predictor.load(run)


# ------------------------------------------------------------------------------------------ damage


def test_an_adapter_on_another_base_is_refused(tmp_path, data):
    base = make_base(tmp_path / "base")
    finetune(data, tmp_path / "run", quick_recipe(base, "lora", epochs=1))
    Predictor.load(tmp_path / "run")
    make_base(base, seed=1)  # another model under the same name
    with pytest.raises(ArtifactError, match=r"was trained on .*/base with weights sha256:.* but .* holds sha256:"):
        Predictor.load(tmp_path / "run")
    shutil.rmtree(base)
    with pytest.raises(ArtifactError, match=r"model folder .*/base does not exist"):
        Predictor.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("full", "bertforge.json", r"holds no bertforge\.json; it should be a folder made by `bertforge train"),
        ("full", "model.safetensors", r"model\.safetensors is missing; make it again"),
        ("full", "config.json", r"config\.json is missing; make it again"),
        ("full", "tokenizer.json", r"tokenizer\.json is missing; make it again"),
        ("lora", "adapter_model.safetensors", r"adapter_model\.safetensors is missing; make it again"),
    ],
)
def test_a_missing_file_is_named(copied, kind, name, said):
    run = copied(kind)
    (run / name).unlink()
    with pytest.raises(ArtifactError, match=said):
        Predictor.load(run)


def test_prepared_data_is_no_run(data):
    with pytest.raises(
        ArtifactError, match="is of kind 'data', but run or model or quantized or engine or fit is needed"
    ):
        Predictor.load(data)


# ------------------------------------------------------------------------------------------ what is given


def test_a_frame_is_read_as_bertforge_predict_reads_the_table(tmp_path, runs):
    frame = made_up(30, seed=3).assign(more=[object()] * 30)  # what the model does not read may be anything
    frame["ReputationAtPostCreation"] = pd.to_numeric(frame["ReputationAtPostCreation"]).astype("Int64")
    frame["Tag2"] = frame["Tag2"].replace("", None)
    frame.index = pd.Index([f"q{row // 2}" for row in range(30)], name="question")  # each twice
    frame.drop(columns="more").to_csv(tmp_path / "t.csv", index=False)
    for kind in ("columns", "full"):
        predictor = Predictor.load(runs[kind], "fp32")
        predict_table(predictor, tmp_path / "t.csv", tmp_path / "p.parquet")
        expected = pd.read_parquet(tmp_path / "p.parquet").drop(columns=["line", "problem"])
        found = predictor.predict(frame)
        assert found.index.equals(frame.index)
        pd.testing.assert_frame_equal(found.reset_index(drop=True), expected, check_dtype=False, atol=1e-6)
        assert expected["probability"].nunique() > 20
    mixed = predictor.predict_proba(frame.iloc[::-1]).iloc[::-1]
    pd.testing.assert_frame_equal(mixed, predictor.predict_proba(frame), atol=1e-5)


def test_a_frame_of_another_table_is_read_by_the_names_given_to_prepare(tmp_path, base):
    rows = made_up(160)
    table = pd.DataFrame({"head": rows["Title"], "rest": rows["BodyMarkdown"], "kind": rows["OpenStatus"] == "open"})
    table["count"] = pd.Series(range(160)).astype("float").where(rows.index % 7 > 0)
    table["size"] = rows.index % 3
    options = PrepareOptions(text_columns=("head", "rest"), label_column="kind")
    data = prepare_frame(table, tmp_path / "data", base, options)
    tabular = {"numeric": ["count"], "categorical": ["size"], "hidden_size": 8}
    finetune(data, tmp_path / "run", quick_recipe(base, epochs=1, tabular=tabular))
    predictor, prepared = Predictor.load(tmp_path / "run", "fp32"), PreparedData.open(data)
    columns = prepared.columns(["count", "size"])
    expected = predictor.predict(prepared.texts(np.arange(160)), columns)
    pd.testing.assert_frame_equal(predictor.predict(table.drop(columns="kind")), expected, atol=1e-6)
    with_gaps = table.assign(size=table["size"].where(rows.index > 1))  # 1 becomes 1.0 in a column with gaps
    pd.testing.assert_frame_equal(predictor.predict(with_gaps).iloc[2:], expected.iloc[2:], atol=1e-6)
    with pytest.raises(DataError, match=r"the table has no column size, .*it has head, rest, kind, count"):
        predictor.predict(table.drop(columns="size"))
    with pytest.raises(DataError, match=r"the table has no column rest, .*it has head, kind, count, size"):
        predictor.predict(table.drop(columns="rest"))


def test_a_series_keeps_its_index_and_a_list_has_none(runs):
    predictor = Predictor.load(runs["full"], "fp32")
    texts = ["How do I sort a list?", "Which laptop is best?"]
    plain = predictor.predict(texts)
    assert plain.index.tolist() == [0, 1]
    series = predictor.predict(pd.Series(texts, index=["b", "b"]))
    assert series.index.tolist() == ["b", "b"]
    pd.testing.assert_frame_equal(series.reset_index(drop=True), plain)
    for other in (tuple(texts), np.array(texts), (text for text in texts), pd.Series(texts, dtype="category")):
        pd.testing.assert_frame_equal(predictor.predict(other), plain)


def test_labels_that_are_whole_numbers_stay_so_beside_a_row_without_text(tmp_path, base):
    rows = made_up(80)
    table = pd.DataFrame({"text": rows["Title"], "stars": (rows["OpenStatus"] == "open").astype(int)})
    data = prepare_frame(table, tmp_path / "data", base, PrepareOptions(text_columns=("text",), label_column="stars"))
    finetune(data, tmp_path / "run", quick_recipe(base, epochs=1))
    predictor = Predictor.load(tmp_path / "run", "fp32")
    texts = pd.Series(["How do I sort a list?", "", "Which laptop is best?"], index=["a", "a", "b"])
    found = predictor.predict(texts)["label"]
    assert [type(label) for label in found] == [int, type(None), int]
    assert set(found.iloc[[0, 2]]) <= {0, 1}
    whole = predictor.predict(texts.iloc[[0, 2]])["label"]
    assert whole.dtype == np.int64
    assert whole.tolist() == found.iloc[[0, 2]].tolist()


def test_probabilities_are_a_column_a_label(runs):
    predictor = Predictor.load(runs["full"], "fp32")
    texts = pd.Series(["How do I sort a list?", "", "why " * 40], index=[7, 8, 9])
    chances, found = predictor.predict_proba(texts), predictor.predict(texts)
    assert list(chances.columns) == list(predictor.label_names)
    assert chances.index.tolist() == found.index.tolist() == [7, 8, 9]
    assert np.array_equal(chances, found[["p_open", "p_closed"]], equal_nan=True)
    assert chances.loc[[7, 9]].sum(axis=1).to_numpy() == pytest.approx(np.ones(2))


def test_a_row_without_text_has_no_label_however_it_is_passed(tmp_path, runs):
    predictor = Predictor.load(runs["full"], "fp32")
    texts = ["How do I sort a list?", "", " \n", "Which laptop is best?"]
    frame = pd.DataFrame({"Title": texts, "BodyMarkdown": ["", None, float("nan"), pd.NA]})
    given = [texts, pd.Series(["How do I sort a list?", None, float("nan"), "Which laptop is best?"]), frame]
    for rows in given:
        found = predictor.predict(rows)
        assert found["label"].isna().tolist() == [False, True, True, False]
        assert found.loc[1:2, ["probability", "p_open", "p_closed"]].isna().all(axis=None)
        assert found.loc[[0, 3], "probability"].between(0.5, 1).all()
    assert predictor.predict(["", " "])["label"].isna().all()
    for nothing in ([], pd.Series([], dtype=object), frame.iloc[:0]):
        assert predictor.predict(nothing).shape == (0, 4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"Title": ["a"]}, r"not a dict; write predict\(pd\.DataFrame\(\[row\]\)\)"),
        ({"a", "b"}, r"takes a list of texts, .*, not set; write predict\(\[text, \.\.\.\]\)"),
        (b"How?", r"not bytes; write predict\(\[text, "),
        (None, "not NoneType; write"),
        (7, "not int; write"),
    ],
)
def test_what_holds_no_rows_is_refused(runs, given, said):
    with pytest.raises(UsageError, match=said):
        Predictor.load(runs["full"], "fp32").predict(given)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, 'row 1 is None, not a text; pass "" for a row without text'),
        (float("nan"), 'row 1 is nan, not a text; pass "" for a row without text'),
        (pd.NA, 'row 1 is <NA>, not a text; pass "" for a row without text'),
        (b"How?", r"row 1 is b'How\?' \(bytes\), not a text; decode it: value\.decode\(\)"),
        (3.5, r"row 1 is 3\.5 \(float\), not a text; pass texts, such as str\(value\)"),
        ({"Title": "a"}, r"row 1 is \{'Title': 'a'\} \(dict\), not a text; pass .*: predict\(pd\.DataFrame\(rows\)\)"),
        (["a", "b"], r"row 1 is \['a', 'b'\] \(list\), not a text"),
        ("a\ud800", r"row 1 holds half a character, '\\ud800'; replace such halves: text\.encode"),
    ],
)
def test_a_row_that_is_no_text_is_named(runs, value, said):
    predictor = Predictor.load(runs["full"], "fp32")
    with pytest.raises(DataError, match=said) as error:
        predictor.predict(["How?", value])
    assert "\n" not in str(error.value)
    if not (value is None or value is pd.NA or value != value):  # missing values are blank in pandas
        for rows in (
            pd.Series(["How?", value], dtype=object),
            pd.DataFrame({"Title": "t", "BodyMarkdown": ["", value]}, dtype=object),
        ):
            with pytest.raises(DataError, match=r"row 1 (of column BodyMarkdown )?(is|holds)"):
                predictor.predict(rows)


def test_columns_belong_to_texts_in_the_same_order(data, runs):
    predictor, prepared = Predictor.load(runs["columns"], "fp32"), PreparedData.open(data)
    columns = prepared.columns(predictor.transform.spec.columns).iloc[:5]
    texts = pd.Series(prepared.texts(np.arange(5)))
    expected = predictor.predict(list(texts), columns)
    pd.testing.assert_frame_equal(predictor.predict(texts, columns), expected)
    with pytest.raises(UsageError, match=r"the index of columns= is not that of the texts"):
        predictor.predict(texts, columns.iloc[::-1])
    with pytest.raises(UsageError, match=r"a DataFrame brings its own columns: leave it out"):
        predictor.predict(made_up(5), columns)


def test_a_value_that_cannot_be_read_is_said(runs, caplog):
    frame = made_up(6, seed=3)
    predictor = Predictor.load(runs["columns"], "fp32")
    predictor.predict(frame)
    assert not caplog.messages
    frame.loc[[2, 4], "ReputationAtPostCreation"] = "many"
    assert predictor.predict(frame)["label"].notna().all()
    assert caplog.messages == [
        "2 of 6 rows have a value that cannot be read and counts as missing; the first is row 2: "
        "unparsable number in ReputationAtPostCreation"
    ]


def test_a_column_named_twice_is_refused(runs):
    frame = made_up(3)
    with pytest.raises(DataError, match="two columns named Title; rename one"):
        Predictor.load(runs["full"], "fp32").predict(pd.concat([frame, frame["Title"]], axis=1))

"""A saved run computes what the trained model computed, or is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bertforge.data.prepared import PreparedData
from bertforge.determinism import seed_everything
from bertforge.errors import ArtifactError, DataError, UsageError
from bertforge.evaluation.logits import predict_logits
from bertforge.inference.predictor import Predictor
from bertforge.training.finetune import assemble, finetune
from bertforge.training.loop import Trainer
from tests.runs import KINDS, WEIGHTS, make_base, quick_recipe


@pytest.fixture
def copied(tmp_path, runs):
    """A run of the kind asked for, to be changed."""

    def copy(kind):
        shutil.copytree(runs[kind], tmp_path / kind)
        return tmp_path / kind

    return copy


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_run_is_the_model_that_was_trained(tmp_path, data, base, runs, kind):
    seed_everything(42)  # as `finetune` does, which keeps the model to itself
    prepared, recipe = PreparedData.open(data), quick_recipe(base, kind)
    run = assemble(prepared, recipe, torch.device("cpu"))
    Trainer(run.model, run.split, recipe, tmp_path, "fp32").fit(lambda progress, sequences, loss: None)
    rows = prepared.rows("random", "test")
    trained = predict_logits(run.model, run.split.examples, rows, "fp32")
    predictor = Predictor.load(runs[kind], "fp32")
    columns = None if kind != "columns" else prepared.columns(predictor.transform.spec.columns).iloc[rows]
    loaded = predictor.logits(prepared.texts(rows), columns)
    np.testing.assert_allclose(loaded, trained, atol=1e-5)
    assert np.abs(trained).max() > 0.01
    assert not predictor.backend.model.training


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
    assert np.array_equal(both, expected)


def test_the_temperature_moves_probabilities_and_no_label(data, copied):
    folder, texts = copied("full"), PreparedData.open(data).texts(np.arange(40))
    manifest = json.loads((folder / "bertforge.json").read_text())

    def predict(**changes):
        (folder / "bertforge.json").write_text(json.dumps({**manifest, **changes}))
        return Predictor.load(folder, "fp32").predict(texts)

    cold, hot = predict(temperature=0.5), predict(temperature=5.0)
    assert cold["label"].tolist() == hot["label"].tolist()
    assert (cold["probability"] > hot["probability"] + 1e-3).all()
    del manifest["temperature"]  # a run made before there was one
    assert predict().equals(predict(temperature=1.0))


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
    assert torch.equal(some.tabular.numeric, same.tabular.numeric)
    assert torch.equal(some.tabular.categorical, same.tabular.categorical)
    values = some.tabular.multi.shape[1]  # as many as these rows need
    assert torch.equal(some.tabular.multi, same.tabular.multi[:, :values])
    assert not same.tabular.multi[:, values:].any()
    assert some.tabular.numeric.abs().nansum() > 0
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
    with pytest.raises(ArtifactError, match=r"does not compute what it did .*: logits differ by") as error:
        Predictor.load(run)
    assert "\n" not in str(error.value)


def test_a_weight_that_is_no_number_is_refused(copied):
    run = copied("full")
    tensors = load_file(run / "model.safetensors")
    tensors["classifier.bias"][0] = float("nan")
    save_file(tensors, run / "model.safetensors", metadata={"format": "pt"})
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
        ("full", "model.safetensors", r"holds neither model\.safetensors"),
        ("full", "config.json", r"holds no config\.json"),
        ("full", "tokenizer.json", r"holds neither tokenizer\.json nor vocab\.txt"),
        ("lora", "adapter_model.safetensors", r"adapter_model\.safetensors is missing or damaged"),
    ],
)
def test_a_missing_file_is_named(copied, kind, name, said):
    run = copied(kind)
    (run / name).unlink()
    with pytest.raises(ArtifactError, match=said):
        Predictor.load(run)


def test_prepared_data_is_no_run(data):
    with pytest.raises(ArtifactError, match="is of kind 'data', but run or model or quantized or engine is needed"):
        Predictor.load(data)

"""The columns' branch in a graph: raw numbers and numbered names in, the model's logits out."""

import numpy as np
import onnxruntime as ort
import pytest
import torch

from bertforge.batch import PaddedBatch
from bertforge.columns.encoder import TabularConfig
from bertforge.engines import openvino
from bertforge.export.bert_onnx import export_onnx
from bertforge.export.graph import input_names
from bertforge.hardware import detect
from tests.engines.building import built
from tests.export.test_bert_onnx import SMALL, inferred_types
from tests.model.tiny import tiny_bert

NAN = float("nan")
KINDS = {
    "all kinds": TabularConfig.of(
        numeric=3, log=(2,), indicators=(0, 2), categorical=(4, 6), multi=7, bins=5, embedding_size=4, hidden_size=8
    ),
    "no bins": TabularConfig.of(numeric=3, log=(2,), indicators=(1,), categorical=(4, 6), hidden_size=8),
    "joined directly": TabularConfig.of(numeric=3, log=(2,), indicators=(0, 1, 2)),
    "no logs, no indicators": TabularConfig.of(numeric=3, bins=5, hidden_size=8),
    "names": TabularConfig.of(numeric=0, categorical=(4, 6), hidden_size=8),
    "several names": TabularConfig.of(numeric=0, multi=7, hidden_size=8),
}
RAW = [[2011.0, 1, -3e5], [2012, NAN, 0], [NAN, NAN, NAN], [2010, 5, 1e6], [2011, 1, 12], [2009.5, -2, NAN]]
CATEGORICAL = [[0, 0], [1, 5], [3, 1], [0, 2], [2, 0], [3, 4]]  # 0 is missing or was never seen
MULTI = [[1, 2, 3], [4, 0, 0], [0, 0, 0], [6, 6, 1], [5, 1, 0], [2, 0, 0]]


def taught(config):
    """A tiny model with columns, as training leaves it: quantiles that coincide with many values among its edges."""
    model, numbers = tiny_bert(tabular=config, **SMALL), config.kinds["numeric"]
    edges = np.sort(np.random.default_rng(0).normal(size=(numbers.inputs, numbers.bins + 1)), axis=1)
    mean, std = [2010.2, 1.5, 4.0][: numbers.numeric], [0.9, 2.5, 3.0][: numbers.numeric]
    learnt = {"scaler.mean": mean, "scaler.std": std}
    if numbers.bins:
        edges[0, :3] = (np.float32(2011) - np.float32(mean[0])) / np.float32(std[0])
        learnt["numeric.edges"] = edges.tolist()
    model.tabular.learn(learnt)
    with torch.no_grad():
        for parameter in model.tabular.parameters():
            parameter.mul_(3)  # so that columns weigh as much as the text
    return model


def batch(config, rows=range(6), multi=MULTI):
    """Every row has the same text, so only columns tell the logits apart."""
    rows = list(rows)
    tabular = {
        "numeric": torch.tensor(RAW)[rows, : config.kinds["numeric"].numeric],
        "categorical": torch.tensor(CATEGORICAL)[rows],
        "multi": torch.tensor(multi)[rows],
    }
    ids = torch.tensor([[7, 30, 55, 3]] * len(rows))
    return PaddedBatch(ids, torch.ones_like(ids), tabular=tabular)


def logits_of(path, given):
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    arrays = {**vars(given), **given.tabular}
    return session.run(None, {value.name: arrays[value.name].numpy() for value in session.get_inputs()})[0]


@torch.no_grad()
def expected(model, given):
    return model(given).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_computes_what_the_model_computes(tmp_path, kind):
    config = KINDS[kind]
    model, given = taught(config), batch(config)
    path = export_onnx(model, tmp_path / "m.onnx")
    found = logits_of(path, given)
    np.testing.assert_allclose(found, expected(model, given), atol=2e-5)
    assert len(np.unique(found.round(4), axis=0)) >= 5, "rows differ by their columns alone"
    np.testing.assert_allclose(logits_of(path, batch(config, [3])), found[3:4], atol=1e-5)
    for buffer in (model.tabular.scaler.mean, *model.tabular.parameters()):
        buffer.data += 0.1
    assert np.abs(found - expected(model, given)).max() > 1e-2


def test_a_graph_has_the_inputs_its_model_reads(tmp_path):
    columns = {
        kind: input_names(export_onnx(taught(config), tmp_path / "m.onnx"))[2:] for kind, config in KINDS.items()
    }
    assert columns == {
        "all kinds": ["numeric", "categorical", "multi"],
        "no bins": ["numeric", "categorical"],
        "joined directly": ["numeric"],
        "no logs, no indicators": ["numeric"],
        "names": ["categorical"],
        "several names": ["multi"],
    }


@pytest.mark.parametrize("values", [[[3]], [[0, 0, 0, 0, 0, 2]]])
def test_any_number_of_values(tmp_path, values):
    config = KINDS["all kinds"]
    model, given = taught(config), batch(config, [0], multi=values)
    path = export_onnx(model, tmp_path / "m.onnx")
    np.testing.assert_allclose(logits_of(path, given), expected(model, given), atol=2e-5)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_columns_stay_float32_beside_a_text_in_less(tmp_path, precision):
    config = KINDS["all kinds"]
    model, given = taught(config), batch(config)
    path = export_onnx(model, tmp_path / "m.onnx", precision=precision)
    types = inferred_types(path)
    assert types["MatMul"]["FLOAT"] == 2 + 3, "the head's two, the bins' and two that mix"
    assert set(types["Log"]) == set(types["Min"]) == set(types["ReduceSum"]) == {"FLOAT"}
    if precision == "fp16":  # which ONNX Runtime runs on a CPU
        np.testing.assert_allclose(logits_of(path, given), expected(model, given), atol=2e-2)


@pytest.mark.parametrize("kind", ["all kinds", "no logs, no indicators"])
def test_openvino_computes_raw_numbers_in_float32_whatever_its_precision(tmp_path, kind, monkeypatch):
    model, given = taught(KINDS[kind]), batch(KINDS[kind])
    wanted = expected(model, given)
    spread = np.ptp(wanted, axis=0).max()

    def off(precision):
        return np.abs(built("openvino", model, tmp_path, precision).logits(given) - wanted).max() / spread

    assert off("fp32") < 2e-5
    assert off("bf16") < 0.01
    if detect().bf16:
        monkeypatch.setattr(openvino, "_mark_precise", lambda path: None)
        assert off("bf16") > 0.05, "rounded to bfloat16, a year that stands on an edge is beyond it"

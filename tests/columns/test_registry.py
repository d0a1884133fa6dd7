"""A new kind of column is one file and a line in the registry: this test is that file, and adds that line."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import onnxruntime as ort
import pandas as pd
import pytest
import torch
from torch import nn

from bertforge.columns.kind import Kind
from bertforge.columns.parts import Part, as_array
from bertforge.columns.registry import KINDS
from bertforge.data.prepared import PreparedData
from bertforge.errors import UsageError
from bertforge.export.bert_onnx import export_onnx
from bertforge.inference.predictor import Predictor
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.model.config import BertConfig
from bertforge.training.finetune import finetune
from tests.runs import made_up, quick_recipe, run_command

POSTED = "PostCreationDate"


@dataclass(frozen=True)
class DateSettings:
    """Of the `[tabular]` section."""

    date: tuple[str, ...] = ()
    """Columns of dates."""


@dataclass(frozen=True)
class DateLearnt:
    """Of the train rows."""

    first_day: tuple[float, ...] = ()


@dataclass(frozen=True)
class DateShape:
    """Of the layer."""

    date: int = 0


class Date(Kind[DateSettings, DateLearnt, DateShape]):
    """Years since the first train row, `[rows, columns]` float32, NaN where there is no date."""

    name, dtype, holds = "date", np.float32, "name"
    Settings, Learnt, Shape = DateSettings, DateLearnt, DateShape

    def fit(self, train, settings, min_count):
        return DateLearnt(tuple(float(np.nanmin(days(train[name]))) for name in settings.date))

    def encode(self, frame, settings, learnt):
        found = [days(frame[name]) - first for name, first in zip(settings.date, learnt.first_day, strict=True)]
        return (np.stack(found, axis=1) / 365).astype(self.dtype) if found else np.empty((len(frame), 0), self.dtype)

    def shape(self, settings, learnt):
        return DateShape(len(settings.date))

    def width(self, shape):
        return shape.date

    def modules(self, shape, embedding_size):
        return {"date": Years(shape.date, embedding_size)} if shape.date else {}

    def buffers(self, learnt):
        return {"date.first_day": learnt.first_day} if learnt.first_day else {}


class Years(Part):
    """A linear layer of the years, 0 where there is none."""

    def __init__(self, columns, embedding_size):
        super().__init__()
        self.out_features = embedding_size
        self.register_buffer("first_day", torch.zeros(columns))
        self.linear = nn.Linear(columns, embedding_size)

    def forward(self, value):
        return self.linear(value.nan_to_num())

    def onnx(self, graph, value):
        zero = graph.constant("zero", np.array(0, np.float32))
        years = graph.add("Where", graph.add("IsNaN", value), zero, value)
        return graph.dense(years, "tabular.date", as_array(self.linear.weight), as_array(self.linear.bias))


def days(column):
    dates = pd.to_datetime(column, format="%m/%d/%Y %H:%M:%S", errors="coerce")
    return (dates - pd.Timestamp("2000-01-01")).dt.total_seconds().to_numpy(np.float64) / 86_400


@pytest.fixture
def _with_dates(monkeypatch):
    monkeypatch.setitem(KINDS, "date", Date())  # the line


def recipe(base):
    columns = {"date": [POSTED], "numeric": ["title_words"], "hidden_size": 4, "embedding_size": 3}
    return quick_recipe(base, tabular=columns, epochs=1, head_lr=0.1)


@pytest.mark.usefixtures("_with_dates")
def test_a_kind_of_ones_own_is_trained_saved_loaded_and_exported(tmp_path, data, base, capsys):
    assert run_command("train", "--set", "list") == 0
    assert "tabular.date" in capsys.readouterr().out

    finetune(data, tmp_path / "run", recipe(base))
    saved = json.loads((tmp_path / "run" / "bertforge.json").read_text())
    assert saved["tabular"]["spec"]["date"] == saved["recipe"]["tabular"]["date"] == [POSTED]
    assert BertConfig.load(tmp_path / "run").to_dict()["bertforge_tabular"]["date"] == 1
    years = np.array(saved["golden"]["tabular"]["date"], np.float64)
    assert years.shape == (16, 1)
    assert years.std() > 0.1

    predictor = Predictor.load(tmp_path / "run", "fp32")  # its golden rows agree, or it would not load
    model = BertForSequenceClassification.from_pretrained(tmp_path / "run")
    assert model.tabular.date.first_day.tolist() == pytest.approx(saved["tabular"]["first_day"])
    table = made_up(160)
    later = table.assign(**{POSTED: "01/01/2030 00:00:00"})
    found, moved = (predictor.predict_proba(frame).to_numpy() for frame in (table, later))
    assert np.abs(found - moved).max() > 1e-3, "the date reaches the answer"

    batch, _ = predictor.examples(PreparedData.open(data), np.arange(8)).pack(np.array([0]))
    graph = ort.InferenceSession(export_onnx(model, tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    for given in (batch.tabular, {**batch.tabular, "date": torch.tensor([[float("nan")]])}):
        ids = batch.input_ids[None]  # [1, seq]
        feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **given}
        feeds = {value.name: feeds[value.name].numpy() for value in graph.get_inputs()}
        assert "date" in feeds
        with torch.no_grad():
            expected = model(replace(batch, tabular=given))
        np.testing.assert_allclose(graph.run(None, feeds)[0], expected.numpy(), atol=1e-5)


@pytest.mark.usefixtures("_with_dates")
def test_a_folder_made_before_the_kind_was_there_is_read_as_without_it(runs):
    predictor = Predictor.load(runs["columns"], "fp32")
    assert predictor.transform.spec.kinds["date"] == DateSettings()
    assert predictor.predict_proba(made_up(4)).notna().all(axis=None)


def test_without_its_line_the_kind_is_unknown(base):
    with pytest.raises(UsageError, match=r"tabular\.date is not a setting"):
        recipe(base)

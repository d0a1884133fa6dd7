"""A new engine is one file: here a toy one is added to the registry, and every command knows it."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bertforge.benchmark.run import run_benchmark
from bertforge.cli.doctor import examine
from bertforge.engines.base import Target
from bertforge.engines.fastest import candidates
from bertforge.engines.pytorch import PyTorchEngine
from bertforge.engines.registry import TARGETS
from bertforge.errors import ArtifactError
from bertforge.hardware import detect
from bertforge.inference.predictor import Predictor
from bertforge.jobs.compile import compile_model
from bertforge.manifest import read_manifest
from bertforge.model.classifier import BertForSequenceClassification

TEXTS = ["How do I sort a list?", "Which laptop is best?"]


class ToyEngine(PyTorchEngine):
    """PyTorch on padded batches."""

    name = "toy"

    def __init__(self, folder, precision, hardware):
        super().__init__(BertForSequenceClassification.from_pretrained(folder), hardware, precision, packed=False)


def build(folder, order, hardware):
    order.say("saving")
    order.model.config.save(folder)
    order.model.save_pretrained(folder)
    return {"colour": "blue"}


TOY = Target(
    name="toy",
    precisions=("fp32",),
    libraries=("torch",),
    extra="toy",
    about="engines to play with",
    build=build,
    open=ToyEngine,
    exact=ToyEngine,
    rest=lambda hardware: "fp32",
)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(TARGETS, "toy", TOY)


def test_it_is_built_proved_served_and_measured(runs, data, tmp_path):
    said = []
    receipt = compile_model(runs["full"], "toy", "fp32", data, tmp_path / "engine", said.append)
    assert receipt["colour"] == "blue"
    assert receipt["structure"]["largest_difference"] < receipt["structure"]["limit"]
    assert "saving" in said
    engine, model = Predictor.load(tmp_path / "engine"), Predictor.load(runs["full"], "fp32")
    np.testing.assert_allclose(engine.logits(TEXTS), model.logits(TEXTS), atol=1e-5)
    assert read_manifest(tmp_path / "engine", "engine")["target"] == "toy"
    assert [each.name for each in candidates(runs["full"], "toy", "auto", detect(), Path("data"))] == ["toy-fp32"]
    assert "toy-fp32" in [each.name for each in candidates(runs["full"], "auto", "auto", detect(), Path("data"))]
    assert "engines to play with: compile --target toy" in [each["for"] for each in examine()["optional"]]


def test_it_is_a_row_of_the_benchmark(runs, data, tmp_path):
    model = shutil.copytree(runs["full"], tmp_path / "model")
    found = run_benchmark(model, data, "toy", split="validation", rows=32, repeats=1, say=lambda text: None)
    assert [row["framework"] for row in found["rows"]] == ["pytorch", "toy"]
    assert found["rows"][1]["accuracy"] == found["rows"][0]["accuracy"]


def test_it_is_held_to_its_model_as_the_others_are(runs, data, tmp_path, monkeypatch):
    def forget(folder, order, hardware):
        model = copy.deepcopy(order.model)
        model.bert.encoder.layer[0].output.dense.weight.data.mul_(0.9)
        return build(folder, replace(order, model=model), hardware)

    monkeypatch.setitem(TARGETS, "toy", replace(TOY, build=forget))
    with pytest.raises(ArtifactError, match="the toy engine in fp32"):
        compile_model(runs["full"], "toy", "fp32", data, tmp_path / "engine")

"""Several adapters on one base: each answers as its merged model, and the base is held once."""

import asyncio
import shutil

import numpy as np
import pytest
import torch

from bertforge.data.prepare import PrepareOptions
from bertforge.engines.pytorch import PyTorchEngine
from bertforge.errors import ArtifactError, UsageError
from bertforge.inference.predictor import Predictor
from bertforge.jobs.merge import merge_run
from bertforge.serving.adapters import carriers, load_beside
from bertforge.training.finetune import finetune
from tests.runs import made_up, prepare_frame, quick_recipe, reseal
from tests.serving.test_process import CLOSE, serving


def rows(count, seed):
    """Made-up questions that every model here can read."""
    frame = made_up(count, seed)
    frame["text"], frame["number"] = frame["Title"], frame["Title"].str.len().astype(str)
    return frame


@pytest.fixture(scope="module")
def adapters(base, data, runs, tmp_path_factory):
    """Runs by name: `wide` has the labels of `lora`, `three` others and columns; merged models of the first two."""
    folder = tmp_path_factory.mktemp("adapters")
    lora = {"r": 2, "lora_alpha": 8, "target_modules": ["query", "key", "value", "dense"]}
    finetune(data, folder / "wide", quick_recipe(base, "lora", seed=7, lora=lora, epochs=1))
    frame = rows(60, 1)
    frame["label"] = [("a", "b", "c")[row % 3] for row in range(len(frame))]
    options = PrepareOptions(text_columns=("text",), label_column="label")
    three = prepare_frame(frame[["text", "number", "label"]], folder / "three-data", base, options)
    finetune(three, folder / "three", quick_recipe(base, "lora", epochs=1, tabular={"numeric": ["number"]}))
    found = {"lora": runs["lora"], "wide": folder / "wide", "three": folder / "three"}
    for name in ("lora", "wide"):
        merge_run(found[name], folder / f"{name}-merged")
        found[f"{name}-merged"] = folder / f"{name}-merged"
    return found


def test_each_adapter_answers_as_its_merged_model(adapters, tmp_path):
    beside = {name: adapters[name] for name in ("wide", "three")}

    async def scene():
        async with serving(tmp_path / "engine", beside, base=adapters["lora-merged"]) as (_, front):
            of = {model.name: model.adapter_of for model in front.states[0].models}
            assert of == {"base": None, **dict.fromkeys(beside, "base")}
            frames = [rows(2, seed) for seed in range(8)]
            asked = [(name, frame) for frame in frames for name in of]  # all at once, in turn
            found = await asyncio.gather(*(front.ask(name, frame) for name, frame in asked))
            for logits, wanted in found:
                assert np.abs(logits - wanted).max() < CLOSE
            merged = Predictor.load(adapters["wide-merged"], "fp32")
            for (name, frame), (logits, _) in zip(asked, found, strict=True):
                if name == "wide":
                    given = merged.codec.read(frame)
                    assert np.abs(logits - merged.logits(given.texts)).max() < CLOSE
            first = {name: logits for (name, _), (logits, _) in zip(asked[:3], found[:3], strict=True)}
            assert np.abs(first["base"] - first["wide"]).max() > 100 * CLOSE  # they are not the same model

    asyncio.run(scene())


def tensors(predictor):
    return dict(predictor.engine.model.named_parameters())


@pytest.mark.parametrize("carrier", ["lora", "lora-merged"])
def test_what_is_equal_is_held_once_and_what_is_not_is_left_alone(adapters, carrier):
    first = Predictor.load(adapters[carrier], "fp32")
    before = {name: tensor.clone() for name, tensor in tensors(first).items()}
    second, merged = load_beside(first, "wide", adapters["wide"]), Predictor.load(adapters["wide-merged"], "fp32")
    held = {name for name, tensor in tensors(second).items() if tensor.data_ptr() == tensors(first)[name].data_ptr()}
    assert "bert.embeddings.word_embeddings.weight" in held
    assert not {name for name in held if "query.weight" in name or name.startswith("classifier")}
    for name, tensor in tensors(first).items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(tensors(second)[name], tensors(merged)[name])


def test_what_cannot_stand_beside_is_refused_by_name(adapters, runs, tmp_path):
    models = {"base": str(adapters["lora"])}
    with pytest.raises(UsageError, match=r"--adapter a=.* is no LoRA run; serve it as a model: a="):
        carriers(models, {"a": str(runs["full"])})
    other = shutil.copytree(adapters["wide"], tmp_path / "run")
    reseal(other, base={"model": "another", "weights": "sha256:00"})
    with pytest.raises(UsageError, match=r"a=.*/run was trained on another, and of that base none is served"):
        carriers(models, {"a": str(other)})
    with pytest.raises(UsageError, match="cannot be served beside the model: its embeddings are not the engine's"):
        load_beside(Predictor.load(runs["full"], "fp32"), "a", adapters["wide"])


def test_an_adapter_goes_beside_the_first_model_of_its_base(adapters, runs):
    models = {name: str(adapters[name]) for name in ("wide-merged", "lora")}
    assert carriers(models, {"a": str(adapters["three"])}) == {"a": "wide-merged"}


def test_golden_rows_of_each_adapter_are_replayed(adapters, tmp_path, monkeypatch):
    honest, wide = PyTorchEngine.beside, []

    def damaged(self, model):
        wide.append(honest(self, model))
        with torch.no_grad():
            wide[-1].model.classifier.bias += 1
        return wide[-1]

    monkeypatch.setattr(PyTorchEngine, "beside", damaged)

    async def scene():
        with pytest.raises(ArtifactError, match="wide does not compute what it did when it was saved"):
            async with serving(tmp_path / "engine", {"wide": adapters["wide"]}, base=adapters["lora"]):
                pass

    asyncio.run(scene())


def test_an_adapter_that_changed_is_swapped_with_its_base(adapters, tmp_path):
    run = shutil.copytree(adapters["wide"], tmp_path / "run")

    async def scene():
        async with serving(tmp_path / "engine", {"a": run}, base=adapters["lora"]) as (process, front):
            before, _ = await front.ask("a", rows(5, 3))
            shutil.rmtree(run)
            shutil.copytree(adapters["three"], run)
            await process.reload()
            await front.ready(2)
            found, wanted = await front.ask("a", rows(5, 3))
            assert (before.shape[1], found.shape[1]) == (2, 3)
            assert np.abs(found - wanted).max() < CLOSE

    asyncio.run(scene())

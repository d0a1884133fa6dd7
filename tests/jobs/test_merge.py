"""Merging a LoRA run gives the same function as a plain model, measured, or nothing at all."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from bertforge.artifact import hash_file
from bertforge.errors import ArtifactError
from bertforge.evaluation.logits import predict_logits
from bertforge.hardware import detect
from bertforge.inference.predictor import Predictor, load_model
from bertforge.jobs import merge as module
from bertforge.jobs.merge import merge_run
from bertforge.manifest import read_manifest
from bertforge.proof.golden import GoldenRows
from bertforge.training.finetune import finetune
from tests.runs import KINDS, made_up, quick_recipe, reseal

TEXTS = [f"{row.Title} {row.BodyMarkdown}" for row in made_up(10, seed=9).itertuples()]


@pytest.fixture(scope="module")
def merged(tmp_path_factory, runs):
    """The merged folder and what was measured."""
    out = tmp_path_factory.mktemp("merged") / "model"
    return out, merge_run(runs["lora"], out)


def test_a_merged_model_predicts_what_its_run_predicted(merged, runs):
    out, measured = merged
    run, model = Predictor.load(runs["lora"], "fp32"), Predictor.load(out, "fp32")
    np.testing.assert_allclose(model.logits(TEXTS), run.logits(TEXTS), atol=1e-5)
    assert not np.allclose(model.logits(TEXTS), Predictor.load(runs["full"], "fp32").logits(TEXTS), atol=1e-3)
    assert measured["rows"] == 4, "of 16 golden rows"
    # Never 0: float64 shows that the merged weights were rounded to float32.
    assert 0 < measured["max_logit_difference"] < 1e-5
    assert measured["changed_labels"] == 0
    assert (model.label_names, model.schema, model.max_length) == (run.label_names, run.schema, run.max_length)


def test_a_merged_folder_is_a_plain_model_that_says_where_it_came_from(merged, runs):
    out, measured = merged
    assert {path.name for path in out.iterdir()} == {
        "bertforge.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert not [name for name in load_file(out / "model.safetensors") if "lora" in name or "base_layer" in name]
    manifest = json.loads((out / "bertforge.json").read_text())
    assert manifest["kind"] == "model"
    assert manifest["merge"] == measured
    assert manifest["temperature"] == Predictor.load(runs["lora"]).temperature != 1
    assert manifest["parent"] == hash_file(runs["lora"] / "bertforge.json")


def test_columns_are_merged_with_the_text(tmp_path, data, base):
    recipe = quick_recipe(base, epochs=1, **KINDS["lora"], **KINDS["columns"])
    finetune(data, tmp_path / "run", recipe)
    assert merge_run(tmp_path / "run", tmp_path / "model")["max_logit_difference"] < 1e-5
    assert Predictor.load(tmp_path / "model").transform.spec.holding("names") == ["tags"]


def test_a_full_run_has_nothing_to_merge(tmp_path, runs):
    with pytest.raises(ArtifactError, match="was trained in full and so a plain Hugging Face folder already"):
        merge_run(runs["full"], tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_merged_model_is_not_merged_again(tmp_path, merged):
    with pytest.raises(ArtifactError, match=r"is a merged model and so .* already: there is nothing to merge"):
        merge_run(merged[0], tmp_path / "model")


def test_a_merge_that_changes_the_function_is_not_written(tmp_path, runs, monkeypatch):
    def wrong(model):
        plain = plain_merge(model)
        plain.classifier.bias.data[0] += 0.01
        return plain

    plain_merge = module.merge
    monkeypatch.setattr(module, "merge", wrong)
    with pytest.raises(ArtifactError, match=r"by 0\.01 in a logit from .*, more than \S+e-05; nothing was written"):
        merge_run(runs["lora"], tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


FORMULAS = {
    "twice the scale": lambda lora_A, lora_B, scaling: (lora_B @ lora_A) * (2 * scaling),
    "no scale": lambda lora_A, lora_B, scaling: lora_B @ lora_A,
    "transposed": lambda lora_A, lora_B, scaling: (lora_B @ lora_A).T * scaling,
}


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS.keys())
def test_a_mistake_that_the_run_itself_makes_is_seen(tmp_path, runs, monkeypatch, formula):
    """Its golden rows were computed with it too, so run, merged model and golden rows all agree."""
    for place in ("kernels.low_rank", "lora.layer"):
        monkeypatch.setattr(f"bertforge.{place}.low_rank_update", formula)
    run = shutil.copytree(runs["lora"], tmp_path / "run")
    manifest = json.loads((run / "bertforge.json").read_text())
    golden, model = GoldenRows.from_dict(manifest["golden"]), load_model(run, manifest).to(detect().device)
    logits = predict_logits(model, golden.examples, np.arange(16), "fp32")
    assert np.abs(logits - golden.logits).max() > 1e-4, "ten times what the gate lets through"
    reseal(run, golden=replace(golden, logits=logits).to_dict())
    with pytest.raises(ArtifactError, match=r"with its adapter computed apart, more than .*; nothing was written"):
        merge_run(run, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_golden_logits_of_another_device_do_not_decide(tmp_path, runs):
    shutil.copytree(runs["lora"], tmp_path / "run")
    golden = read_manifest(tmp_path / "run", "run")["golden"]
    golden["logits"] = [[logit + 1.5e-3 for logit in row] for row in golden["logits"]]  # more than a merge may differ
    reseal(tmp_path / "run", golden=golden)
    assert merge_run(tmp_path / "run", tmp_path / "model")["max_logit_difference"] < 1e-5


def test_an_older_folder_is_not_overwritten(tmp_path, runs):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="already exists and is not empty"):
        merge_run(runs["lora"], tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_changed_adapter_is_refused(tmp_path, runs):
    shutil.copytree(runs["lora"], tmp_path / "run")
    path = tmp_path / "run" / "adapter_model.safetensors"
    save_file({name: tensor + 0.1 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors is damaged"):
        merge_run(tmp_path / "run", tmp_path / "model")
    reseal(tmp_path / "run")
    with pytest.raises(ArtifactError, match="does not compute what it did"):
        merge_run(tmp_path / "run", tmp_path / "model")

"""What a run leaves behind, read by transformers and PEFT: merged, trained in full, and as an adapter."""

from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
import transformers

from bertforge.inference.predictor import Predictor
from bertforge.jobs.compile import compile_model
from bertforge.jobs.merge import merge_run
from bertforge.jobs.quantize import QuantizeOptions, quantize_model
from tests.runs import made_up

TEXTS = [f"{row.Title} {row.BodyMarkdown}" for row in made_up(8, seed=9).itertuples()]


def their_logits(model, directory):
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    batch = tokenizer(TEXTS, truncation=True, padding=True, return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return model.eval()(**inputs).logits.numpy()


@pytest.mark.parametrize("kind", ["merged", "full"])
def test_transformers_loads_the_folder_unchanged(tmp_path, runs, kind):
    folder = runs["full"]
    if kind == "merged":
        folder = tmp_path / "model"
        merge_run(runs["lora"], folder)
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert theirs.config.id2label == {0: "open", 1: "closed"}
    ours = Predictor.load(folder, "fp32").logits(TEXTS)
    np.testing.assert_allclose(their_logits(theirs, folder), ours, atol=1e-5)
    assert np.abs(np.diff(ours, axis=0)).max() > 1e-3, "the texts are told apart"


@pytest.mark.parametrize("kind", ["merged", "full", "quantized", "engine"])
def test_a_folders_tokenizer_cuts_texts_as_the_model_was_trained(tmp_path, data, runs, kind):
    folder = tmp_path / "model"
    if kind == "merged":
        merge_run(runs["lora"], folder)
    elif kind == "quantized":
        quick = QuantizeOptions(calibration="max", rows=16, validation_rows=16)
        quantize_model(runs["full"], data, folder, quick, None, lambda text: None)
    elif kind == "engine":
        compile_model(runs["full"], "onnxruntime", "fp32", None, folder)
    else:
        folder = runs["full"]
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Predictor.load(folder).tokenizer
    assert theirs.model_max_length == 48, "of the recipe; the model has 64 positions"
    assert type(theirs).__name__.startswith("Bert")
    texts = ["ÉTÉ 漢字 don't-stop [SEP] C++\r\n", *TEXTS]
    assert theirs(texts)["input_ids"] == [ours.encode([text])[0].tolist() for text in texts]


@pytest.mark.parametrize("kind", ["merged", "full"])
def test_a_pipeline_gives_a_long_texts_label_and_scores(tmp_path, runs, kind):
    """The scores are those before the temperature, which no file of transformers holds."""
    folder = runs["full"]
    if kind == "merged":
        folder = tmp_path / "model"
        merge_run(runs["lora"], folder)
    classify = transformers.pipeline("text-classification", model=folder, truncation=True, top_k=None)
    texts = ["sort list python " * 667, *TEXTS]
    assert len(texts[0].split()) > 2000
    predictor = Predictor.load(folder, "fp32")
    ours = replace(
        predictor, codec=replace(predictor.codec, manifest=predictor.manifest | {"temperature": 1.0})
    ).predict(texts)
    for scores, (_, row) in zip(classify(texts), ours.iterrows(), strict=True):
        assert scores[0]["label"] == row["label"]
        assert {score["label"]: score["score"] for score in scores} == {
            label: pytest.approx(row[f"p_{label}"], abs=1e-5) for label in ("open", "closed")
        }


def test_peft_loads_the_adapter_of_a_run(base, runs):
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    theirs = peft.PeftModel.from_pretrained(theirs, runs["lora"])
    ours = Predictor.load(runs["lora"], "fp32").logits(TEXTS)
    np.testing.assert_allclose(their_logits(theirs, runs["lora"]), ours, atol=1e-5)

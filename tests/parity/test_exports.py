"""What a run leaves behind, read by transformers and PEFT: merged, trained in full, and as an adapter."""

import numpy as np
import peft
import pytest
import torch
import transformers

from bertforge.inference.merge import merge_run
from bertforge.inference.predictor import Predictor
from tests.runs import made_up

TEXTS = [f"{row.Title} {row.BodyMarkdown}" for row in made_up(8, seed=9).itertuples()]


def their_logits(model, directory):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )
    batch = tokenizer(TEXTS, truncation=True, max_length=48, padding=True, return_tensors="pt")
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


def test_peft_loads_the_adapter_of_a_run(base, runs):
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    theirs = peft.PeftModel.from_pretrained(theirs, runs["lora"])
    ours = Predictor.load(runs["lora"], "fp32").logits(TEXTS)
    np.testing.assert_allclose(their_logits(theirs, runs["lora"]), ours, atol=1e-5)

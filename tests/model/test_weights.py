"""Checkpoints of every spelling load; what does not fit is refused by name; nothing is pickled."""

import logging
import os
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bertforge.batch import PaddedBatch
from bertforge.columns.encoder import TabularConfig
from bertforge.errors import ArtifactError
from bertforge.lora.config import LoraConfig
from bertforge.lora.inject import inject_lora
from bertforge.model.classifier import BertForSequenceClassification
from tests.model.tiny import tiny_bert, tiny_config

BATCH = PaddedBatch(torch.arange(1, 13).view(2, 6), torch.ones(2, 6, dtype=torch.int64))


@pytest.fixture
def saved(tmp_path):
    """A folder with the config and weights of a tiny model."""
    tiny_bert().save_pretrained(tmp_path)
    return tmp_path


def rewrite(directory, change):
    """Replaces the stored tensors by `change(tensors)`."""
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path)


def logits(model):
    with torch.no_grad():
        return model(BATCH)


def load(directory, **options):
    return BertForSequenceClassification.from_pretrained(directory, **options)


def one_line(error):
    return "\n" not in str(error.value)


def test_weights_come_back_as_they_went(saved):
    assert torch.equal(logits(load(saved)), logits(tiny_bert()))
    assert not torch.equal(logits(load(saved)), logits(tiny_bert(seed=1)))


def test_a_loaded_model_is_ready_to_predict(saved):
    assert not load(saved).training


def test_a_legacy_bin_is_read(saved):
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    assert torch.equal(logits(load(saved)), logits(tiny_bert()))


def test_a_legacy_bin_in_the_old_format_is_read(saved):
    tensors = load_file(saved / "model.safetensors")
    torch.save(tensors, saved / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (saved / "model.safetensors").unlink()
    assert torch.equal(logits(load(saved)), logits(tiny_bert()))


def test_safetensors_are_preferred_to_a_legacy_bin(saved):
    (saved / "pytorch_model.bin").write_bytes(b"never opened")
    assert torch.equal(logits(load(saved)), logits(tiny_bert()))


class Payload:
    """What an attacker would put into a pickle: it writes a file when loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_bin_with_an_object_in_it_is_refused_and_not_run(saved):
    (saved / "model.safetensors").unlink()
    torch.save({"weights": Payload(saved / "attacked")}, saved / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"pytorch_model\.bin holds more than tensors") as error:
        load(saved)
    assert one_line(error)
    assert not (saved / "attacked").exists()
    torch.load(saved / "pytorch_model.bin", weights_only=False)
    assert (saved / "attacked").exists(), "the payload is one that works"


def test_a_bin_with_a_whole_training_state_is_refused(saved):
    (saved / "model.safetensors").unlink()
    torch.save({"epoch": 3, "model": tiny_bert().state_dict()}, saved / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="training state") as error:
        load(saved)
    assert one_line(error)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_a_bin_cut_short_is_one_line(saved, zipped):
    torch.save(tiny_bert().state_dict(), saved / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    content = (saved / "pytorch_model.bin").read_bytes()
    (saved / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    (saved / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="damaged") as error:
        load(saved)
    assert one_line(error)


@pytest.mark.parametrize("kept", [0, 4, 100, 5000])
def test_safetensors_cut_short_are_one_line(saved, kept):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match="damaged or cut short") as error:
        load(saved)
    assert one_line(error)


def test_a_folder_without_weights_names_the_files_looked_for(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        load(saved)


def old_names(tensors):
    spelled = {}
    for name, tensor in tensors.items():
        name = re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", name)
        spelled[re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", name)] = tensor
    return spelled


OLD_SPELLINGS = {
    "gamma and beta": old_names,
    "no bert. prefix": lambda tensors: {name.removeprefix("bert."): tensor for name, tensor in tensors.items()},
    "position_ids": lambda tensors: tensors | {"bert.embeddings.position_ids": torch.arange(32)[None]},
    "pretraining heads": lambda tensors: (
        tensors | {"cls.predictions.bias": torch.zeros(50), "cls.seq_relationship.weight": torch.zeros(2, 16)}
    ),
    "all at once": lambda tensors: {
        name.removeprefix("bert."): tensor
        for name, tensor in (old_names(tensors) | {"bert.embeddings.position_ids": torch.arange(32)[None]}).items()
    },
}


@pytest.mark.parametrize("change", OLD_SPELLINGS.values(), ids=OLD_SPELLINGS.keys())
def test_old_spellings_are_understood(saved, change):
    rewrite(saved, change)
    assert torch.equal(logits(load(saved)), logits(tiny_bert()))


@pytest.mark.parametrize("vocab_size", [30, 82_000])
def test_any_vocabulary_size(tmp_path, vocab_size):
    tiny_bert(vocab_size=vocab_size).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.bert.embeddings.word_embeddings.num_embeddings == vocab_size
    assert torch.equal(logits(model), logits(tiny_bert(vocab_size=vocab_size)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_files_become_float32(saved, dtype):
    rewrite(saved, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    model = load(saved)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for name, tensor in tiny_bert().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(dtype).float())


MISFITS = {
    "missing": (
        lambda tensors: {name: t for name, t in tensors.items() if "layer.1.attention.self.key" not in name},
        r"missing: bert\.encoder\.layer\.1\.attention\.self\.key\.weight, bert\.encoder\.layer\.1.*key\.bias$",
    ),
    "half a head": (
        lambda tensors: {name: t for name, t in tensors.items() if name != "classifier.bias"},
        r"missing: classifier\.bias$",
    ),
    "unexpected": (
        lambda tensors: tensors | {"bert.extra.weight": torch.zeros(1)},
        r"unexpected: bert\.extra\.weight$",
    ),
    "misshapen": (
        lambda tensors: tensors | {"classifier.weight": torch.zeros(3, 16)},
        r"wrong shape: classifier\.weight is \[3, 16\], the model needs \[2, 16\]$",
    ),
    "another vocabulary than the config's": (
        lambda tensors: tensors | {"bert.embeddings.word_embeddings.weight": torch.zeros(60, 16)},
        r"word_embeddings\.weight is \[60, 16\], the model needs \[50, 16\]$",
    ),
    "a layer more": (
        lambda tensors: (
            tensors
            | {name.replace("layer.1.", "layer.2."): t.clone() for name, t in tensors.items() if "layer.1." in name}
        ),
        r"unexpected: bert\.encoder\.layer\.2\..* and 11 more$",
    ),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_what_does_not_fit_is_refused_by_name(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(ArtifactError, match=message) as error:
        load(saved)
    assert one_line(error)


@pytest.mark.parametrize("head", ["classifier", "bert.pooler"])
def test_a_missing_head_is_made_new_with_a_warning(saved, head, caplog):
    rewrite(saved, lambda tensors: {name: t for name, t in tensors.items() if not name.startswith(head)})
    with caplog.at_level(logging.WARNING):
        torch.manual_seed(1)
        model = load(saved)
    assert f"{head} of {saved} is new and random" in caplog.text
    head_weight = next(parameter for name, parameter in model.named_parameters() if name.startswith(head))
    assert head_weight.std() > 0.1, "drawn, not left empty"


def test_a_whole_checkpoint_warns_of_nothing(saved, caplog):
    with caplog.at_level(logging.WARNING):
        load(saved)
    assert caplog.text == ""


def test_a_new_head_takes_the_labels_and_columns_asked_for(saved, caplog):
    rewrite(saved, lambda tensors: {name: t for name, t in tensors.items() if not name.startswith("classifier")})
    model = load(saved, labels=("a", "b", "c"), tabular=TabularConfig.of(numeric=4), attention_dropout=0.0)
    assert model.classifier.weight.shape == (3, 16 + 4)
    assert model.config == replace(
        tiny_config(labels=("a", "b", "c"), attention_probs_dropout_prob=0.0), tabular=TabularConfig.of(numeric=4)
    )
    assert caplog.text == ""  # who names the labels knows that the head is new


@pytest.mark.parametrize("labels", [("a", "b"), ("a", "b", "c")], ids=["as many", "another number"])
def test_other_labels_than_the_stored_heads_get_a_new_head(saved, caplog, labels):
    stored = load_file(saved / "model.safetensors")["classifier.weight"]
    model = load(saved, labels=labels)
    assert model.new_heads == ("classifier",)
    assert model.classifier.weight.shape == (len(labels), 16)
    assert not torch.equal(model.classifier.weight[:2], stored)
    assert f"classifier of {saved} was made for other labels or columns: a new one takes its place" in caplog.text


def test_the_stored_heads_own_labels_keep_it(saved, caplog):
    model = load(saved, labels=tiny_config().labels)
    assert model.new_heads == ()
    assert torch.equal(logits(model), logits(tiny_bert()))
    assert caplog.text == ""


def test_other_columns_than_the_stored_heads_get_a_new_head(tmp_path):
    tiny_bert(tabular=TabularConfig.of(numeric=2, hidden_size=3)).save_pretrained(tmp_path)
    model = load(tmp_path, tabular=TabularConfig.of(numeric=5, hidden_size=4))
    assert model.new_heads == ("classifier", "tabular")
    assert model.classifier.weight.shape == (2, 16 + 4)


def test_a_new_pooler_is_told_to_one_who_names_the_labels_too(saved, caplog):
    heads = ("classifier", "bert.pooler")
    rewrite(saved, lambda tensors: {name: t for name, t in tensors.items() if not name.startswith(heads)})
    model = load(saved, labels=("a", "b"))
    assert model.new_heads == ("bert.pooler", "classifier")
    assert caplog.messages == [f"bert.pooler of {saved} is new and random: fine-tune it before predicting"]


def test_a_model_with_adapters_is_not_saved_whole(tmp_path):
    with pytest.raises(ArtifactError, match="merge them first"):
        inject_lora(tiny_bert(), LoraConfig()).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_saving_over_a_model_replaces_it(saved):
    tiny_bert(seed=1).save_pretrained(saved)
    assert torch.equal(logits(load(saved)), logits(tiny_bert(seed=1)))
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]

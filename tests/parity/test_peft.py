"""Adapters go to PEFT and come from it, head included: equal outputs, equal gradients, equal merged weights."""

import json

import peft
import pytest
import torch
from torch import nn

from bertforge.batch import pack
from bertforge.errors import ArtifactError
from bertforge.lora.adapter_io import load_adapter, save_adapter
from bertforge.lora.config import LoraConfig
from bertforge.lora.inject import inject_lora, merge
from bertforge.model.classifier import BertForSequenceClassification
from tests.parity.pairs import (
    assert_equal,
    assert_equal_gradients,
    gradients,
    ours_from,
    random_batch,
    their_logits,
    tiny_model,
)

ADAPTED = {
    "query and value": {"target_modules": ["query", "value"]},
    "all linears": {"target_modules": ["query", "key", "value", "dense"]},
    "one layer's feed-forward": {
        "target_modules": ["intermediate.dense", "output.dense"],
        "layers_to_transform": [1],
        "lora_alpha": 3,
    },
}
BATCH = random_batch((1, 2, 17, 64), 99)


@pytest.fixture(params=ADAPTED.values(), ids=ADAPTED.keys())
def adapted(request):
    return request.param


def train_a_little(model: nn.Module) -> None:
    """Moves what is trainable off its start, where B = 0 and the adapter does nothing."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)


def peft_adapter(directory, *, base_directory=None, **options):
    """A trained PEFT model of the tiny BERT, its adapter saved in `directory`."""
    base = tiny_model()
    if base_directory:
        base.save_pretrained(base_directory)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, **({"lora_alpha": 16, "target_modules": ["query"]} | options))
    model = peft.get_peft_model(base, config)
    train_a_little(model)
    model.save_pretrained(directory)
    return model.eval()


def our_name(name: str) -> str:
    """Our name of a PEFT parameter."""
    return name.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", "")


def assert_same_model(ours, theirs):
    """In float64: ours adds B A to the weight, theirs to the output, and float32 rounds the two differently."""
    ours, theirs = ours.double(), theirs.double()
    logits, expected = ours(BATCH), their_logits(theirs, BATCH)
    assert_equal(logits, expected)
    assert_equal(ours(pack(BATCH)), expected)
    trained = {our_name(name): gradient for name, gradient in gradients(theirs, expected).items()}
    assert {"classifier.weight", "classifier.bias"} < trained.keys()
    assert any(name.endswith("lora_A.weight") for name in trained)
    assert any(name.endswith("lora_B.weight") for name in trained)
    assert all(gradient.abs().max() > 0 for gradient in trained.values())
    assert_equal_gradients(gradients(ours, logits), trained)


def test_peft_loads_our_adapter(tmp_path, adapted):
    ours = ours_from(tiny_model(), tmp_path / "base")
    plain = ours(BATCH)
    config = LoraConfig(r=4, **{name: tuple(v) if isinstance(v, list) else v for name, v in adapted.items()})
    inject_lora(ours, config)
    train_a_little(ours)
    save_adapter(ours, config, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter", is_trainable=True).eval()
    assert_same_model(ours, theirs)
    assert (ours(BATCH) - plain).abs().max() > 0.1
    assert_equal(merge(ours)(BATCH), their_logits(theirs.merge_and_unload().float(), BATCH))


def test_peft_finds_the_base_model_our_adapter_names(tmp_path):
    ours = ours_from(tiny_model(), tmp_path / "base")
    config = LoraConfig()
    train_a_little(inject_lora(ours, config))
    save_adapter(ours, config, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    assert_equal(ours(BATCH), their_logits(theirs, BATCH))


def test_we_load_pefts_adapter(tmp_path, adapted):
    theirs = peft_adapter(tmp_path / "adapter", base_directory=tmp_path / "base", **adapted)
    ours = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    config = load_adapter(ours, tmp_path / "adapter")
    assert config.modules_to_save == ("classifier",)
    assert_same_model(ours, theirs)


def test_peft_declares_a_head_this_model_lacks_and_it_is_left_out(tmp_path):
    peft_adapter(tmp_path / "adapter", base_directory=tmp_path / "base")
    declared = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"]
    assert set(declared) == {"classifier", "score"}
    ours = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    config = load_adapter(ours, tmp_path / "adapter")
    save_adapter(ours, config, tmp_path / "again", base_model=str(tmp_path / "base"))
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]


def test_pefts_all_linear_is_read_as_the_names_it_stands_for(tmp_path):
    theirs = peft_adapter(tmp_path / "adapter", base_directory=tmp_path / "base", target_modules="all-linear")
    ours = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    load_adapter(ours, tmp_path / "adapter")
    assert_same_model(ours, theirs)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"rank_pattern": {"layer.0.attention.self.query": 2}}, "rank_pattern"),
        ({"bias": "lora_only"}, "bias"),
        ({"target_modules": ".*query"}, "target_modules"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"exclude_modules": ["bert.encoder.layer.0.attention.self.query"]}, "layer.0.attention.self.query"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_peft_option_that_would_change_the_result_is_refused_by_name(tmp_path, options, named):
    peft_adapter(tmp_path / "adapter", base_directory=tmp_path / "base", **options)
    ours = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    with pytest.raises(ArtifactError, match=named):
        load_adapter(ours, tmp_path / "adapter")


def test_another_peft_method_is_refused(tmp_path):
    peft.get_peft_model(tiny_model(), peft.IA3Config(task_type="SEQ_CLS")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ArtifactError, match="peft_type 'IA3'"):
        load_adapter(nn.Linear(1, 1), tmp_path / "adapter")

"""An adapter comes back from its folder with its head, and one that does not fit is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bertforge.batch import PaddedBatch
from bertforge.columns.encoder import TabularConfig
from bertforge.errors import ArtifactError
from bertforge.lora.adapter_io import load_adapter, save_adapter
from bertforge.lora.config import LoraConfig
from tests.lora.test_inject import BATCH, adapted_bert
from tests.model.tiny import tiny_bert

CONFIG = LoraConfig(r=2, lora_alpha=6, lora_dropout=0.25, target_modules=("dense", "query"), layers_to_transform=(1,))


@pytest.fixture
def saved(tmp_path):
    """The folder of an adapter, and the model it came from, whose head was trained as well."""
    model = adapted_bert(CONFIG)
    torch.nn.init.normal_(model.classifier.weight)
    save_adapter(model, CONFIG, tmp_path, base_model="tiny")
    return tmp_path, model


def change_weights(directory, change):
    path = directory / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def change_config(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_comes_back_with_its_head(saved):
    directory, model = saved
    again = tiny_bert()
    assert load_adapter(again, directory) == CONFIG
    assert torch.equal(again(BATCH), model(BATCH))
    assert not torch.allclose(again(BATCH), tiny_bert()(BATCH), atol=0.1)


def test_the_folder_holds_the_adapter_and_the_head_alone(saved):
    directory, model = saved
    stored = {name: tensor.shape for name, tensor in load_file(directory / "adapter_model.safetensors").items()}
    trained = {f"base_model.model.{name}": p.shape for name, p in model.named_parameters() if p.requires_grad}
    assert stored == trained
    assert sorted(path.name for path in directory.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_tabular_head_is_saved_with_its_buffers(tmp_path):
    tabular = TabularConfig.of(numeric=2, categorical=(3,), multi=4, bins=3, embedding_size=4, hidden_size=5)
    config = LoraConfig(modules_to_save=("classifier", "tabular"))
    model = adapted_bert(config, tabular=tabular)
    model.tabular.learn({"scaler.mean": [1, 2], "scaler.std": [3, 4], "numeric.edges": [[0, 1, 2, 3]] * 2})
    save_adapter(model, config, tmp_path, base_model="tiny")
    again = tiny_bert(seed=0, tabular=tabular)
    for parameter in again.tabular.parameters():
        torch.nn.init.zeros_(parameter)
    load_adapter(again, tmp_path)
    columns = {
        "numeric": torch.tensor([[0.5, -2.0], [0.1, 0.2]]),
        "categorical": torch.tensor([[1], [0]]),
        "multi": torch.tensor([[1, 3], [0, 0]]),
    }
    batch = PaddedBatch(BATCH.input_ids, BATCH.attention_mask, tabular=columns)
    assert again.tabular.numeric.edges.tolist() == [[0, 1, 2, 3]] * 2
    assert again.tabular.scaler.std.tolist() == [3, 4]
    assert torch.equal(again(batch), model(batch))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: {n: t for n, t in tensors.items() if "classifier" not in n}, r"2 tensors .* classifier\.bias"),
        (lambda tensors: {n: t for n, t in tensors.items() if "query.lora_A" not in n}, r"1 tensors .*query\.lora_A"),
        (lambda tensors: tensors | {"base_model.model.score.weight": torch.zeros(1)}, r"1 tensors .* score\.weight"),
        (lambda tensors: {n: t[..., :1].clone() for n, t in tensors.items()}, "another shape"),
    ],
    ids=["no head", "half an adapter", "a head the model lacks", "another shape"],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(saved, change, named):
    directory, _ = saved
    change_weights(directory, change)
    with pytest.raises(ArtifactError, match=named):
        load_adapter(tiny_bert(), directory)


def test_a_model_that_was_refused_an_adapter_is_as_it_was(saved):
    directory, _ = saved
    model = tiny_bert()
    content = (directory / "adapter_model.safetensors").read_bytes()
    change_weights(directory, lambda tensors: {n: t for n, t in tensors.items() if "classifier" not in n})
    with pytest.raises(ArtifactError, match="does not fit"):
        load_adapter(model, directory)
    assert all(parameter.requires_grad for parameter in model.parameters())
    (directory / "adapter_model.safetensors").write_bytes(content)
    load_adapter(model, directory)


@pytest.mark.parametrize("damage", [lambda config: [], lambda config: config | {"r": "8"}], ids=["list", "string"])
def test_a_config_with_a_value_of_a_wrong_kind_is_named(saved, damage):
    path = saved[0] / "adapter_config.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(ArtifactError, match=r"adapter_config\.json is damaged \(.*; save the adapter again"):
        load_adapter(tiny_bert(), saved[0])


def test_another_rank_than_the_configs_is_refused(saved):
    directory, _ = saved
    change_config(directory, r=3)
    with pytest.raises(ArtifactError, match="lora_A"):
        load_adapter(tiny_bert(), directory)


@pytest.mark.parametrize("kept", [0, 50, 500])
def test_weights_cut_short_are_one_line(saved, kept):
    path = saved[0] / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors is missing or damaged") as error:
        load_adapter(tiny_bert(), saved[0])
    assert "\n" not in str(error.value)


def test_a_folder_that_holds_no_adapter_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"adapter_config\.json is missing"):
        load_adapter(tiny_bert(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"peft_type": "IA3"}, "'IA3'"), ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias 'all'")],
    ids=str,
)
def test_what_is_not_built_is_refused(saved, changes, message):
    change_config(saved[0], **changes)
    with pytest.raises(ArtifactError, match=message):
        load_adapter(tiny_bert(), saved[0])


def test_a_config_without_a_rank_is_refused(saved):
    path = saved[0] / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 1}))
    with pytest.raises(ArtifactError, match="lacks r, target_modules"):
        load_adapter(tiny_bert(), saved[0])


def test_one_layer_given_as_a_number_is_read(saved):
    change_config(saved[0], layers_to_transform=1)
    assert load_adapter(tiny_bert(), saved[0]).layers_to_transform == (1,)

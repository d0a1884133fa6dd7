"""config.json comes back as it went, and what this BERT cannot be is refused with the value that is wrong."""

import json

import pytest

from bertforge.columns.encoder import TabularConfig
from bertforge.errors import ArtifactError
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.model.config import BertConfig
from tests.model.tiny import tiny_bert, tiny_config

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


WRONG = [
    ("hidden_size", -384, "a whole number from 1 to 65,536"),
    ("hidden_size", "768", "a whole number from 1"),
    ("hidden_size", True, "a whole number from 1"),
    ("vocab_size", 10**12, "a whole number from 1 to 16,777,216"),
    ("vocab_size", 0, "a whole number from 1"),
    ("num_hidden_layers", 10**6, "a whole number from 1 to 1,000"),
    ("num_hidden_layers", 2.5, "a whole number from 1"),
    ("num_attention_heads", 0, "a whole number from 1"),
    ("intermediate_size", [3072], "a whole number from 1"),
    ("max_position_embeddings", 1, "a whole number from 2"),
    ("type_vocab_size", -2, "a whole number from 1"),
    ("pad_token_id", -1, "a whole number from 0"),
    ("layer_norm_eps", "x", "a number from 1e-30 to below 1"),
    ("layer_norm_eps", 0, "a number from 1e-30 to below 1"),
    ("layer_norm_eps", float("nan"), "a number from 1e-30 to below 1"),
    ("hidden_dropout_prob", 2.0, "a number from 0 to below 1"),
    ("attention_probs_dropout_prob", -0.1, "a number from 0 to below 1"),
    ("classifier_dropout", 1, "a number from 0 to below 1"),
    ("initializer_range", float("inf"), "a number from 0 to below 100"),
    ("num_labels", 10**12, "a whole number from 1 to 65,536"),
    ("num_labels", "2", "a whole number from 1 to 65,536"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), WRONG, ids=lambda value: f"{value!r:.30}")
def test_a_field_that_no_bert_can_have_is_named_with_its_value_and_what_is_allowed(tmp_path, field, value, allowed):
    (tmp_path / "config.json").write_text(json.dumps({field: value}))
    with pytest.raises(ArtifactError) as error:
        BertConfig.load(tmp_path)
    assert str(error.value) == f"{tmp_path / 'config.json'}: {field} is {value!r}; it must be {allowed}" or (
        str(error.value).startswith(f"{tmp_path / 'config.json'}: {field} is {value!r}; it must be {allowed} to ")
    )


def test_fields_that_do_not_fit_each_other_are_named():
    with pytest.raises(ArtifactError, match="pad_token_id is 9; it must be below vocab_size 9"):
        BertConfig(vocab_size=9, pad_token_id=9)
    with pytest.raises(ArtifactError, match="there are 0 labels"):
        BertConfig(labels=())


@pytest.mark.parametrize(
    ("field", "value"), [("embedding_size", 10**9), ("hidden_size", -1), ("hidden_size", 1.5), ("dropout", 2.0)]
)
def test_the_columns_branch_is_bounded_alike(field, value):
    with pytest.raises(ArtifactError, match=rf"{field} of the columns is {value}; it must be"):
        TabularConfig.of(numeric=2, **{"hidden_size": 8} | {field: value})


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "null", '{"id2label": ["a"]}', '{"id2label": {"a": "b"}}', '{"bertforge_tabular": {"bins": 2}}'),
        '{"id2label": ' + "[" * 100_000,
    ],
    ids=lambda content: content[:20],
)
def test_a_file_with_a_part_of_a_wrong_kind_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"config\.json is (damaged \(.*; make or download|not JSON)") as error:
        BertConfig.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_config_of_more_numbers_than_the_weights_is_refused_before_it_takes_memory(tmp_path):
    BertForSequenceClassification.from_config(tiny_config()).save_pretrained(tmp_path)
    BertForSequenceClassification.from_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    # 4 TB of embeddings: taking them would end the test
    (tmp_path / "config.json").write_text(json.dumps(values | {"vocab_size": 1 << 24, "hidden_size": 1 << 16}))
    with pytest.raises(ArtifactError, match=r"config\.json describes a model of 1,\d\d\d,.* but its weights have"):
        BertForSequenceClassification.from_pretrained(tmp_path)


def test_numbers_are_those_of_the_encoder_and_its_embeddings():
    bert = tiny_bert(hidden_size=32, intermediate_size=48, num_hidden_layers=3).bert
    parts = [*bert.embeddings.parameters(), *bert.encoder.parameters()]
    assert bert.config.numbers == sum(part.numel() for part in parts)

"""The columns' branch: worked by hand, joined to the text, and refused when missing."""

import pytest
import torch

from bertforge.batch import PaddedBatch, pack
from bertforge.columns.encoder import TabularConfig, TabularEncoder
from bertforge.errors import UsageError
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.model.config import BertConfig
from tests.model.tiny import tiny_bert, tiny_config

FULL = TabularConfig.of(numeric=2, log=(1,), categorical=(3, 4), multi=5, bins=3, embedding_size=4, hidden_size=8)


def columns(numeric, categorical=None, multi=None):
    numeric = torch.tensor(numeric, dtype=torch.float32)
    none = torch.zeros(len(numeric), 0, dtype=torch.int64)
    return {
        "numeric": numeric,
        "categorical": none if categorical is None else torch.tensor(categorical),
        "multi": none if multi is None else torch.tensor(multi),
    }


def test_every_kind_of_column_reaches_the_result():
    torch.manual_seed(0)
    encoder = TabularEncoder(FULL).eval()
    base = ([[0.1, 0.2]], [[1, 1]], [[1, 2]])
    result = encoder(columns(*base))
    assert result.shape == (1, encoder.out_features) == (1, 8)
    for changed in (
        ([[0.9, 0.2]], *base[1:]),
        ([[0.1, 0.9]], *base[1:]),
        (base[0], [[2, 1]], base[2]),
        (base[0], [[1, 2]], base[2]),
        (*base[:2], [[1, 3]]),
    ):
        assert not torch.equal(encoder(columns(*changed)), result), changed


def test_columns_joined_directly_are_the_classifiers_last_inputs():
    model = tiny_bert(tabular=TabularConfig.of(numeric=3))
    text = PaddedBatch(torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64))
    values = columns([[1.0, 2.0, 3.0], [0.0, 0.0, -1.0]])
    _, pooled = model.bert(text)
    by_hand = torch.cat([pooled, values["numeric"]], dim=1) @ model.classifier.weight.T + model.classifier.bias
    batch = PaddedBatch(text.input_ids, text.attention_mask, tabular=values)
    torch.testing.assert_close(model(batch), by_hand)
    torch.testing.assert_close(model(pack(batch)), by_hand)


def test_text_alone_given_to_a_model_with_columns_is_refused():
    text = PaddedBatch(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(UsageError, match=r"batch has none; set batch\.tabular"):
        tiny_bert(tabular=TabularConfig.of(numeric=3))(text)


def test_a_model_with_columns_comes_back_from_its_folder(tmp_path):
    model = tiny_bert(tabular=FULL)
    model.tabular.learn({"scaler.mean": [3, 4], "numeric.edges": [[0, 1, 2, 3]] * 2})
    model.save_pretrained(tmp_path)
    again = BertForSequenceClassification.from_pretrained(tmp_path)
    assert again.config == tiny_config(tabular=FULL)
    assert {name for name in again.state_dict() if name.startswith("tabular.")} == {
        *("tabular.scaler.mean", "tabular.scaler.std"),
        *("tabular.numeric.weight", "tabular.numeric.bias", "tabular.numeric.edges"),
        *("tabular.categorical.0.weight", "tabular.categorical.1.weight", "tabular.multi.weight"),
        *(f"tabular.mix.{layer}.{part}" for layer in (0, 3) for part in ("weight", "bias")),
    }, "names that checkpoints of every version have"
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert again.tabular.scaler.mean.tolist() == [3, 4]


def test_the_studys_five_columns_add_ten_parameters_to_bert_base():
    with torch.device("meta"):
        text, fused = (
            BertForSequenceClassification(BertConfig(tabular=tabular))
            for tabular in (None, TabularConfig.of(numeric=5))
        )
    assert sum(parameter.numel() for parameter in text.parameters()) == 109_483_778
    assert sum(parameter.numel() for parameter in fused.parameters()) == 109_483_788

"""The columns' branch: worked by hand, joined to the text, and refused when missing."""

import pytest
import torch

from bertforge.batch import PaddedBatch, TabularBatch, pack
from bertforge.errors import UsageError
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.model.config import BertConfig, TabularConfig
from bertforge.model.tabular import PiecewiseLinear, TabularEncoder
from tests.model.tiny import tiny_bert, tiny_config

FULL = TabularConfig(numeric=2, categorical=(3, 4), multi=5, bins=3, embedding_size=4, hidden_size=8)


def columns(numeric, categorical=None, multi=None):
    numeric = torch.tensor(numeric, dtype=torch.float32)
    none = torch.zeros(len(numeric), 0, dtype=torch.int64)
    return TabularBatch(
        numeric,
        none if categorical is None else torch.tensor(categorical),
        none if multi is None else torch.tensor(multi),
    )


def test_a_value_fills_the_bins_below_it_and_its_own_in_part():
    encoder = PiecewiseLinear(TabularConfig(numeric=1, bins=3, embedding_size=3, hidden_size=1))
    encoder.edges.copy_(torch.tensor([[0.0, 1.0, 3.0, 7.0]]))
    with torch.no_grad():
        encoder.weight.copy_(torch.eye(3)[None])  # shows the encoding itself
    values = torch.tensor([[-5.0], [0.0], [0.5], [2.0], [4.0], [7.0], [99.0]])
    expected = [[0, 0, 0], [0, 0, 0], [0.5, 0, 0], [1, 0.5, 0], [1, 1, 0.25], [1, 1, 1], [1, 1, 1]]
    assert encoder(values).tolist() == expected


def test_every_column_has_its_own_bins_and_weights():
    encoder = PiecewiseLinear(TabularConfig(numeric=2, bins=2, embedding_size=1, hidden_size=1))
    encoder.edges.copy_(torch.tensor([[0.0, 1.0, 2.0], [0.0, 10.0, 20.0]]))
    with torch.no_grad():
        encoder.weight.copy_(torch.tensor([[[1.0], [10.0]], [[100.0], [1000.0]]]))
        encoder.bias.copy_(torch.tensor([[0.25], [0.5]]))
    # Column 0: 1 of the first bin, half of the second; column 1: 3/10 of the first.
    assert encoder(torch.tensor([[1.5, 3.0]]))[0].tolist() == pytest.approx([1 + 5 + 0.25, 30 + 0.5])


def test_quantiles_that_coincide_make_a_step_and_no_nan():
    encoder = PiecewiseLinear(TabularConfig(numeric=1, bins=2, embedding_size=2, hidden_size=1))
    encoder.edges.copy_(torch.tensor([[0.0, 0.0, 1.0]]))
    with torch.no_grad():
        encoder.weight.copy_(torch.eye(2)[None])
    assert encoder(torch.tensor([[-1.0], [0.0], [0.5]])).tolist() == [[0, 0], [0, 0], [1, 0.5]]


def test_a_multi_valued_column_is_the_mean_of_the_values_present():
    encoder = TabularEncoder(FULL)
    one, two = encoder.multi.weight[1], encoder.multi.weight[2]
    mean = encoder.multi(torch.tensor([[1, 2, 0], [1, 0, 0], [0, 0, 0]]))
    torch.testing.assert_close(mean, torch.stack([(one + two) / 2, one, torch.zeros(4)]))


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
    model = tiny_bert(tabular=TabularConfig(numeric=3))
    text = PaddedBatch(torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64))
    values = columns([[1.0, 2.0, 3.0], [0.0, 0.0, -1.0]])
    _, pooled = model.bert(text)
    by_hand = torch.cat([pooled, values.numeric], dim=1) @ model.classifier.weight.T + model.classifier.bias
    batch = PaddedBatch(text.input_ids, text.attention_mask, tabular=values)
    torch.testing.assert_close(model(batch), by_hand)
    torch.testing.assert_close(model(pack(batch)), by_hand)


def test_text_alone_given_to_a_model_with_columns_is_refused():
    text = PaddedBatch(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(UsageError, match=r"batch has none; set batch\.tabular"):
        tiny_bert(tabular=TabularConfig(numeric=3))(text)


def test_a_model_with_columns_comes_back_from_its_folder(tmp_path):
    model = tiny_bert(tabular=FULL)
    model.tabular.numeric.edges.add_(0.5)  # as training sets them
    model.save_pretrained(tmp_path)
    again = BertForSequenceClassification.from_pretrained(tmp_path)
    assert again.config == tiny_config(tabular=FULL)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_the_studys_five_columns_add_ten_parameters_to_bert_base():
    with torch.device("meta"):
        text, fused = (
            BertForSequenceClassification(BertConfig(tabular=tabular)) for tabular in (None, TabularConfig(numeric=5))
        )
    assert sum(parameter.numel() for parameter in text.parameters()) == 109_483_778
    assert sum(parameter.numel() for parameter in fused.parameters()) == 109_483_788

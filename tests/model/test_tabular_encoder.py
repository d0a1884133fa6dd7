"""The columns' branch: worked by hand, joined to the text, and refused when missing."""

import numpy as np
import pandas as pd
import pytest
import torch

from bertforge.batch import PaddedBatch, TabularBatch, pack
from bertforge.data.tabular import TabularSpec, TabularTransform
from bertforge.errors import ArtifactError, UsageError
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.model.config import BertConfig, TabularConfig
from bertforge.model.tabular import ColumnScaler, PiecewiseLinear, TabularEncoder
from bertforge.training.finetune import tabular_config
from tests.model.tiny import tiny_bert, tiny_config

FULL = TabularConfig(numeric=2, log=(1,), categorical=(3, 4), multi=5, bins=3, embedding_size=4, hidden_size=8)


def columns(numeric, categorical=None, multi=None):
    numeric = torch.tensor(numeric, dtype=torch.float32)
    none = torch.zeros(len(numeric), 0, dtype=torch.int64)
    return TabularBatch(
        numeric,
        none if categorical is None else torch.tensor(categorical),
        none if multi is None else torch.tensor(multi),
    )


AWKWARD = {
    "counts": [0, 0, 0, 0, 1, 2, 250, 1e6],
    "gaps": ["3", "", None, "nan", "-4", "x", "0", "1e3"],
    "infinite": [1, 2, np.inf, 4, -np.inf, 6, 7, 8],
    "constant": [0.1] * 8,
    "negative": [-1e5, -3, -0.5, 0, 0.5, 3, 1e5, None],
    "year": [2009, 2010, 2010, 2010, 2011, 2012, 2012, 2013],
}


def learnt(spec):
    """The branch for the awkward columns as training makes it, and their arrays."""
    frame = pd.DataFrame(AWKWARD)
    transform = TabularTransform.fit(frame, spec)
    torch.manual_seed(0)
    encoder = TabularEncoder(tabular_config(transform)).eval()
    encoder.learn(transform.mean, transform.std, transform.edges)
    return encoder, torch.from_numpy(transform(frame).numeric)


def scaled_on_the_host(spec):
    """What numpy makes of the awkward columns in float64: the reference, written out column by column."""
    numbers, indicators = [], []
    for name in spec.numeric:
        values = pd.to_numeric(pd.Series(AWKWARD[name]), errors="coerce").to_numpy(np.float64)
        values = np.where(np.isfinite(values), values, np.nan)
        if name in spec.log:
            values = np.sign(values) * np.log1p(np.abs(values))
        deviation = np.nanstd(values)
        numbers.append(np.nan_to_num((values - np.nanmean(values)) / (deviation if deviation > 1e-12 else 1)))
        if np.isnan(values).any():
            indicators.append(np.isnan(values))
    return np.stack([*numbers, *indicators], axis=1)


SPEC = TabularSpec(numeric=tuple(AWKWARD), log=("counts", "negative"))


@torch.no_grad()
def test_raw_numbers_are_scaled_as_numpy_scales_them():
    encoder, raw = learnt(SPEC)
    reference = scaled_on_the_host(SPEC)
    assert reference.shape == (8, 6 + 3)
    np.testing.assert_allclose(encoder.scaler(raw), reference, atol=1e-4)  # float32's share of a year: 6e-5
    assert np.abs(reference).max() > 1
    assert np.isnan(raw.numpy()).sum() == 4 + 2 + 1


@torch.no_grad()
def test_under_autocast_raw_numbers_stay_float32():
    encoder, raw = learnt(SPEC)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scaled = encoder.scaler(raw)
    assert scaled.dtype == torch.float32
    assert torch.equal(scaled, encoder.scaler(raw))
    assert not torch.allclose(encoder.scaler(raw.bfloat16().float()), scaled, atol=0.1), "a year in bfloat16 is 8 years"


@torch.no_grad()
def test_bins_are_filled_as_numpy_fills_them_however_scaling_is_rounded():
    spec = TabularSpec(numeric=tuple(AWKWARD), log=("counts", "negative"), bins=4, hidden_size=4)
    encoder, raw = learnt(spec)
    reference = scaled_on_the_host(spec)
    edges = np.quantile(reference, np.linspace(0, 1, 5), axis=0).T  # [inputs, bins + 1]
    low, width = edges[:, :-1], np.maximum(np.diff(edges), 1e-9)
    expected = np.clip((reference[..., None] - low) / width, 0, 1)  # [rows, inputs, bins]
    assert (np.diff(edges)[:-4] == 0).any(), "quantiles coincide"
    low, width = (bound.numpy() for bound in encoder.numeric.bins())
    for rounding in (-2e-6, 0, 2e-6):
        scaled = encoder.scaler(raw).numpy() + rounding
        found = np.clip((scaled[..., None] - low) / width, 0, 1)
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_columns_that_are_not_there_have_no_log():
    with pytest.raises(ArtifactError, match=r"name \[2\], but numeric columns are 0 to 1"):
        TabularConfig(numeric=2, log=(1, 2))


def test_a_missing_number_is_the_mean_and_an_indicator():
    scaler = ColumnScaler(TabularConfig(numeric=2, indicators=(1,)))
    scaler.mean.copy_(torch.tensor([5.0, 7.0]))
    nan = float("nan")
    assert scaler(torch.tensor([[nan, nan], [6.0, 7.0]])).tolist() == [[0, 0, 1], [1, 0, 0]]


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
    model.tabular.learn([3, 4], [5, 6], [[0, 1, 2, 3]] * 2)
    model.save_pretrained(tmp_path)
    again = BertForSequenceClassification.from_pretrained(tmp_path)
    assert again.config == tiny_config(tabular=FULL)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert again.tabular.scaler.mean.tolist() == [3, 4]


def test_the_studys_five_columns_add_ten_parameters_to_bert_base():
    with torch.device("meta"):
        text, fused = (
            BertForSequenceClassification(BertConfig(tabular=tabular)) for tabular in (None, TabularConfig(numeric=5))
        )
    assert sum(parameter.numel() for parameter in text.parameters()) == 109_483_778
    assert sum(parameter.numel() for parameter in fused.parameters()) == 109_483_788

"""Numbers: what the train rows teach of them, how they are scaled, and the bins they fill."""

from math import e, sqrt

import numpy as np
import pandas as pd
import pytest
import torch

from bertforge.columns.encoder import TabularEncoder
from bertforge.columns.numeric import Numeric, NumericSettings, NumericShape
from bertforge.columns.parts import ColumnScaler, PiecewiseLinear
from bertforge.columns.transform import TabularSpec, TabularTransform
from bertforge.errors import ArtifactError, DataError, UsageError

COLUMNS = pd.DataFrame({"n": ["1", "3", ""], "x": ["0", str(e - 1), str(1 - e)], "c": ["a", "a", "b"]})


def fit(frame=COLUMNS, **settings):
    return Numeric().fit(frame, NumericSettings(**settings), min_count=1)


def test_the_log_is_signed_and_only_where_asked_for():
    assert fit(numeric=("n", "x"), log=("x",)).std[1] == pytest.approx(sqrt(2 / 3)), "of the signed logs 0, 1 and -1"
    assert fit(numeric=("n", "x")).std[1] == pytest.approx((e - 1) * sqrt(2 / 3))


@pytest.mark.parametrize("value", [7, 0.1])
def test_a_constant_column_has_deviation_one(value):
    learnt = fit(pd.DataFrame({"n": [value] * 3}), numeric=("n",))
    assert learnt.mean == pytest.approx((value,))
    assert learnt.std == (1,), "and no rounding error as its deviation"


def test_bins_are_quantiles_of_the_scaled_train_values_and_of_where_they_are_missing():
    edges = fit(pd.DataFrame({"n": [0, 1, 2, 3, 10]}), numeric=("n",), bins=2).edges
    scaled = (np.array([0, 2, 10]) - 3.2) / np.std([0, 1, 2, 3, 10])
    assert edges == (pytest.approx(tuple(scaled)),)
    with_gap = fit(pd.DataFrame({"n": [0, 4, None]}), numeric=("n",), bins=2)
    assert with_gap.edges == ((-1, 0, 1), (0, 0, 1)), "a missing value is the mean"
    assert fit(numeric=("n",)).edges == ()


def test_a_column_of_mostly_words_is_an_error():
    with pytest.raises(DataError, match=r"3 of 3 values of column 'c' are no numbers: 'a'; .* under categorical"):
        fit(numeric=("n", "c"))
    with pytest.raises(DataError, match="2 of 3 values of column 'c' are no numbers: '14,013'"):
        fit(COLUMNS.assign(c=["14,013", "1,5", "5"]), numeric=("n", "c"))
    with pytest.raises(DataError, match="column 'c' holds no number in the train rows"):
        fit(COLUMNS.assign(c=["", None, " "]), numeric=("n", "c"))


def test_a_few_values_that_are_no_numbers_count_as_missing_and_that_is_said(caplog):
    learnt = fit(COLUMNS.assign(c=["14,013", "5", ""]), numeric=("n", "c"))
    assert learnt.mean[1] == 5
    assert caplog.messages == ["1 of 2 values of column 'c' are no numbers: '14,013'; such values count as missing"]


def test_a_stray_log_is_refused():
    with pytest.raises(UsageError, match=r"log names \['y'\], which are not among numeric"):
        NumericSettings(numeric=("n",), log=("y",))
    with pytest.raises(ArtifactError, match=r"name \[2\], but numeric columns are 0 to 1"):
        NumericShape(numeric=2, log=(1, 2))


AWKWARD = {
    "counts": [0, 0, 0, 0, 1, 2, 250, 1e6],
    "gaps": ["3", "", None, "nan", "-4", "x", "0", "1e3"],
    "infinite": [1, 2, np.inf, 4, -np.inf, 6, 7, 8],
    "constant": [0.1] * 8,
    "negative": [-1e5, -3, -0.5, 0, 0.5, 3, 1e5, None],
    "year": [2009, 2010, 2010, 2010, 2011, 2012, 2012, 2013],
}
LOGS = ("counts", "negative")


def learnt(spec):
    """The branch for the awkward columns as training makes it, and their arrays."""
    frame = pd.DataFrame(AWKWARD)
    transform = TabularTransform.fit(frame, spec)
    torch.manual_seed(0)
    encoder = TabularEncoder(transform.config).eval()
    encoder.learn(transform.buffers)
    return encoder, torch.from_numpy(transform(frame)["numeric"])


def scaled_on_the_host():
    """What numpy makes of the awkward columns in float64: the reference, written out column by column."""
    numbers, indicators = [], []
    for name in AWKWARD:
        values = pd.to_numeric(pd.Series(AWKWARD[name]), errors="coerce").to_numpy(np.float64)
        values = np.where(np.isfinite(values), values, np.nan)
        if name in LOGS:
            values = np.sign(values) * np.log1p(np.abs(values))
        deviation = np.nanstd(values)
        numbers.append(np.nan_to_num((values - np.nanmean(values)) / (deviation if deviation > 1e-12 else 1)))
        if np.isnan(values).any():
            indicators.append(np.isnan(values))
    return np.stack([*numbers, *indicators], axis=1)


SPEC = TabularSpec.of(numeric=tuple(AWKWARD), log=LOGS)


@torch.no_grad()
def test_raw_numbers_are_scaled_as_numpy_scales_them():
    encoder, raw = learnt(SPEC)
    reference = scaled_on_the_host()
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
    spec = TabularSpec.of(numeric=tuple(AWKWARD), log=LOGS, bins=4, hidden_size=4)
    encoder, raw = learnt(spec)
    reference = scaled_on_the_host()
    edges = np.quantile(reference, np.linspace(0, 1, 5), axis=0).T  # [inputs, bins + 1]
    low, width = edges[:, :-1], np.maximum(np.diff(edges), 1e-9)
    expected = np.clip((reference[..., None] - low) / width, 0, 1)  # [rows, inputs, bins]
    assert (np.diff(edges)[:-4] == 0).any(), "quantiles coincide"
    low, width = (bound.numpy() for bound in encoder.numeric.bins())
    for rounding in (-2e-6, 0, 2e-6):
        scaled = encoder.scaler(raw).numpy() + rounding
        found = np.clip((scaled[..., None] - low) / width, 0, 1)
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_missing_number_is_the_mean_and_an_indicator():
    scaler = ColumnScaler(NumericShape(numeric=2, indicators=(1,)))
    scaler.mean.copy_(torch.tensor([5.0, 7.0]))
    nan = float("nan")
    assert scaler(torch.tensor([[nan, nan], [6.0, 7.0]])).tolist() == [[0, 0, 1], [1, 0, 0]]


def test_a_value_fills_the_bins_below_it_and_its_own_in_part():
    encoder = PiecewiseLinear(NumericShape(numeric=1, bins=3), embedding_size=3)
    encoder.edges.copy_(torch.tensor([[0.0, 1.0, 3.0, 7.0]]))
    with torch.no_grad():
        encoder.weight.copy_(torch.eye(3)[None])  # shows the encoding itself
    values = torch.tensor([[-5.0], [0.0], [0.5], [2.0], [4.0], [7.0], [99.0]])
    expected = [[0, 0, 0], [0, 0, 0], [0.5, 0, 0], [1, 0.5, 0], [1, 1, 0.25], [1, 1, 1], [1, 1, 1]]
    assert encoder(values).tolist() == expected


def test_every_column_has_its_own_bins_and_weights():
    encoder = PiecewiseLinear(NumericShape(numeric=2, bins=2), embedding_size=1)
    encoder.edges.copy_(torch.tensor([[0.0, 1.0, 2.0], [0.0, 10.0, 20.0]]))
    with torch.no_grad():
        encoder.weight.copy_(torch.tensor([[[1.0], [10.0]], [[100.0], [1000.0]]]))
        encoder.bias.copy_(torch.tensor([[0.25], [0.5]]))
    # Column 0: 1 of the first bin, half of the second; column 1: 3/10 of the first.
    assert encoder(torch.tensor([[1.5, 3.0]]))[0].tolist() == pytest.approx([1 + 5 + 0.25, 30 + 0.5])


def test_quantiles_that_coincide_make_a_step_and_no_nan():
    encoder = PiecewiseLinear(NumericShape(numeric=1, bins=2), embedding_size=2)
    encoder.edges.copy_(torch.tensor([[0.0, 0.0, 1.0]]))
    with torch.no_grad():
        encoder.weight.copy_(torch.eye(2)[None])
    assert encoder(torch.tensor([[-1.0], [0.0], [0.5]])).tolist() == [[0, 0], [0, 0], [1, 0.5]]

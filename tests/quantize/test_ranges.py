"""Ranges come from the rows that calibrate, and smoothing is chosen by rows that judge nothing."""

import numpy as np
import pytest
import torch

from bertforge.data.loader import Examples
from bertforge.data.tokens import TokenStore
from bertforge.evaluation.logits import predict_logits
from bertforge.model.points import linears, units
from bertforge.proof.simulation import layers_of, rounded, row_shifts
from bertforge.quantize import ranges
from bertforge.quantize.ranges import ALPHAS, find_ranges
from tests.model.tiny import tiny_bert

CALIBRATION, TUNING = np.arange(40), np.arange(40, 60)


@pytest.fixture
def model():
    return tiny_bert(vocab_size=100, max_position_embeddings=64)


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 30, size=60)
    ids = rng.integers(5, 90, size=lengths.sum()).astype(np.uint16)
    return Examples(TokenStore(ids, np.r_[0, np.cumsum(lengths)]), np.zeros(60, np.int64), 3, 48)


def test_a_range_is_the_largest_value_of_the_rows_that_calibrate(model, examples, monkeypatch):
    monkeypatch.setattr(ranges, "ALPHAS", (0.0,))
    name, seen = "bert.encoder.layer.1.intermediate.dense", {}

    def watch(module, inputs):
        seen["largest"] = max(seen.get("largest", 0.0), float(inputs[0].abs().max()))

    handle = model.get_submodule(name).register_forward_pre_hook(watch)
    largest = {}
    for part in (CALIBRATION, TUNING):
        seen.clear()
        predict_logits(model, examples, part, "fp32")
        largest[len(part)] = seen["largest"]
    handle.remove()
    scales = find_ranges(model, "int8", examples, CALIBRATION, TUNING)
    assert scales.activations[name] == pytest.approx(largest[40], rel=1e-6)
    assert largest[40] != largest[20]
    assert scales.activations.keys() == set(linears(units(model.config, "projections")))
    assert not scales.smooth


def test_a_channel_of_outliers_is_smoothed(model, examples):
    """LayerNorm gives one channel 100 times the size of the others, as it does in a trained BERT."""
    norm, after = model.bert.encoder.layer[0].attention.output.LayerNorm, model.bert.encoder.layer[0].intermediate.dense
    with torch.no_grad():
        norm.weight[3] *= 100
        norm.bias[3] *= 100
        after.weight[:, 3] /= 100
    scales = find_ranges(model, "int8", examples, CALIBRATION, TUNING)
    name = "bert.encoder.layer.0.intermediate.dense"
    assert scales.smooth[name][3] < 0.2 * np.median(scales.smooth[name])
    query, key = (scales.smooth[f"bert.encoder.layer.1.attention.self.{part}"] for part in ("query", "key"))
    assert np.array_equal(query, key), "what reads one value shares its factors"


def test_the_alpha_is_the_best_on_the_rows_that_tune(model, examples, monkeypatch):
    chosen = find_ranges(model, "int8", examples, CALIBRATION, TUNING)
    plain = predict_logits(model, examples, TUNING, "fp32")

    def moved(scales):
        with rounded(model, "int8", layers_of(model), scales):
            return float(row_shifts(plain, predict_logits(model, examples, TUNING, "fp32")).mean())

    each = []
    for alpha in ALPHAS:
        monkeypatch.setattr(ranges, "ALPHAS", (alpha,))
        each.append(moved(find_ranges(model, "int8", examples, CALIBRATION, TUNING)))
    assert moved(chosen) == pytest.approx(min(each))
    assert max(each) > min(each)

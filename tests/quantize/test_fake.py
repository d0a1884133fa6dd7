"""A model with quantizers computes 8-bit products, can be turned back, and comes back from disk bit for bit."""

import numpy as np
import pytest
import torch

from bertforge.batch import PaddedBatch, pack
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.model.points import units
from bertforge.quantize import calibrate, fake
from bertforge.scales import Scales
from tests.model.tiny import tiny_bert

SMALL = {"vocab_size": 100, "max_position_embeddings": 64, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(0)
    mask = torch.arange(40) < torch.tensor((1, 2, 17, 40))[:, None]
    return pack(PaddedBatch(torch.randint(5, 90, mask.shape) * mask, mask.long()))


@torch.no_grad()
def logits(model, batch):
    return model(batch).numpy()


def quantized(batch, form="int8", preset="projections", alpha=0.0, method="max"):
    """A tiny model, its plain logits, and itself with calibrated quantizers."""
    model = tiny_bert(**SMALL)
    plain = logits(model, batch)
    chosen = units(model.config, preset)

    def loop(network):
        logits(network, batch)

    fake.insert(model, form, preset)
    if alpha:
        fake.smooth(model, chosen, loop, alpha)
    fake.calibrate_weights(model, chosen)
    found = calibrate.ranges(model, form, chosen, method, loop)
    fake.set_activations(model, next(iter(found.values())))
    fake.quantize_only(model, chosen)
    return model, plain, chosen


@pytest.mark.parametrize("preset", ["ffn", "projections", "attention"])
@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_eight_bits_come_close_and_off_is_exactly_the_model(batch, form, preset):
    model, plain, _ = quantized(batch, form, preset)
    difference = np.abs(logits(model, batch) - plain).max()
    assert 1e-5 < difference < 0.1  # 7 bits of the largest value, or 3 of every value, through two layers
    fake.quantize_only(model, [])
    np.testing.assert_array_equal(logits(model, batch), plain)


def test_more_is_further_from_the_model(batch):
    """Each preset quantizes what the one before it does, and something more."""
    found = [logits(quantized(batch, preset=preset)[0], batch) for preset in ("ffn", "projections", "attention")]
    assert not np.array_equal(found[0], found[1])
    assert not np.array_equal(found[1], found[2])


def test_every_output_channel_of_a_weight_has_a_range_of_its_own(batch):
    """A channel a thousand times smaller than its neighbours is rounded as finely for its size as they are."""
    model = tiny_bert(**SMALL)
    name = "bert.encoder.layer.0.intermediate.dense"
    with torch.no_grad():
        model.get_submodule(name).weight[3] *= 1e-3
    fake.insert(model, "int8", "ffn")
    chosen = units(model.config, "ffn")
    fake.calibrate_weights(model, chosen)
    fake.quantize_only(model, chosen)
    linear = model.get_submodule(name)
    weight = linear.weight.detach()
    largest = weight.abs().amax(1, keepdim=True)  # [out, 1]
    assert largest[3] < 0.01 * largest.median()
    error = (linear.weight_quantizer(weight) - weight).abs()
    assert (error <= 1.001 * largest / 254).all(), "half a step of 127 on each side of 0"
    assert error.max() > 0.9 * largest.min() / 254


def test_smoothing_alone_changes_no_bit(batch):
    """Factors are powers of two; the control shows that they are not all one."""
    model, plain, chosen = quantized(batch, alpha=0.5)
    fake.quantize_only(model, [])
    np.testing.assert_array_equal(logits(model, batch), plain)
    smooth = fake.read_scales(model, "int8", chosen).smooth
    factors = np.unique(np.concatenate(list(smooth.values())))
    assert len(factors) > 2
    np.testing.assert_array_equal(np.log2(factors), np.round(np.log2(factors)))
    layer = "bert.encoder.layer.0.attention.self"
    np.testing.assert_array_equal(smooth[f"{layer}.query"], smooth[f"{layer}.value"])


@pytest.mark.parametrize(("form", "preset", "alpha"), [("int8", "attention", 0.5), ("fp8", "projections", 0.0)])
def test_a_quantized_model_reloads_bit_for_bit(tmp_path, batch, form, preset, alpha):
    model, plain, chosen = quantized(batch, form, preset, alpha)
    chosen = chosen[:-1]  # one unit spared
    fake.quantize_only(model, chosen)
    expected = logits(model, batch)
    fake.read_scales(model, form, chosen).save(tmp_path)
    state = fake.plain_state(model)
    fresh = BertForSequenceClassification(model.config).eval()
    fresh.load_state_dict(state)
    np.testing.assert_array_equal(logits(fresh, batch), plain)
    reloaded = fake.with_scales(fresh, Scales.load(tmp_path))
    np.testing.assert_array_equal(logits(reloaded, batch), expected)
    assert not np.array_equal(expected, plain)


def test_gradients_pass_the_rounding(batch):
    """Which by itself has none: the control rounds without ModelOpt."""
    model, _, _ = quantized(batch)
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    model(batch).sum().backward()
    assert weight.grad.abs().max() > 0
    rounded = torch.ones(3, requires_grad=True)
    rounded.round().sum().backward()
    assert rounded.grad.abs().max() == 0

"""The simulation rounds as engines do, and leaves the model as it was."""

import numpy as np
import pytest
import torch

from bertforge.data.loader import Examples
from bertforge.data.tokens import TokenStore
from bertforge.engines.base import BatchShape
from bertforge.engines.registry import TARGETS
from bertforge.engines.run import run
from bertforge.evaluation.logits import predict_logits
from bertforge.hardware import detect
from bertforge.model.points import linears, units
from bertforge.proof.simulation import layers_of, rounded, row_shifts, shifts_alone, sixteen_bits
from bertforge.quantize.ranges import find_ranges
from tests.engines.building import built
from tests.model.tiny import tiny_bert

ROWS = np.arange(60)


@pytest.fixture(scope="module")
def model():
    return tiny_bert(vocab_size=100, max_position_embeddings=64)


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 40, size=60)
    ids = rng.integers(5, 90, size=lengths.sum()).astype(np.uint16)
    return Examples(TokenStore(ids, np.r_[0, np.cumsum(lengths)]), np.zeros(60, np.int64), 3, 48)


def logits(model, examples):
    return predict_logits(model, examples, ROWS, "fp32")


def rms(found, wanted):
    return float(np.sqrt(np.square(found - wanted).mean()))


@pytest.mark.parametrize("precision", ["int8", "fp8", "fp16", "bf16"])
def test_each_precision_costs_what_its_bits_say_and_is_undone(model, examples, precision):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = logits(model, examples)
    with rounded(model, precision, layers_of(model)):
        off = rms(logits(model, examples), plain)
    # 2^-8 of the largest value, 2^-4, 2^-11 and 2^-8 of each value, through two layers whose logits spread over 1.
    low, high = {"int8": (0.02, 0.5), "fp8": (0.03, 1), "fp16": (3e-4, 0.01), "bf16": (3e-3, 0.1)}[precision]
    assert low < off < high
    assert np.array_equal(logits(model, examples), plain)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_float32_is_not_rounded(model, examples):
    plain = logits(model, examples)
    with rounded(model, "fp32", layers_of(model)), sixteen_bits(model, "fp32"):
        assert np.array_equal(logits(model, examples), plain)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_an_engine_without_rounding_is_the_model_with_its_stored_weights(model, examples, target, tmp_path):
    """And neither the plain model nor the engine as it is served."""
    scales = find_ranges(model, "int8", examples, ROWS, ROWS)
    engine = built(target, model, tmp_path, "int8", scales=scales, exact=True)
    found = run(engine, examples, ROWS, shape=BatchShape(tokens=1))
    with rounded(model, "int8", layers_of(model, scales), scales, activations=False):
        stored = logits(model, examples)
    np.testing.assert_allclose(found, stored, atol=1e-5)
    assert rms(found, logits(model, examples)) > 1e-3
    served = run(built(target, model, tmp_path, "int8", scales=scales), examples, ROWS)
    assert rms(served, stored) > 1e-3


@pytest.mark.parametrize(("target", "precision"), [("openvino", "int8"), ("onnxruntime", "int8"), ("openvino", "bf16")])
def test_an_engine_is_as_far_off_as_the_simulation_says(model, examples, tmp_path, target, precision):
    scales = find_ranges(model, "int8", examples, ROWS, ROWS) if precision == "int8" else None
    plain = logits(model, examples)
    eight = layers_of(model) if precision == "int8" else []
    rest = TARGETS[target].rest(detect()) if precision == "int8" else precision
    with rounded(model, precision, eight, scales), sixteen_bits(model, rest, eight):
        simulated = row_shifts(plain, logits(model, examples)).mean()
    engine = built(target, model, tmp_path, precision, scales=scales)
    found = row_shifts(plain, run(engine, examples, ROWS)).mean()
    # A CPU without bfloat16 computes the rest in float32.
    assert found < 2 * simulated
    assert precision != "int8" or found > simulated / 4


def test_a_shift_counts_a_row_on_which_the_model_is_sure():
    reference = np.array([[20.0, 0.0], [0.0, 20.0], [10.0, 10.0]])
    found = reference - np.array([[4.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    moved = row_shifts(reference, found)
    assert moved[0] > 0.01
    assert moved[1] == moved[2] == 0
    assert row_shifts(reference, reference + 3.0).max() == pytest.approx(0), "of all logits alike"


def test_the_part_that_suffers_is_named(model, examples):
    spoiled = tiny_bert(vocab_size=100, max_position_embeddings=64)
    spoiled.load_state_dict(model.state_dict())
    layer = spoiled.bert.encoder.layer[1]
    with torch.no_grad():  # the same function, with one channel 3,000 times as large as the others on the way
        layer.attention.self.value.weight[0] *= 3000
        layer.attention.self.value.bias[0] *= 3000
        layer.attention.output.dense.weight[:, 0] /= 3000
    np.testing.assert_allclose(logits(spoiled, examples), logits(model, examples), atol=1e-4)
    found = shifts_alone(spoiled, "int8", examples, ROWS, layers_of(spoiled))
    worst = max(found, key=lambda unit: found[unit])
    assert str(worst) == "attention-output of layer 1"
    assert found.keys() == set(units(model.config, "projections"))
    assert set(linears(found)) == set(layers_of(model))

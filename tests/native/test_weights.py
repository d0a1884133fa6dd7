"""The one-way copy: what is stored, in which type, and that it comes back as it was."""

import pytest
import torch

from bertforge.errors import ArtifactError
from bertforge.native.weights import WEIGHTS, NativeWeights
from tests.native.models import model, ranges

CPU = torch.device("cpu")


def every(weights):
    return [linear for layer in weights.layers for linear in (layer.qkv, layer.attended, layer.up, layer.down)]


@pytest.mark.parametrize(("form", "largest", "off"), [("int8", 127, 0.5), ("fp8", 448, 16)])
def test_a_weight_in_8_bits_is_the_models_within_half_a_step(form, largest, off):
    bert = model()
    weights = NativeWeights.of(bert, ranges(bert, form, smooth=True))
    layer, stored = bert.bert.encoder.layer[1], weights.layers[1].up
    assert stored.form == form
    assert stored.weight.float().abs().amax(1).eq(largest).all(), "every channel fills its range"
    # (x * multiplier) weight' * scale is x times the model's weight.
    again = stored.weight.float() * stored.multiplier * stored.scale[:, None]
    step = (stored.multiplier * stored.scale[:, None]) * off
    assert ((again - layer.intermediate.dense.weight).abs() <= 1.0001 * step).all()
    assert torch.equal(stored.bias, layer.intermediate.dense.bias)


def test_what_has_no_range_is_in_bfloat16():
    bert = model()
    assert {linear.form for linear in every(NativeWeights.of(bert, None))} == {"bf16"}
    spared = [f"bert.encoder.layer.1.attention.self.{part}" for part in ("query", "key", "value")]
    weights = NativeWeights.of(bert, ranges(bert, "int8", but=spared))
    assert [linear.form for linear in every(weights)] == ["int8"] * 4 + ["bf16"] + ["int8"] * 7


def test_query_key_and_value_are_one():
    bert = model()
    own, joined = bert.bert.encoder.layer[0].attention.self, NativeWeights.of(bert, None).layers[0].qkv
    for part, place in ((own.query, slice(0, 64)), (own.key, slice(64, 128)), (own.value, slice(128, 192))):
        assert torch.equal(joined.rows(place).weight, part.weight.bfloat16())
        assert torch.equal(joined.rows(place).bias, part.bias)


@pytest.mark.parametrize("form", [None, "int8", "fp8"])
def test_they_come_back_as_they_were(tmp_path, form):
    bert = model()
    weights = NativeWeights.of(bert, form and ranges(bert, form, smooth=True))
    weights.save(tmp_path)
    again = NativeWeights.load(tmp_path, CPU)
    assert again.config == weights.config
    for one, two in zip(every(weights), every(again), strict=True):
        assert one.form == two.form
        for name, tensor in vars(one).items():
            assert (tensor is None) == (getattr(two, name) is None)
            assert tensor is None or torch.equal(tensor.float(), getattr(two, name).float())
    assert again.head.keys() == weights.head.keys()
    assert torch.equal(again.words, weights.words)


def test_a_folder_that_is_not_whole_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"config\.json"):
        NativeWeights.load(tmp_path, CPU)
    NativeWeights.of(model(num_hidden_layers=2), None).save(tmp_path)
    model().config.save(tmp_path)
    with pytest.raises(ArtifactError, match=r"not whole.*bertforge compile"):
        NativeWeights.load(tmp_path, CPU)
    (tmp_path / WEIGHTS).write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"damaged.*bertforge compile"):
        NativeWeights.load(tmp_path, CPU)

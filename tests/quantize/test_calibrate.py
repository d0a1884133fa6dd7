"""Ranges are what their methods say they are."""

import numpy as np
import pytest
import torch

from bertforge.model.points import units
from bertforge.quantize import calibrate, fake
from tests.model.tiny import tiny_bert
from tests.quantize.test_fake import SMALL, batch, logits  # noqa: F401

POINT = "bert.encoder.layer.0.intermediate.dense"


@pytest.fixture(scope="module")
def found(batch):  # noqa: F811
    model = tiny_bert(**SMALL)
    inputs = []
    model.get_submodule(POINT).register_forward_pre_hook(lambda module, args: inputs.append(args[0].abs()))
    fake.insert(model, "int8", "projections")
    chosen = units(model.config, "projections")
    return calibrate.ranges(model, "int8", chosen, "best", lambda m: logits(m, batch)), torch.cat(inputs), chosen


def test_every_way_has_a_range_for_every_point(found):
    ways, _, chosen = found
    assert list(ways) == ["max", "entropy", "mse", *(f"percentile {share}" for share in calibrate.PERCENTILES)]
    for ranges in ways.values():
        assert ranges.keys() == {point for unit in chosen for point in unit.points}
        assert all(np.isfinite(value) and value > 0 for value in ranges.values())


def test_max_and_percentile_are_what_they_say(found):
    ways, inputs, _ = found
    assert ways["max"][POINT] == pytest.approx(float(inputs.max()), rel=1 / 2048)  # a bin of the histogram
    clipped = int((inputs > ways["percentile 99.9"][POINT]).sum())
    assert 1 <= clipped <= 2, "of 960 values"


def test_a_method_alone_and_what_fp8_has_not(batch):  # noqa: F811
    model = tiny_bert(**SMALL)
    fake.insert(model, "fp8", "ffn")
    chosen = units(model.config, "ffn")

    def ways(method):
        return list(calibrate.ranges(model, "fp8", chosen, method, lambda m: logits(m, batch)))

    assert ways("percentile") == [f"percentile {share}" for share in calibrate.PERCENTILES]
    assert "mse" in ways("best")
    assert "entropy" not in ways("best")

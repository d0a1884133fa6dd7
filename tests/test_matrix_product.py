"""The timer takes the fastest product after the first, and leaves the caller's random state alone."""

import pytest
import torch

from bertforge import matrix_product as module
from bertforge.matrix_product import product_seconds

SMALL = (8, 16, 24)


class Clock:
    """Of which each product takes the next of `seconds`, and the last one from then on."""

    def __init__(self, *seconds):
        self.now, self.seconds, self.begun = 0.0, list(seconds), False

    def __call__(self):
        if self.begun:
            self.now += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        self.begun = not self.begun
        return self.now


@pytest.mark.parametrize(
    ("seconds", "measure_s", "found"),
    [
        ((1, 5, 3, 4), 0.0, 3),  # the first warms up, and two follow whatever they take
        ((1, 5, 3, 2, 4), 10.0, 2),  # as many as fit
    ],
)
def test_the_fastest_after_the_first_counts(monkeypatch, seconds, measure_s, found):
    monkeypatch.setattr(module.time, "perf_counter", Clock(*seconds))
    assert product_seconds("cpu", "fp32", SMALL, measure_s) == found


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_the_product_has_the_shape_and_type_that_were_asked_for(precision):
    before = torch.get_rng_state()
    product = module._product("cpu", precision, (32, 16, 24))()
    expected = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int32}
    assert (product.shape, product.dtype) == ((32, 24), expected[precision])
    assert product.float().std() > 1, "no product of ones"
    assert torch.equal(torch.get_rng_state(), before)

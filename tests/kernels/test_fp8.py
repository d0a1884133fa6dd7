"""Weights and gradients in e4m3, and products of them, against float64."""

import pytest
import torch

from bertforge.kernels.fp8 import ACTIVATION_SCALE, E4M3, LARGEST, Fp8Weight, linear, linear_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_a_weight_is_kept_to_three_bits_in_both_layouts(size):
    weight = size * drawn(48, 32)
    short = Fp8Weight.of(weight)
    wide = short.rows.double() * short.scale.double()
    assert ((wide - weight).abs() <= weight.abs() / 15 + weight.abs().max() * 2**-19).all()
    assert short.rows.float().abs().max() == LARGEST
    assert torch.equal(short.columns.float(), short.rows.T.float())
    assert short.columns.is_contiguous()
    assert not Fp8Weight.of(torch.zeros(16, 16, device=DEVICE)).rows.float().any()


def test_growth_bounds_every_product_and_not_by_much():
    weight = drawn(64, 32)
    short = Fp8Weight.of(weight)
    longest = (weight * 1.0).norm(dim=0).argmax()
    aligned = weight[:, longest].sign()[None]  # the largest product that values of at most 1 can have
    assert (aligned @ weight).abs().max() <= short.growth
    assert (aligned @ weight).abs().max() >= short.growth / 2
    assert short.growth < 1.3 * 64**0.5 * weight.norm(dim=0).max()


def test_products_are_exact_but_for_the_rounding_of_the_result():
    weight, bias = Fp8Weight.of(drawn(48, 32)), drawn(48).bfloat16()
    wide = weight.rows.double() * weight.scale.double()
    x = (drawn(20, 32) * ACTIVATION_SCALE).to(E4M3)
    result = linear(x, weight, bias)
    expected = x.double() / ACTIVATION_SCALE @ wide.T + bias.double()
    assert result.dtype == torch.bfloat16
    assert (result.double() - expected).norm() < 4e-3 * expected.norm()
    grad, scale = (drawn(20, 48) * 100).to(E4M3), torch.tensor(3e-9, device=DEVICE)
    back = linear_backward(grad, scale, weight, torch.bfloat16).double()
    expected = scale.double() * grad.double() @ wide
    assert back.shape == (20, 32)
    assert (back - expected).norm() < 4e-3 * expected.norm()

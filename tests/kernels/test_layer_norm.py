"""LayerNorm(residual + dropout(x)) in PyTorch against plain PyTorch in float64."""

import pytest
import torch

from bertforge.kernels.layer_norm import residual_layer_norm, residual_layer_norm_backward
from tests.kernels.norms import check, check_plain, drawn, exact

# Largest difference relative to the largest entry: bfloat16 rounds the sum and the result.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 2e-2}


def ours(x, residual, grad, norm):
    torch.manual_seed(1)
    output, kept = residual_layer_norm(x, residual, norm)
    sum_grad, x_grad, sums = residual_layer_norm_backward(grad, output, kept, norm)
    return [output, sum_grad, x_grad, sums.weight, sums.bias, sums.x]


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (5, 384), (9, 767)])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("trained", [True, False])
def test_values_and_gradients_are_plain_pytorchs(rows, width, dtype, trained):
    parts = drawn(rows, width, dtype, trained=trained)
    check_plain(ours(*parts), parts, TOLERANCES[dtype])


@pytest.mark.parametrize("p", [0.1, 0.25, 0.9])
def test_dropout_drops_a_share_of_x_scales_the_rest_and_is_the_same_backward(p):
    parts = drawn(257, 383, torch.float32, p)  # 98,431 values: four to a draw leaves a rest
    _, sum_grad, x_grad, *_ = results = ours(*parts)
    mask = (x_grad / sum_grad).nan_to_num()  # told by the gradient of x beside that of the residual, the sum's
    assert torch.allclose(mask[mask != 0], torch.tensor(1 / (1 - p)))
    # The share's standard deviation is at most 0.0014.
    assert (mask == 0).float().mean().item() == pytest.approx(p, abs=0.006)
    check(results, exact(*parts, mask), TOLERANCES[torch.float32])


def test_dropout_follows_torchs_seed_and_looks_random_along_rows_and_columns():
    def kept(seed):
        x, residual, _, norm = drawn(256, 256, torch.float32, 0.5)
        torch.manual_seed(seed)
        return residual_layer_norm(x, residual, norm)[1][0] > 0

    first, other = kept(1), kept(2)
    assert torch.equal(first, kept(1))
    # Two fair coins agree half of the time: 65,536 throws deviate by 0.002. Four neighbours share a draw.
    flat = first.flatten()
    pairs = [(first, other), (first[1:], first[:-1]), (first, first.T)]
    for one, two in [*pairs, *((flat[distance:], flat[:-distance]) for distance in (1, 2, 3, 4))]:
        assert (one == two).float().mean().item() == pytest.approx(0.5, abs=0.02)
    for axis in (0, 1):  # each row and each column has its share: 256 throws deviate by 0.031
        assert (first.float().mean(axis) - 0.5).abs().max() < 0.15

"""LayerNorm(residual + dropout(x)) against plain PyTorch in float64; see test_attention_triton.py for where it runs."""
# ruff: noqa: E402  # what the interpreter needs is set before the imports

import os
from dataclasses import astuple, replace

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton, and then a kernel, is imported
pytest.importorskip("triton", reason="the kernels need triton, which comes with torch for CUDA: pip install triton")

from bertforge.kernels.fp8 import ACTIVATION_SCALE, E4M3, Fp8Rows
from bertforge.kernels.layer_norm_triton import (
    Tiling,
    residual_layer_norm,
    residual_layer_norm_backward,
)
from tests.kernels import norms
from tests.kernels.e4m3 import round_as_hardware_does
from tests.kernels.norms import check, check_plain, exact

DEVICE = "cuda" if CUDA else "cpu"
# Largest difference relative to the largest entry: a rounding of the result, half of 2^-7 or 2^-10, and another one of
# what was kept, to which the gradients of weight and bias add up many.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 2.5e-3, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if CUDA else [torch.float32, torch.float16]


def drawn(*arguments, **options):
    return norms.drawn(*arguments, **options, device=DEVICE)


def flat(gradients):
    *two, sums = gradients
    return [*two, *astuple(sums)]


def ours(x, residual, grad, norm, **tiling):
    output, kept = residual_layer_norm(x, residual, norm, **tiling)
    return [output, *flat(residual_layer_norm_backward(grad, output, kept, norm, **tiling))]


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (5, 384), (9, 768), (4, 1024)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trained", [True, False])
def test_values_and_gradients_are_plain_pytorchs(rows, width, dtype, trained):
    parts = drawn(rows, width, dtype, trained=trained)
    check_plain(ours(*parts), parts, TOLERANCES[dtype])


def mask_of(parts):
    """What dropout did to `x`, told by the gradient of x beside that of the residual, which is the sum's."""
    _, sum_grad, x_grad, *_ = ours(*parts)
    return (x_grad / sum_grad).nan_to_num()


@pytest.mark.parametrize("trained", [True, False])
def test_dropout_drops_a_share_of_x_scales_the_rest_and_is_the_same_backward(trained):
    parts = drawn(64, 384, torch.float32, 0.25, trained)
    mask = mask_of(parts)
    assert torch.allclose(mask[mask != 0], torch.tensor(4 / 3, device=DEVICE))
    # 24,576 draws: the share's standard deviation is 0.0028.
    assert (mask == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    check(ours(*parts), exact(*parts, mask), TOLERANCES[torch.float32])


def test_dropout_follows_its_seed_and_looks_random_along_rows_and_columns():
    *tensors, norm = drawn(256, 256, torch.float32, 0.5)
    first = mask_of((*tensors, norm)) > 0
    assert torch.equal(first, mask_of((*tensors, norm)) > 0)
    other = mask_of((*tensors, replace(norm, seed=norm.seed + 1))) > 0
    # Two fair coins agree half of the time: 65,536 throws deviate by 0.002.
    for one, two in ((first, other), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1]), (first, first.T)):
        assert (one == two).float().mean().item() == pytest.approx(0.5, abs=0.02)
    for axis in (0, 1):  # each row and each column has its share: 256 throws deviate by 0.031
        assert (first.float().mean(axis) - 0.5).abs().max() < 0.15


def test_the_sum_counts_and_not_x_alone():
    x, residual, _, norm = drawn(3, 16, torch.float32)
    assert not torch.allclose(
        residual_layer_norm(x, residual, norm)[0], residual_layer_norm(x, -residual, norm)[0], 0.1
    )


def test_a_frozen_norm_with_a_weight_of_zero_passes_finite_gradients():
    x, residual, grad, norm = drawn(5, 48, torch.float32, trained=False)
    norm.weight[3] = 0.0
    output, *gradients = ours(x, residual, grad, norm)
    expected = exact(x, residual, grad, norm)
    check([output], expected[:1], TOLERANCES[torch.float32])
    # That column's own value is lost, and with it its share of the projection on the normalized row.
    others = torch.arange(48, device=DEVICE) != 3
    check([gradients[0][:, others]], [expected[1][:, others]], TOLERANCES[torch.float32])
    assert gradients[0].isfinite().all()


@pytest.mark.parametrize("tiling", [Tiling(1, 1), Tiling(2, 4), Tiling(8, 8)], ids=str)
def test_programs_walk_over_more_rows_than_they_hold(tiling, monkeypatch):
    monkeypatch.setattr("bertforge.kernels.layer_norm_triton.PROGRAMS", 2)
    parts = drawn(37, 48, torch.float32)
    check(ours(*parts, tiling=tiling), exact(*parts), TOLERANCES[torch.float32])


def test_two_runs_are_equal_bit_for_bit():
    parts = drawn(37, 48, torch.float32, 0.1)
    for first, then in zip(ours(*parts), ours(*parts), strict=True):
        assert torch.equal(first, then)


def test_the_output_is_written_in_e4m3_too(monkeypatch):
    round_as_hardware_does(monkeypatch)
    x, residual, _, norm = drawn(9, 48, torch.float32)
    norm.bias[5] = 100.0  # beyond what e4m3 holds at this scale
    plain, _ = residual_layer_norm(x, residual, norm)
    short = torch.empty_like(x, dtype=E4M3)
    output, _ = residual_layer_norm(x, residual, norm, fp8=short)
    assert torch.equal(output, plain)
    assert torch.equal(short.float(), (plain * ACTIVATION_SCALE).clamp(-448, 448).to(E4M3).float())
    assert (short[:, 5].float() == 448).all()


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("trained", [True, False])
def test_the_gradient_of_x_is_written_in_e4m3_scaled_by_rows(dropout_p, trained, monkeypatch):
    round_as_hardware_does(monkeypatch)
    x, residual, grad, norm = drawn(9, 48, torch.float32, dropout_p, trained)
    grad *= torch.logspace(-12, 2, 9, device=DEVICE)[:, None]
    grad[4] = 0.0
    output, kept = residual_layer_norm(x, residual, norm)
    *plain, plain_sums = residual_layer_norm_backward(grad, output, kept, norm)
    rows = Fp8Rows.empty(x)
    sum_grad, short, sums = residual_layer_norm_backward(grad, output, kept, norm, fp8=rows)
    assert short is rows.values
    # Row by row, for rows differ by 14 orders of magnitude; cut up differently, sums may differ in the last bit.
    assert ((sum_grad - plain[0]).norm(dim=1) <= 1e-6 * plain[0].norm(dim=1)).all()
    for result, other in zip(astuple(sums), astuple(plain_sums), strict=True):
        assert torch.allclose(result, other, rtol=1e-5) if trained else result is None
    wide, expected = rows.values.float() * rows.scale, plain[1]
    assert ((wide - expected).abs() <= expected.abs() / 15 + rows.scale * 2**-9).all()
    assert (rows.values.float().abs().amax(1)[grad.any(1)] == 448).all()
    assert not rows.values[4].float().any()


def test_the_outputs_gradient_may_come_in_two_parts():
    x, residual, grad, norm = drawn(9, 48, torch.float32, 0.25)
    output, kept = residual_layer_norm(x, residual, norm)
    whole = residual_layer_norm_backward(grad, output, kept, norm)
    scale = torch.arange(1.0, 10.0, device=DEVICE)[:, None]
    other = torch.ones_like(grad) / scale, scale
    parts = residual_layer_norm_backward(grad - 1, output, kept, norm, addend=other)
    half = residual_layer_norm_backward(grad - 1, output, kept, norm)
    check(flat(parts), [part.double() for part in flat(whole)], TOLERANCES[torch.float32])
    assert not torch.allclose(half[0], whole[0], rtol=0.01)

"""The adapted weight and its gradients, by kernel and by PyTorch; see test_attention_triton.py for where it runs."""
# ruff: noqa: E402  # what the interpreter needs is set before the imports

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton, and then a kernel, is imported
pytest.importorskip("triton", reason="the kernels need triton, which comes with torch for CUDA: pip install triton")

from bertforge.kernels.low_rank import LARGEST, adapted_weight
from bertforge.kernels.low_rank_triton import AdaptedWeight

DEVICE = "cuda" if CUDA else "cpu"
# ||ours - exact|| / ||exact||: float32's sums, or one rounding of the result (of the gradient that comes, backward).
TOLERANCES = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def drawn(out, inner, rank):
    torch.manual_seed(0)
    return [torch.randn(*shape, device=DEVICE) for shape in ((out, inner), (rank, inner), (out, rank), (out, inner))]


def exact(weight, a, b, grad):
    a, b = a.double().requires_grad_(), b.double().requires_grad_()
    result = weight.double() + 0.5 * b @ a
    return [result, *torch.autograd.grad(result, (a, b), grad.double())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (48, 80, 3), (130, 200, 8), (64, 300, 20)], ids=str)
def test_the_kernel_gives_plain_pytorchs_values_and_gradients(shape, dtype):
    weight, a, b, grad = drawn(*shape)
    own = [part.clone().requires_grad_() for part in (a, b)]
    result = AdaptedWeight.apply(weight, *own, 0.5, dtype)
    assert result.dtype == dtype
    found = [result, *torch.autograd.grad(result, own, grad.to(dtype))]
    for mine, other in zip(found, exact(weight, a, b, grad), strict=True):
        assert (mine.double() - other).norm() < TOLERANCES[dtype] * other.norm()


def test_a_base_weight_that_is_trained_is_refused():
    weight, a, b, _ = drawn(48, 80, 3)
    with pytest.raises(AssertionError, match="frozen"):
        AdaptedWeight.apply(weight.requires_grad_(), a, b, 0.5, torch.float32)


@pytest.mark.skipif(not CUDA, reason="a CPU takes PyTorch's products at any rank")
@pytest.mark.parametrize("rank", [LARGEST, 256])
def test_a_rank_that_the_tiles_do_not_hold_is_left_to_pytorch(rank):
    weight, a, b, grad = drawn(300, 300, rank)
    for part in (a, b):
        part.requires_grad_()
    result = adapted_weight(weight, a, b, 0.5)
    found = [result, *torch.autograd.grad(result, (a, b), grad)]
    for mine, other in zip(found, exact(weight, a.detach(), b.detach(), grad), strict=True):
        assert (mine.double() - other).norm() < 1e-6 * other.norm()


def test_the_function_keeps_the_weights_type_and_sums_in_a_wider_one():
    weight, a, b, grad = drawn(48, 80, 3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        result = adapted_weight(weight.to(dtype), a, b, 0.5)
        assert result.dtype == dtype
        expected = exact(weight.to(dtype), a, b, grad)[0].detach()
        # Entries reach 10, of which float32 rounds 6e-7 off in each of its 7 operations; then one rounding to bfloat16.
        rounding = torch.finfo(dtype).eps / 2 if dtype is torch.bfloat16 else 0.0
        assert torch.all((result.double() - expected).abs() <= 5e-6 + rounding * expected.abs())

"""Products for inference, in 8 bits and more, against PyTorch in float64; see test_attention_triton.py for where."""
# ruff: noqa: E402  # what the interpreter needs is set before the imports

import os

import pytest
import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton, and then a kernel, is imported
pytest.importorskip("triton", reason="the kernels need triton, which comes with torch for CUDA: pip install triton")

from bertforge.kernels.linear_gelu_triton import Tiling
from bertforge.kernels.product_triton import linear_activation, product
from bertforge.model.encoder import ACTIVATIONS
from tests.kernels.e4m3 import round_as_hardware_does

DEVICE = "cuda" if CUDA else "cpu"
WIDE = torch.bfloat16 if CUDA else torch.float32  # the interpreter's bfloat16 products are wrong
HAS_FP8 = not CUDA or torch.cuda.get_device_capability() >= (8, 9)
TYPES = [WIDE, torch.int8, *([torch.float8_e4m3fn] if HAS_FP8 else [])]
TILINGS = (
    [Tiling(64, 64, 64, 8, 4, 3, 1), Tiling(64, 256, 64, 2, 4, 2, 1)] if CUDA else [Tiling(32, 32, 32, 2, 4, 2, 1)]
)
BFLOAT16 = 2**-8 if CUDA else 2**-7  # of a value, what a result may be off: the interpreter cuts digits off
SHAPES = [(1, 16, 48), (100, 48, 80), (130, 64, 272)]  # tokens, in, out


@pytest.fixture(autouse=True)
def hardware_rounding(monkeypatch):
    if not CUDA:
        round_as_hardware_does(monkeypatch)


def drawn(shape, dtype):
    """x and weight as their type holds them, and scale, bias and multiplier."""
    torch.manual_seed(0)
    tokens, inner, outer = shape
    x, weight = torch.randn(tokens, inner), torch.randn(outer, inner)
    if dtype == torch.int8:
        x, weight = (x * 40).round().clamp(-128, 127), (weight * 40).round().clamp(-127, 127)
    scale = torch.rand(outer) * (1e-3 if dtype == torch.int8 else 0.3)
    vectors = [part.to(DEVICE) for part in (scale, torch.randn(outer), 10 * torch.rand(outer))]
    return x.to(DEVICE, dtype), weight.to(DEVICE, dtype), *vectors


def multiplied(x, weight):
    return x.double() @ weight.double().T


def nearest(values, dtype):
    """`values`, float64, in the range of `dtype`, and how far a rounded result may lie off."""
    if dtype == torch.int8:
        return values.clamp(-128, 127), torch.full_like(values, 0.5)
    if dtype == torch.float8_e4m3fn:
        cut = values.clamp(-448, 448)
        return cut, cut.abs() / 16 + 2**-10
    return values, values.abs() * (BFLOAT16 if dtype == torch.bfloat16 else 2**-22)


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_alone(shape, dtype, tiling):
    x, weight, *_ = drawn(shape, dtype)
    out = torch.full((shape[0], shape[2]), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    product(x, weight, out, tiling)
    exact = multiplied(x, weight)
    # Rounded to bfloat16, and where the sum is of 14 bits (e4m3 on Hopper) 2^-10 of what is summed.
    allowed = exact.abs() * BFLOAT16 + multiplied(x.double().abs(), weight.double().abs()) * 2**-10
    assert ((out.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "tanh"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_follows_a_product_is_in_it(shape, dtype, activation):
    x, weight, scale, bias, multiplier = drawn(shape, dtype)
    for tiling in TILINGS:
        out = torch.full((shape[0], shape[2]), 77, device=DEVICE).to(dtype)
        linear_activation(x, weight, scale, bias, multiplier, out, activation, tiling)
        before = multiplied(x, weight) * scale.double() + bias.double()
        exact = {**ACTIVATIONS, "tanh": torch.tanh}[activation](before) * multiplier.double()
        wanted, off = nearest(exact, dtype)
        # GELU's fit, the hardware's tanh, and sums as above; rounding comes on top.
        summed = multiplied(x.double().abs(), weight.double().abs()) * scale.double() * 2**-10
        off = 1.01 * off + (4e-4 * before.abs() + 4e-5 + summed) * multiplier.double() * (1.2 if CUDA else 1)
        assert ((out.double() - wanted).abs() <= off).all()


@pytest.mark.parametrize("dtype", [WIDE], ids=str)
def test_without_scale_and_multiplier_both_are_1(dtype):
    x, weight, _, bias, _ = drawn((40, 32, 48), dtype)
    out = torch.empty(40, 48, dtype=dtype, device=DEVICE)
    linear_activation(x, weight, None, bias, None, out, "relu", TILINGS[0])
    exact = F.relu(multiplied(x, weight) + bias.double())
    assert torch.allclose(out.double(), exact, rtol=2**-7 if CUDA else 1e-5, atol=1e-4)


def test_integers_are_rounded_to_even_and_cut_at_both_ends():
    x = torch.tensor([[-300, -128, -3, -1, 0, 1, 3, 5, 254, 999]], dtype=torch.float32).T  # halves of what is wanted
    x = F.pad(x, (0, 15)).to(DEVICE, WIDE)
    weight = F.pad(torch.ones(1, 1), (0, 15, 0, 15)).to(DEVICE, WIDE)
    out = torch.empty(10, 16, dtype=torch.int8, device=DEVICE)
    half, zero = torch.full((16,), 0.5, device=DEVICE), torch.zeros(16, device=DEVICE)
    linear_activation(x, weight, half, zero, None, out, "relu", TILINGS[0])
    assert out[:, 0].tolist() == [0, 0, 0, 0, 0, 0, 2, 2, 127, 127], "1.5 becomes 2, 2.5 becomes 2"
    linear_activation(x, weight, half, zero - 200, -torch.ones(16, device=DEVICE), out, "relu", TILINGS[0])
    assert out[:, 0].tolist() == [0] * 9 + [-128], "-299.5 is cut"

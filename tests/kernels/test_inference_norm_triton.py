"""LayerNorms for inference against PyTorch in float64; see test_attention_triton.py for where they run."""
# ruff: noqa: E402  # what the interpreter needs is set before the imports

import os

import pytest
import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton, and then a kernel, is imported
pytest.importorskip("triton", reason="the kernels need triton, which comes with torch for CUDA: pip install triton")

from bertforge.kernels import inference_norm_triton
from bertforge.kernels.inference_norm_triton import embed, residual_norm
from tests.kernels.e4m3 import round_as_hardware_does

DEVICE = "cuda" if CUDA else "cpu"
BFLOAT16 = 2**-8 if CUDA else 2**-7  # of a value, what a result may be off: the interpreter cuts digits off
TYPES = [torch.int8, torch.float8_e4m3fn]


@pytest.fixture(autouse=True)
def hardware_rounding(monkeypatch):
    if not CUDA:
        round_as_hardware_does(monkeypatch)


def norm_of(width):
    torch.manual_seed(0)
    return torch.randn(width, device=DEVICE), torch.randn(width, device=DEVICE), 1e-12


def check(output, short, exact, multiplier):
    """Both results are the exact ones, rounded to their types."""
    assert torch.allclose(output.double(), exact, rtol=BFLOAT16, atol=1e-5)
    if short is None:
        return
    wanted = exact * multiplier.double()
    low, high = (-128, 127) if short.dtype == torch.int8 else (-448, 448)
    wanted = wanted.clamp(low, high)
    off = 0.502 if short.dtype == torch.int8 else wanted.abs() / 15.9 + 2**-9
    assert ((short.double() - wanted).abs() <= off).all()
    assert (wanted != exact * multiplier.double()).any(), "some values are cut, or nothing is shown of that"


def shorts(tokens, width, dtype):
    if dtype is None:
        return None, None
    multiplier = 20 + 80 * torch.rand(width, device=DEVICE)
    return multiplier * (3 if dtype != torch.int8 else 1), torch.empty(tokens, width, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", [None, *TYPES], ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (7, 48), (130, 80)])
def test_a_residual_branch_ends(tokens, width, dtype, monkeypatch):
    norm = norm_of(width)
    x, residual = (torch.randn(tokens, width, device=DEVICE).bfloat16() for _ in range(2))
    scale, shift = torch.rand(width, device=DEVICE), torch.randn(width, device=DEVICE)
    exact = F.layer_norm(
        x.double() * scale.double() + shift.double() + residual.double(),
        (width,), norm[0].double(), norm[1].double(), norm[2],
    )  # fmt: skip
    multiplier, short = shorts(tokens, width, dtype)
    for few in (inference_norm_triton.SPREAD_UP_TO, 0):  # as for small packs, and as for large ones
        monkeypatch.setattr(inference_norm_triton, "SPREAD_UP_TO", few)
        output = torch.full((tokens, width), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        residual_norm(x, scale, shift, residual, norm, output, multiplier, short)
        check(output, short, exact, multiplier)
    own = residual.clone()
    residual_norm(x, scale, shift, own, norm, own, None, None)
    assert torch.equal(own, output), "it may be written over the residual"


def test_without_a_scale_it_is_1():
    norm, x = norm_of(48), torch.randn(5, 48, device=DEVICE).bfloat16()
    shift, one = torch.randn(48, device=DEVICE), torch.ones(48, device=DEVICE)
    first, second = torch.empty_like(x), torch.empty_like(x)
    residual_norm(x, None, shift, x, norm, first, None, None)
    residual_norm(x, one, shift, x, norm, second, None, None)
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [None, *TYPES], ids=str)
def test_embeddings(dtype):
    tokens, width, norm = 37, 48, norm_of(48)
    words = torch.randn(100, width, device=DEVICE).bfloat16()
    places = torch.randn(20, width, device=DEVICE)
    ids = torch.randint(0, 100, (tokens,), device=DEVICE, dtype=torch.int32)
    positions = torch.arange(tokens, device=DEVICE, dtype=torch.int32) % 20
    summed = words[ids.long()].double() + places[positions.long()].double()
    exact = F.layer_norm(summed, (width,), norm[0].double(), norm[1].double(), norm[2])
    multiplier, short = shorts(tokens, width, dtype)
    output = torch.full((tokens, width), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    embed(ids, positions, words, places, norm, output, multiplier, short)
    check(output, short, exact, multiplier)

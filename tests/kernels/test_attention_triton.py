"""Our packed attention against softmax(QK'/sqrt(d))V and its gradients in float64, one sequence at a time.

On a GPU the kernels run in bfloat16 and float16, elsewhere in Triton's interpreter, which is right in float32 and
float16 and wrong in bfloat16.
"""
# ruff: noqa: E402  # what the interpreter needs is set before the imports

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton, and then a kernel, is imported
pytest.importorskip("triton", reason="the kernels need triton, which comes with torch for CUDA: pip install triton")

import triton.language as tl

from bertforge.kernels import attention_triton
from bertforge.kernels.attention_triton import ALIGNED, TILINGS, Tiling, Tilings, backward, forward, packed_attention
from tests.kernels.test_attention import reference

DEVICE = "cuda" if CUDA else "cpu"
HEADS = 2
LENGTHS = {
    "one token": (1,),
    "odd lengths": (3, 1, 17, 64, 5, 129),
    "empty at the end": (7, 1, 0, 0),
    "empty in the middle and at the start": (0, 0, 2, 0, 9),
    "as long as tiles": (64, 128, 64),
    "the longest": (3, 512),
}
# ||ours - exact|| / ||exact||. Inputs are rounded before either computes, so what is left is the rounding of weights
# and results, half of 2^-10 or 2^-7 each, which partly cancels; float32 is there to see that nothing else differs.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = [torch.bfloat16, torch.float16] if CUDA else [torch.float32, torch.float16]


def packed(lengths, dtype, head_dim=64, heads=HEADS):
    """Query, key, value and the result's gradient `[tokens, heads, head_dim]`, and `cu_seqlens`."""
    torch.manual_seed(0)
    parts = [torch.randn(sum(lengths), heads, head_dim).to(DEVICE, dtype) for _ in range(4)]
    return parts, torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def ours(parts, cu_seqlens):
    """The values and the gradients of query, key and value."""
    *inputs, grad = parts
    inputs = [part.detach().clone().requires_grad_() for part in inputs]
    values, _ = packed_attention(*inputs, cu_seqlens)
    values.backward(grad)
    return [values.detach(), *(part.grad for part in inputs)]


def exact(parts, cu_seqlens):
    *inputs, grad = (part.cpu().double() for part in parts)
    inputs = [part.requires_grad_() for part in inputs]
    values = reference(*inputs, cu_seqlens)
    values.backward(grad)
    return [values.detach(), *(part.grad for part in inputs)]


def error(result, expected):
    """||result - expected|| / ||expected||, or / 1 for one token: its softmax is constant, so there is no gradient."""
    return float((result.cpu().double() - expected).norm() / expected.norm().clamp_min(1))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("head_dim", TILINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_the_references(lengths, head_dim, dtype):
    parts, cu_seqlens = packed(lengths, dtype, head_dim)
    for result, expected in zip(ours(parts, cu_seqlens), exact(parts, cu_seqlens), strict=True):
        assert result.dtype == dtype
        assert error(result, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("tiling", [Tiling(64, 32, 4, 2), Tiling(128, 64, 8, 1), Tiling(32, 16, 4, 2)], ids=str)
def test_any_tiling_gives_the_same(tiling):
    parts, cu_seqlens = packed((3, 129, 0, 64), DTYPES[0])
    *inputs, grad = parts
    tilings = Tilings(tiling, tiling, tiling)
    values, lse = forward(*inputs, cu_seqlens, tilings)
    results = [values, *backward(grad, (*inputs, cu_seqlens), values, lse, tilings)]
    for result, expected in zip(results, exact(parts, cu_seqlens), strict=True):
        assert error(result, expected) < TOLERANCES[DTYPES[0]]


def test_tilings_keep_what_the_kernels_rely_on():
    for tilings in TILINGS.values():
        each = (tilings.forward, tilings.query_gradient, tilings.key_value_gradients)
        assert all(ALIGNED.value % tiling.block == 0 for tiling in each)
        assert max(tiling.step for tiling in each) <= min(tiling.block for tiling in each)


def test_a_sequence_depends_on_its_own_tokens_even_next_to_one_that_is_not_a_number():
    parts, cu_seqlens = packed((3, 17, 1, 70), DTYPES[0])
    before = ours(parts, cu_seqlens)
    for part in parts:
        part[3:20] = float("nan")
    for first, then in zip(before, ours(parts, cu_seqlens), strict=True):
        assert torch.equal(first[:3], then[:3])
        assert torch.equal(first[20:], then[20:])
        assert then[3:20].isnan().all()


def test_two_runs_are_equal_bit_for_bit():
    parts, cu_seqlens = packed((100, 1, 129, 0), DTYPES[0])
    for first, then in zip(ours(parts, cu_seqlens), ours(parts, cu_seqlens), strict=True):
        assert torch.equal(first, then)


@pytest.mark.parametrize("score", [-600.0, 600.0])
def test_scores_far_from_zero_neither_overflow_nor_vanish(score):
    # All of a row's scores lie near `score`, where float32 keeps 2^-14 of an exponent; the padding's lie at 0.
    parts, cu_seqlens = packed((70,), DTYPES[0])
    query, key, _, _ = parts
    query[..., 0], key[..., 0] = 64.0, score / 8
    query[..., 1:] /= 8
    results = ours(parts, cu_seqlens)
    assert all(result.isfinite().all() for result in results)
    assert error(results[0], exact(parts, cu_seqlens)[0]) < max(1e-3, TOLERANCES[DTYPES[0]])


def test_slices_of_joined_projections_are_read_in_place_and_other_layouts_too():
    (query, key, value, grad), cu_seqlens = packed((3, 65), DTYPES[0])
    expected = ours((query, key, value, grad), cu_seqlens)
    joined = torch.stack([query, key, value], 1)  # [tokens, 3, heads, head_dim]
    turned = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in (query, key, value, grad)]
    for parts in ((*joined.unbind(1), grad), turned):
        for result, other in zip(ours(parts, cu_seqlens), expected, strict=True):
            assert torch.equal(result, other)


def test_more_sequences_than_one_vector_load_finds(monkeypatch):
    if not CUDA:  # the interpreter takes minutes for 1,500 sequences, and reads globals at each call
        monkeypatch.setattr(attention_triton, "SEARCHED", tl.constexpr(4))
    lengths = (1, 2, 0) * (500 if CUDA else 4)
    parts, cu_seqlens = packed(lengths, DTYPES[0], 32)
    for result, expected in zip(ours(parts, cu_seqlens), exact(parts, cu_seqlens), strict=True):
        assert error(result, expected) < TOLERANCES[DTYPES[0]]


def test_the_operator_keeps_its_promises_to_autograd_and_torch_compile():
    (query, key, value, grad), cu_seqlens = packed((3, 65, 0), DTYPES[0])
    inputs = tuple(part.requires_grad_() for part in (query, key, value))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(packed_attention, (*inputs, cu_seqlens), test_utils=checks)
    compiled = torch.compile(lambda *args: packed_attention(*args)[0] * 1, backend="aot_eager", fullgraph=True)
    compiled(*inputs, cu_seqlens).backward(grad)
    for part, expected in zip(inputs, ours((query, key, value, grad), cu_seqlens)[1:], strict=True):
        assert torch.equal(part.grad, expected)


@pytest.mark.skipif(not CUDA, reason="CUDA graphs need a CUDA device")
def test_a_cuda_graph_replays_other_lengths():
    parts, cu_seqlens = packed((100, 28), torch.bfloat16)
    ours(parts, cu_seqlens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = ours(parts, cu_seqlens)
    cu_seqlens.copy_(torch.tensor([0, 9, 128]))
    graph.replay()
    for result, expected in zip(results, exact(parts, cu_seqlens), strict=True):
        assert error(result, expected) < TOLERANCES[torch.bfloat16]

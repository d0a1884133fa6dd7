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
from bertforge.kernels.attention import Bounds
from bertforge.kernels.attention_triton import ALIGNED, TILINGS, Tiling, Tilings, backward, forward
from tests.kernels import packs
from tests.kernels.e4m3 import round_as_hardware_does
from tests.kernels.packs import check_apart, check_reference, check_repeatable, error, exact

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


def packed(lengths, dtype, head_dim=64):
    return packs.packed(lengths, dtype, head_dim, HEADS, DEVICE)


def ours(parts, cu_seqlens, tilings=None, cu_seqlens_q=None):
    """The values and the gradients of query, key and value."""
    *inputs, grad = parts
    bounds = Bounds(cu_seqlens if cu_seqlens_q is None else cu_seqlens_q, cu_seqlens)
    values = forward(*inputs, bounds, tilings)
    gradients = [torch.full(part.shape, float("nan"), dtype=part.dtype, device=DEVICE) for part in inputs]
    backward(grad, (*inputs, bounds), values, gradients, tilings)
    return [values[0], *gradients]


def first_of(cu_seqlens, *parts):
    """The rows of `parts` with which a sequence begins, and the bounds of these queries, one a sequence."""
    starts = cu_seqlens[:-1].long()
    return [part[starts] for part in parts], torch.arange(len(cu_seqlens), device=DEVICE).int()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("head_dim", TILINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_the_references(lengths, head_dim, dtype):
    check_reference(ours, *packed(lengths, dtype, head_dim), TOLERANCES[dtype])


@pytest.mark.parametrize("tiling", [Tiling(64, 32, 4, 2), Tiling(128, 64, 8, 1), Tiling(32, 16, 4, 2)], ids=str)
def test_any_tiling_gives_the_same(tiling):
    parts, cu_seqlens = packed((3, 129, 0, 64), DTYPES[0])
    results = ours(parts, cu_seqlens, Tilings(tiling, tiling, tiling))
    for result, expected in zip(results, exact(parts, cu_seqlens), strict=True):
        assert error(result, expected) < TOLERANCES[DTYPES[0]]


def test_tilings_keep_what_the_kernels_rely_on():
    for tilings in TILINGS.values():
        each = (tilings.forward, tilings.query_gradient, tilings.key_value_gradients)
        assert all(ALIGNED.value % tiling.block == 0 for tiling in each)
        assert max(tiling.step for tiling in each) <= min(tiling.block for tiling in each)


def test_a_sequence_depends_on_its_own_tokens_even_next_to_one_that_is_not_a_number():
    check_apart(ours, *packed((3, 17, 1, 70), DTYPES[0]))


def test_two_runs_are_equal_bit_for_bit():
    check_repeatable(ours, *packed((100, 1, 129, 0), DTYPES[0]))


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


def test_gradients_are_written_into_slices_of_a_joined_tensor():
    parts, cu_seqlens = packed((3, 65), DTYPES[0])
    *inputs, grad = parts
    joined = torch.full((68, 3, HEADS, 64), float("nan"), dtype=DTYPES[0], device=DEVICE)
    bounds = Bounds(cu_seqlens, cu_seqlens)
    backward(grad, (*inputs, bounds), forward(*inputs, bounds), joined.unbind(1))
    assert torch.equal(joined, torch.stack(ours(parts, cu_seqlens)[1:], 1))


def test_first_tokens_alone_get_what_they_get_among_all():
    parts, cu_seqlens = packed((3, 1, 17, 129), DTYPES[0])
    query, key, value, grad = parts
    (asked, their_grad), cu_seqlens_q = first_of(cu_seqlens, query, grad)
    only = torch.zeros_like(grad)
    only[cu_seqlens[:-1].long()] = their_grad  # nothing comes back from the others
    values, dq, dk, dv = exact((query, key, value, only), cu_seqlens)
    (values, dq), _ = first_of(cu_seqlens.cpu(), values, dq)
    results = ours((asked, key, value, their_grad), cu_seqlens, cu_seqlens_q=cu_seqlens_q)
    for result, expected in zip(results, (values, dq, dk, dv), strict=True):
        assert error(result, expected) < TOLERANCES[DTYPES[0]]


def test_a_query_of_an_empty_sequence_gets_zeros_and_passes_nothing_back():
    (query, key, value, grad), cu_seqlens = packed((3, 0), DTYPES[0])
    values, dq, dk, dv = ours(
        (query[:2], key, value, grad[:2]), cu_seqlens, cu_seqlens_q=torch.arange(3).int().to(DEVICE)
    )
    assert not values[1].any()
    assert not dq[1].any()
    assert dk.isfinite().all()
    assert dv.any()


def test_more_sequences_than_one_vector_load_finds(monkeypatch):
    if not CUDA:  # the interpreter takes minutes for 1,500 sequences, and reads globals at each call
        monkeypatch.setattr(attention_triton, "SEARCHED", tl.constexpr(4))
    lengths = (1, 2, 0) * (500 if CUDA else 4)
    parts, cu_seqlens = packed(lengths, DTYPES[0], 32)
    for result, expected in zip(ours(parts, cu_seqlens), exact(parts, cu_seqlens), strict=True):
        assert error(result, expected) < TOLERANCES[DTYPES[0]]


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


def affine_of(dim):
    torch.manual_seed(1)
    return torch.randn(4, HEADS, dim).to(DEVICE)


def inferred(parts, cu_seqlens, affine, dtype, bounds=None):
    query, key, value = parts[:3]
    out = torch.full(query.shape, 77, device=DEVICE).to(dtype)
    attention_triton.infer(query, key, value, affine, bounds or Bounds(cu_seqlens, cu_seqlens), out)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_inference_scales_and_shifts_queries_and_results(lengths, head_dim, dtype):
    (query, key, value, grad), cu_seqlens = packed(lengths, dtype, head_dim)
    affine = affine_of(head_dim)
    scaled = (query.float() * affine[0] + affine[1]).to(dtype)
    wanted = exact((scaled, key, value, grad), cu_seqlens)[0] * affine[2].cpu().double() + affine[3].cpu().double()
    found = inferred((query, key, value), cu_seqlens, affine, dtype)
    assert error(found, wanted) < TOLERANCES[dtype]


def test_a_bias_of_the_keys_changes_nothing():
    """So `infer` takes none."""
    (query, key, value, _), cu_seqlens = packed((3, 70), DTYPES[0])
    affine, bias = affine_of(64), 0.1 * torch.randn(HEADS, 64, device=DEVICE)
    before = inferred((query, key, value), cu_seqlens, affine, DTYPES[0])
    after = inferred((query, (key.float() + bias).to(key.dtype), value), cu_seqlens, affine, DTYPES[0])
    assert error(after, before.cpu().double()) < (2e-2 if CUDA else 1e-5)
    other = inferred((query, key, (value.float() + bias).to(key.dtype)), cu_seqlens, affine, DTYPES[0])
    assert error(other, before.cpu().double()) > 3e-2, "a bias of the values does"


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_inference_in_8_bits_is_that_in_more_rounded(dtype, monkeypatch):
    if not CUDA:
        round_as_hardware_does(monkeypatch)
    parts, cu_seqlens = packed((5, 66, 1), DTYPES[0])
    affine = affine_of(64)
    affine[2:] *= 100
    wide = inferred(parts, cu_seqlens, affine, torch.float32).double()
    short = inferred(parts, cu_seqlens, affine, dtype).double()
    if dtype == torch.int8:
        assert torch.equal(short, wide.round().clamp(-128, 127))
        assert (wide.abs() > 128).any(), "some values are cut, or nothing is shown of that"
    else:
        assert torch.equal(short, wide.clamp(-448, 448).float().to(dtype).double())


def test_inference_of_first_tokens_alone():
    parts, cu_seqlens = packed((3, 1, 64, 70, 0), DTYPES[0])
    whole = inferred(parts, cu_seqlens, affine_of(64), DTYPES[0])
    starts = cu_seqlens[:-2].long()  # the empty sequence has no first token
    each = torch.arange(5, device=DEVICE).int()
    first = inferred(
        (parts[0][starts], *parts[1:3]), cu_seqlens, affine_of(64), DTYPES[0], Bounds(each, cu_seqlens[:-1])
    )
    assert torch.equal(first, whole[starts])

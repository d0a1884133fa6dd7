"""Attention by products against softmax(QK'/sqrt(d))V and its gradients in float64, one sequence at a time."""

import pytest
import torch

from bertforge.kernels.attention import Bounds
from bertforge.kernels.attention_cpu import SCORES, STEP, _plan, backward, forward
from tests.kernels import packs
from tests.kernels.packs import check_apart, check_reference, check_repeatable, error, exact

LENGTHS = {
    "one token": (1,),
    "odd lengths": (3, 1, 17, 64, 5, 129),
    "empty in the middle and at the ends": (0, 7, 0, 2, 0),
    "filled up by nothing": (STEP, 2 * STEP),
    "the longest": (3, 512),
}
# ||ours - exact|| / ||exact||: bfloat16 rounds scores, weights and results to 2^-9 each.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def packed(lengths, dtype):
    return packs.packed(lengths, dtype, head_dim=32)


def ours(parts, cu_seqlens, cu_seqlens_q=None):
    """The values and the gradients of query, key and value, which are slices of one tensor but for the query's."""
    *inputs, grad = parts
    bounds = Bounds(cu_seqlens if cu_seqlens_q is None else cu_seqlens_q, cu_seqlens)
    results = forward(*inputs, bounds)
    joined = torch.full((len(inputs[1]), 2, 2, 32), float("nan"), dtype=grad.dtype)
    gradients = (torch.full_like(inputs[0], float("nan")), *joined.unbind(1))
    backward(grad, (*inputs, bounds), results, gradients)
    return [results[0], *gradients]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_values_and_gradients_are_the_references(lengths, dtype):
    check_reference(ours, *packed(lengths, dtype), TOLERANCES[dtype])


def test_first_tokens_alone_get_what_they_get_among_all():
    (query, key, value, grad), cu_seqlens = packed((3, 40, 1), torch.float32)
    starts = cu_seqlens[:-1].long()
    others = torch.ones(len(grad), dtype=torch.bool)
    others[starts] = False
    grad[others] = 0
    values, dq, dk, dv = exact((query, key, value, grad), cu_seqlens)
    some = ours((query[starts], key, value, grad[starts]), cu_seqlens, torch.arange(4).int())
    for result, expected in zip(some, (values[starts], dq[starts], dk, dv), strict=True):
        assert error(result, expected) < TOLERANCES[torch.float32]


def test_a_query_of_an_empty_sequence_gets_zeros_and_passes_nothing_back():
    (query, key, value, grad), cu_seqlens = packed((2, 0, 1), torch.float32)
    values, dq, _, _ = ours((query, key, value, grad), cu_seqlens, torch.arange(4).int())
    assert not values[1].any()
    assert not dq[1].any()
    assert values[[0, 2]].any(2).all()


def test_a_sequence_depends_on_its_own_tokens_even_next_to_one_that_is_not_a_number():
    check_apart(ours, *packed((3, 17, 1, 70), torch.bfloat16))


def test_scores_far_from_zero_neither_overflow_nor_let_the_filling_in():
    (query, key, value, grad), cu_seqlens = packed((70,), torch.float32)
    query[..., 0], key[..., 0] = 64.0, -60.0  # all scores lie near -680, those of what fills up at 0
    for result, expected in zip(
        ours((query, key, value, grad), cu_seqlens), exact((query, key, value, grad), cu_seqlens), strict=True
    ):
        assert error(result, expected) < 1e-3


def test_sequences_of_like_length_are_multiplied_together():
    ends = torch.arange(0, 41 * 18, 18, dtype=torch.int32)  # 40 sequences of 18 tokens
    groups = _plan(Bounds(ends, ends)).groups
    assert [group.keys.fillers.shape[0] for group in groups] == [SCORES // (STEP * STEP), 16, 8]


def test_two_runs_are_equal_bit_for_bit():
    check_repeatable(ours, *packed((100, 1, 129, 0), torch.bfloat16))

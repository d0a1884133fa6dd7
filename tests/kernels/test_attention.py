"""Packed attention against softmax(QK'/sqrt(d))V written out in float64, one sequence at a time."""

import pytest
import torch

from bertforge.errors import UsageError
from bertforge.kernels.attention import Bounds, varlen_attention

HEADS, HEAD_DIM = 3, 8
LENGTHS = {
    "one token": (1,),
    "odd lengths": (3, 1, 17, 64, 5, 129),
    "empty at the end": (7, 1, 0, 0),
    "empty in the middle": (2, 0, 9),
}
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention's packed kernel runs on CUDA only")


def packed(lengths, dtype=torch.float64, head_dim=HEAD_DIM):
    """Query, key, value `[tokens, heads, head_dim]` and `cu_seqlens`."""
    torch.manual_seed(0)
    parts = [torch.randn(sum(lengths), HEADS, head_dim, dtype=dtype) for _ in range(3)]
    return parts, torch.tensor([0, *lengths]).cumsum(0).int()


def everyone(cu_seqlens):
    """Bounds by which every token asks."""
    return Bounds(cu_seqlens, cu_seqlens)


def reference(query, key, value, cu_seqlens):
    outputs = []
    for begin, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        q, k, v = (part[begin:end].double() for part in (query, key, value))  # [length, heads, head_dim]
        weights = torch.einsum("qhd,khd->hqk", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_values_and_gradients_are_the_references(lengths, dtype, atol):
    parts, cu_seqlens = packed(lengths, dtype)
    ours = [part.clone().requires_grad_() for part in parts]
    exact = [part.double().requires_grad_() for part in parts]
    output, expected = varlen_attention(*ours, everyone(cu_seqlens), max(lengths)), reference(*exact, cu_seqlens)
    assert output.shape == expected.shape
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=atol)
    weights = torch.randn_like(expected)
    (output.double() * weights).sum().backward()
    (expected * weights).sum().backward()
    for part, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(part.grad.double(), other.grad, rtol=0, atol=atol)


@pytest.mark.parametrize("changed", range(4))
def test_a_sequence_depends_on_its_own_tokens_bit_for_bit(changed):
    (query, key, value), cu_seqlens = packed((3, 17, 1, 64), torch.float32)
    before = varlen_attention(query, key, value, everyone(cu_seqlens), 64)
    mine = slice(int(cu_seqlens[changed]), int(cu_seqlens[changed + 1]))
    for part in (query, key, value):
        part[mine] += 1
    after = varlen_attention(query, key, value, everyone(cu_seqlens), 64)
    others = torch.ones(85, dtype=torch.bool)
    others[mine] = False
    assert torch.equal(before[others], after[others])
    assert not torch.allclose(before[mine], after[mine], atol=0.1)


def test_other_boundaries_give_other_values():
    parts, cu_seqlens = packed((5, 5))
    assert not torch.allclose(
        varlen_attention(*parts, everyone(cu_seqlens), 5), reference(*parts, torch.tensor([0, 4, 10]))
    )


def test_first_tokens_alone_get_what_they_get_among_all():
    (query, key, value), cu_seqlens = packed((3, 1, 17))
    starts = cu_seqlens[:-1].long()
    bounds = Bounds(torch.arange(4).int(), cu_seqlens)
    first = varlen_attention(query[starts], key, value, bounds, 17)
    torch.testing.assert_close(first, reference(query, key, value, cu_seqlens)[starts], rtol=0, atol=1e-12)


def test_dropout_drops_whole_weights_and_scales_the_rest():
    # A sequence of one token has one weight, 1: dropped it is 0, kept it is 1 / (1 - p).
    (query, key, value), cu_seqlens = packed((1,) * 200, torch.float32)
    torch.manual_seed(0)
    ratio = (
        varlen_attention(query, key, value, everyone(cu_seqlens), 1, dropout_p=0.75) / value
    )  # [200, heads, head_dim]
    kept = ratio.amax(-1)
    torch.testing.assert_close(ratio, kept[..., None].expand_as(ratio))
    assert torch.all((kept == 0) | (kept - 4).abs().lt(1e-5))
    assert 0.2 < (kept > 0).float().mean() < 0.3


def test_without_dropout_two_runs_are_equal_and_with_it_they_are_not():
    parts, cu_seqlens = packed((3, 17), torch.float32)
    assert torch.equal(
        varlen_attention(*parts, everyone(cu_seqlens), 17), varlen_attention(*parts, everyone(cu_seqlens), 17)
    )
    once, twice = (varlen_attention(*parts, everyone(cu_seqlens), 17, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(once, twice)


@cuda
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=str)
def test_the_cuda_kernel_gives_the_references_values_and_gradients(lengths, dtype, tolerance):
    parts, cu_seqlens = packed(lengths, dtype, head_dim=64)
    ours = [part.cuda().requires_grad_() for part in parts]
    exact = [part.double().requires_grad_() for part in parts]
    output, expected = varlen_attention(*ours, everyone(cu_seqlens.cuda()), max(lengths)), reference(*exact, cu_seqlens)
    weights = torch.randn_like(expected).to(dtype)
    output.backward(weights.cuda())
    expected.backward(weights.double())
    pairs = [(output, expected), *((part.grad, other.grad) for part, other in zip(ours, exact, strict=True))]
    for ours_, exact_ in pairs:
        # Relative to the largest entry: half precision keeps 8 (bfloat16) or 11 bits. One token's softmax is constant,
        # so its query and key have no gradient, and what is left of them is rounding of numbers around 1.
        assert (ours_.cpu().double() - exact_).abs().max() <= tolerance * exact_.abs().max().clamp_min(1)


@cuda
def test_the_cuda_kernel_refuses_dropout_instead_of_leaving_it_out():
    parts, cu_seqlens = packed((3, 4), torch.bfloat16, head_dim=64)
    with pytest.raises(UsageError, match=r"attention_dropout is 0\.1; set attention_dropout=0"):
        varlen_attention(*(part.cuda() for part in parts), everyone(cu_seqlens.cuda()), 4, dropout_p=0.1)

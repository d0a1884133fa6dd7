"""Attention over packs in float64, how far from it a kernel is, and what both of our kernels must hold.

`ours(parts, cu_seqlens)` gives the values and the gradients of query, key and value; `parts` are those three and the
result's gradient, `[tokens, heads, head_dim]`.
"""

import torch

from tests.kernels.test_attention import reference


def packed(lengths, dtype, head_dim, heads=2, device="cpu"):
    """`parts`, and `cu_seqlens`."""
    torch.manual_seed(0)
    parts = [torch.randn(sum(lengths), heads, head_dim).to(device, dtype) for _ in range(4)]
    return parts, torch.tensor([0, *lengths], device=device).cumsum(0).int()


def exact(parts, cu_seqlens):
    """What `ours` gives, in float64 on the CPU."""
    *inputs, grad = (part.cpu().double() for part in parts)
    inputs = [part.requires_grad_() for part in inputs]
    values = reference(*inputs, cu_seqlens)
    values.backward(grad)
    return [values.detach(), *(part.grad for part in inputs)]


def error(result, expected):
    """||result - expected|| / ||expected||, or / 1 for one token: its softmax is constant, so there is no gradient."""
    return float((result.cpu().double() - expected).norm() / expected.norm().clamp_min(1))


def check_reference(ours, parts, cu_seqlens, tolerance):
    """Values and gradients are the reference's, in the parts' type."""
    for result, expected in zip(ours(parts, cu_seqlens), exact(parts, cu_seqlens), strict=True):
        assert result.dtype == parts[0].dtype
        assert error(result, expected) < tolerance


def check_apart(ours, parts, cu_seqlens):
    """Tokens 3 to 19, a sequence of their own, may be no numbers: the others' results stay bit for bit."""
    before = ours(parts, cu_seqlens)
    for part in parts:
        part[3:20] = float("nan")
    for first, then in zip(before, ours(parts, cu_seqlens), strict=True):
        assert torch.equal(first[:3], then[:3])
        assert torch.equal(first[20:], then[20:])
        assert then[3:20].isnan().all()


def check_repeatable(ours, parts, cu_seqlens):
    """Two runs are equal bit for bit."""
    for first, then in zip(ours(parts, cu_seqlens), ours(parts, cu_seqlens), strict=True):
        assert torch.equal(first, then)

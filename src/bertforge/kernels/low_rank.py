"""W + scaling B A, the weight that an adapter makes of a frozen one: in PyTorch, or one kernel (low_rank_triton.py)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

LARGEST = 64  # ranks that the kernels' tiles hold on any GPU; a higher one is a product worth cuBLAS


def adapted_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """`weight` `[out, in]` + scaling * `lora_B` `[out, r]` `lora_A` `[r, in]`, summed in float32 or wider.

    The result has `weight`'s type; on CUDA under autocast, autocast's, which the product that follows would make of it.
    """
    if weight.is_cuda and lora_A.shape[0] <= LARGEST:
        from bertforge.kernels.low_rank_triton import AdaptedWeight

        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else weight.dtype
        if dtype is not torch.float64:
            return cast(Tensor, AdaptedWeight.apply(weight, lora_A, lora_B, scaling, dtype))  # type: ignore[no-untyped-call]
    return (weight + low_rank_update(lora_A, lora_B, scaling)).to(weight.dtype)


def low_rank_update(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """scaling * `lora_B` `lora_A`, `[out, in]`, in float32 or wider: bfloat16 would round most of it away."""
    dtype = torch.promote_types(lora_B.dtype, torch.float32)
    with torch.autocast(lora_B.device.type, enabled=False):
        return (lora_B.to(dtype) @ lora_A.to(dtype)) * scaling

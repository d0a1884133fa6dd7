"""A linear layer with a low-rank update beside it: y = W x + b + (alpha / r) B A x."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from bertforge.lora.config import LoraConfig


class LoraLinear(nn.Module):
    """Wraps `base_layer`, whose own weights stay as they are.

    With in = out = 768 and r = 8, `lora_A.weight` is [8, 768] and `lora_B.weight` [768, 8]: 12,288 numbers beside
    589,824. B starts at zero, so the adapted layer starts out equal to the base (Hu et al. 2021, section 4.1).
    """

    def __init__(self, base_layer: nn.Linear, config: LoraConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        where = {"device": base_layer.weight.device}
        self.lora_A = nn.Linear(base_layer.in_features, config.r, bias=False, **where)
        self.lora_B = nn.Linear(config.r, base_layer.out_features, bias=False, **where)
        self.scaling = config.lora_alpha / config.r
        self.dropout_p = config.lora_dropout
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # as PEFT and the paper's code draw it
        nn.init.zeros_(self.lora_B.weight)
        self.train(base_layer.training)  # a new module is in training mode, in a model in eval mode too

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        output: Tensor = self.base_layer(x)
        if self.base_layer.weight.dtype != self.lora_A.weight.dtype:  # a bfloat16 base; adapters stay float32
            x = x.to(self.lora_A.weight.dtype)
        low_rank = self.lora_A(F.dropout(x, self.dropout_p, self.training))  # [..., r]
        update: Tensor = self.lora_B(low_rank) * self.scaling
        return output + update.to(output.dtype)

    def delta(self) -> Tensor:
        """The update as one matrix `[out, in]`, in float32: bfloat16 would round most of it away."""
        return (self.lora_B.weight.float() @ self.lora_A.weight.float()) * self.scaling

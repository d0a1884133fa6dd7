"""A linear layer with a low-rank update beside it: y = W x + b + (alpha / r) B A x."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from bertforge.kernels.low_rank import adapted_weight, low_rank_update
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
        if (adapted := self.adapted()) is not None:
            return F.linear(x, *adapted)
        output: Tensor = self.base_layer(x)
        return output + self.branch(F.dropout(x, self.dropout_p, self.training)).to(output.dtype)

    def branch(self, x: Tensor) -> Tensor:
        """(alpha / r) B (A x), `[..., in]` -> `[..., out]`, without the `[out, in]` matrix B A."""
        narrow = self.lora_A(x.to(self.lora_A.weight.dtype))  # [..., r]
        update: Tensor = self.lora_B(narrow) * self.scaling  # [..., out]
        return update

    def adapted(self) -> tuple[Tensor, Tensor] | None:
        """W + (alpha / r) B A `[out, in]` in W's type, and the bias `[out]`.

        None in training with dropout, which stands between x and A, and where W is quantized on its way. One matrix
        costs a pass over the weights, where the update beside the base costs four over the tokens, and its gradient
        gives those of A and B through the same small products.
        """
        if (self.training and self.dropout_p) or type(self.base_layer) is not nn.Linear:
            return None
        weight = adapted_weight(self.base_layer.weight, self.lora_A.weight, self.lora_B.weight, self.scaling)
        return weight, self.base_layer.bias

    def delta(self) -> Tensor:
        """The update as one matrix `[out, in]`, in float32 or wider."""
        return low_rank_update(self.lora_A.weight, self.lora_B.weight, self.scaling)

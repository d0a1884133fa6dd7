"""The stack of BERT layers: attention, then a feed-forward of four times the width, each with a residual.

A layer is its modules one after another, or in half precision, on CUDA and in training on a CPU, the same written out
(fused_layer.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertforge.kernels.attention import TRITON_HEAD_DIMS
from bertforge.model.attention import BertAttention, Core, PackedCore, ResidualOutput
from bertforge.model.config import BertConfig
from bertforge.model.fused_layer import FrozenCasts, Settings, fused_layer

_TANH_GELU = partial(F.gelu, approximate="tanh")
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "relu": F.relu,
}


class BertIntermediate(nn.Module):
    """The widening half of the feed-forward."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = _ACTIVATIONS[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., hidden]` -> `[..., intermediate]`."""
        return self.activation(self.dense(hidden))


class BertLayer(nn.Module):
    """One layer: `attention`, `intermediate`, `output`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.casts = FrozenCasts()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = ResidualOutput(config.intermediate_size, config)

    def forward(self, hidden: Tensor, core: Core, queries: Tensor | None = None) -> Tensor:
        """`[..., hidden]` -> one row for each of `queries`; all tokens ask where there are none."""
        if isinstance(core, PackedCore) and (dtype := self._fused_dtype(hidden)) and (weights := self.weights()):
            halves = tuple(self.casts(place, weight, dtype) for place, weight in enumerate(weights))
            asked = None if queries is None else queries.to(dtype)
            return fused_layer(hidden.to(dtype), asked, core.bounds, self.settings(), halves)
        asked = hidden if queries is None else queries
        attended = self.attention(hidden, core, asked)
        normed: Tensor = self.output(self.intermediate(attended), attended)
        return normed

    def weights(self) -> tuple[Tensor, ...] | None:
        """Weight and bias of each of `fused_layer.NAMES`; None where a projection is more than a weight and a bias."""
        attention, own = self.attention, self.attention.self
        linears = (own.query, own.key, own.value, attention.output.dense, self.intermediate.dense, self.output.dense)
        pairs = [_weight_and_bias(linear) for linear in linears]
        for place, norm in ((4, attention.output.LayerNorm), (7, self.output.LayerNorm)):
            pairs.insert(place, (norm.weight, norm.bias))
        return (
            None if any(pair is None for pair in pairs) else tuple(tensor for pair in pairs if pair for tensor in pair)
        )

    def settings(self) -> Settings:
        """Of the fused layer, as the mode of the module and of autograd has them."""
        config = self.config
        return Settings(
            (config.num_attention_heads, config.head_dim),
            config.layer_norm_eps,
            config.hidden_dropout_prob if self.training else 0.0,
            torch.is_grad_enabled(),
            self.output.LayerNorm.weight.is_cuda,
        )

    def _fused_dtype(self, hidden: Tensor) -> torch.dtype | None:
        """The type the fused layer would compute in; None where it does not reach."""
        config, device = self.config, hidden.device.type
        if config.hidden_act != "gelu" or (self.training and config.attention_probs_dropout_prob):
            return None
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        if device == "cpu":  # without a backward pass torch's own attention is quicker, and with it the modules are
            return dtype if dtype is torch.bfloat16 and torch.is_grad_enabled() else None
        if config.head_dim not in TRITON_HEAD_DIMS or config.hidden_size % 16 or config.intermediate_size % 16:
            return None
        return dtype if device == "cuda" and dtype in (torch.float16, torch.bfloat16) else None


def _weight_and_bias(linear: nn.Module) -> tuple[Tensor, Tensor] | None:
    """What `linear` computes with: its own, or what an adapter makes of them."""
    if type(linear) is nn.Linear:
        return linear.weight, linear.bias
    adapted: Callable[[], tuple[Tensor, Tensor] | None] = getattr(linear, "adapted", lambda: None)
    return adapted()


class BertEncoder(nn.Module):
    """All layers, one after another."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: Tensor, core: Core) -> Tensor:
        """`[..., hidden]` -> `[..., hidden]`."""
        for layer in self.layer:
            hidden = layer(hidden, core)
        return hidden

    def first(self, hidden: Tensor, core: Core) -> Tensor:
        """`[..., hidden]` -> each sequence's first token, for which alone the last layer is computed."""
        for layer in self.layer[:-1]:
            hidden = layer(hidden, core)
        one, queries = core.first(hidden)
        first: Tensor = self.layer[-1](hidden, one, queries)
        return first

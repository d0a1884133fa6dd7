"""The stack of BERT layers: attention, then a feed-forward of four times the width, each with a residual."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from bertforge.model.attention import AttentionCore, BertAttention, ResidualOutput
from bertforge.model.config import BertConfig

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
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = ResidualOutput(config.intermediate_size, config)

    def forward(self, hidden: Tensor, core: AttentionCore) -> Tensor:
        """`[..., hidden]` -> `[..., hidden]`."""
        attended = self.attention(hidden, core)
        normed: Tensor = self.output(self.intermediate(attended), attended)
        return normed


class BertEncoder(nn.Module):
    """All layers, one after another."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: Tensor, core: AttentionCore, first: int = 0, end: int | None = None) -> Tensor:
        """`[..., hidden]` -> `[..., hidden]`, through the layers from `first` up to but not with `end`."""
        for layer in self.layer[first:end]:
            hidden = layer(hidden, core)
        return hidden

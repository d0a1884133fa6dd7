"""The stack of BERT layers: attention, then a feed-forward of four times the width, each with a residual.

A layer is its modules one after another, or the same written out (fused_layer.py): in half precision on CUDA, and in
training on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertforge.errors import UsageError
from bertforge.kernels.attention import TRITON_HEAD_DIMS
from bertforge.model.attention import BertAttention, Core, PackedCore, ResidualOutput
from bertforge.model.config import BertConfig
from bertforge.model.fused_layer import FP8_PLACES, Fp8Weights, FrozenCasts, Settings, fused_layer

_TANH_GELU = partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
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
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., hidden]` -> `[..., intermediate]`."""
        return self.activation(self.dense(hidden))


class BertLayer(nn.Module):
    """One layer: `attention`, `intermediate`, `output`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.casts = FrozenCasts()
        self.fp8 = False
        """Training multiplies with the feed-forward's weights in e4m3; `multiply_in_fp8` sets it."""
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = ResidualOutput(config.intermediate_size, config)

    def forward(self, hidden: Tensor, core: Core, queries: Tensor | None = None) -> Tensor:
        """`[..., hidden]` -> one row for each of `queries`; all tokens ask where there are none."""
        if isinstance(core, PackedCore) and (dtype := self._fused_dtype(hidden)) and (weights := self.weights()):
            halves = tuple(self.casts(place, weight, dtype) for place, weight in enumerate(weights))
            asked = None if queries is None else queries.to(dtype)
            return fused_layer(hidden.to(dtype), asked, core.bounds, self.settings(weights), halves)
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

    def fp8_weights(self, weights: tuple[Tensor, ...]) -> Fp8Weights:
        """Copies in e4m3 of those `weights` that have their products there."""
        return Fp8Weights(*(self.casts.fp8(place, weights[place]) for place in FP8_PLACES))

    def settings(self, weights: tuple[Tensor, ...]) -> Settings:
        """Of the fused layer with these `weights`, as the mode of the module and of autograd has them."""
        config = self.config
        return Settings(
            (config.num_attention_heads, config.head_dim),
            config.layer_norm_eps,
            config.hidden_dropout_prob if self.training else 0.0,
            torch.is_grad_enabled(),
            weights[0].is_cuda,
            self.fp8_weights(weights) if self.fp8 and self.training else None,  # evaluation: as the saved model will
        )

    def fusable(self, *, on_cuda: bool = True) -> bool:
        """The fused layer computes this configuration, in the module's mode; Triton's kernels do not for all sizes."""
        config = self.config
        if config.hidden_act != "gelu" or (self.training and config.attention_probs_dropout_prob):
            return False
        widths = config.hidden_size % 16 == config.intermediate_size % 16 == 0
        return not on_cuda or (config.head_dim in TRITON_HEAD_DIMS and widths)

    def _fused_dtype(self, hidden: Tensor) -> torch.dtype | None:
        """The type the fused layer would compute in; None where it does not reach."""
        device = hidden.device.type
        if device not in ("cuda", "cpu") or not self.fusable(on_cuda=device == "cuda"):
            return None
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        if device == "cuda":
            return dtype if dtype in (torch.float16, torch.bfloat16) else None
        # Without a backward pass torch's own attention is quicker on a CPU, and with it the modules are.
        return dtype if dtype in (torch.bfloat16, torch.float32) and torch.is_grad_enabled() else None


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

    def forward(self, hidden: Tensor, core: Core, start: int = 0, end: int | None = None) -> Tensor:
        """`[..., hidden]` -> `[..., hidden]`, through the layers from `start` up to but not with `end`."""
        for layer in self.layer[start:end]:
            hidden = layer(hidden, core)
        return hidden

    def first(self, hidden: Tensor, core: Core, start: int = 0) -> Tensor:
        """`[..., hidden]` -> each sequence's first token, for which alone the last layer is computed.

        Begins at layer `start`; past the last one, the first tokens are those of `hidden`.
        """
        last = len(self.layer) - 1
        hidden = self(hidden, core, start, last)
        one, queries = core.first(hidden)
        first: Tensor = queries if start > last else self.layer[last](hidden, one, queries)
        return first


def multiply_in_fp8(model: nn.Module) -> None:
    """Training of `model` shall multiply with frozen feed-forwards in e4m3; sets it to training mode.

    Raises UsageError where no feed-forward is frozen, or a layer is one that the fused layer does not compute.
    """
    layers = [module for module in model.train().modules() if isinstance(module, BertLayer)]
    for layer in layers:
        weights = layer.weights()
        if weights is None or not layer.fusable():
            raise UsageError(
                "precision=fp8 needs GELU, heads of 32 or 64, widths that 16 divides, no dropout of attention or "
                "adapters; set attention_dropout=0 and lora.lora_dropout=0, or precision=bf16"
            )
        layer.fp8 = not any(weights[place + part].requires_grad for place in FP8_PLACES for part in (0, 1))
    if not any(layer.fp8 for layer in layers):
        raise UsageError(
            "precision=fp8 multiplies with a frozen feed-forward in 8 bits, but this recipe trains every layer's; "
            "adapt query and value alone (variant lora-r8), or set precision=bf16"
        )

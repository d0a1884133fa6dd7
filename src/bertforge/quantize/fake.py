"""A model with ModelOpt's quantizers in it: it computes in floating point what 8 bits would give, and can be trained.

Activations have one scale a tensor, weights one an output channel. SmoothQuant's factors are rounded to powers of two
and shared by the three layers that read the same hidden states: multiplying and dividing by them is then exact, so that
plain weights and factors on disk give back the smoothed weights bit for bit, and query, key and value can still read
one quantized tensor.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

from bertforge.model.attention import AttentionCore, BertSelfAttention, PackedCore
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.model.points import COMPONENTS, PRODUCTS, Unit, units
from bertforge.scales import Scales

Loop = Callable[[nn.Module], object]
_BITS = {"int8": 8, "fp8": (4, 3)}
_GROUPS = tuple(names for component, names in COMPONENTS.items() if component != "attention-products")


class _QuantSelfAttention(BertSelfAttention):
    """Self-attention whose two products can read quantized operands; ModelOpt puts it in the place of ours."""

    def _setup(self) -> None:
        for name in PRODUCTS:
            setattr(self, name, TensorQuantizer())

    def forward(self, hidden: Tensor, core: AttentionCore, queries: Tensor) -> Tensor:
        """See `BertSelfAttention`."""
        quantizers = [getattr(self, name) for name in PRODUCTS]
        if not any(quantizer.is_enabled or quantizer._forward_hooks for quantizer in quantizers):  # off and unwatched
            return super().forward(hidden, core, queries)
        assert isinstance(core, PackedCore), "quantized attention is simulated on packed batches"
        return super().forward(hidden, _QuantizedCore(self, core), queries)


class _QuantizedCore:
    """Attention written out over padded rows, so that every operand passes its quantizer."""

    def __init__(self, quantizers: nn.Module, core: PackedCore) -> None:
        self.quantizers, self.core = quantizers, core

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
        of: Any = self.quantizers
        bounds, seq = self.core.bounds, self.core.max_seqlen
        asked, known = _places(bounds.queries, len(query)), _places(bounds.keys, len(key))
        real = torch.zeros(len(bounds.keys) - 1, seq, dtype=torch.bool, device=query.device)
        real[known] = True

        def padded(packed: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
            wide = packed.new_zeros(*real.shape, *packed.shape[1:])
            filled: Tensor = wide.index_put(places, packed)
            return filled.transpose(1, 2)  # [sequences, heads, seq, head_dim]

        q = of.query_out(padded(query, asked) * query.shape[-1] ** -0.5)
        scores = q @ of.key_out(padded(key, known)).transpose(2, 3)  # [sequences, heads, seq, seq]
        masked = scores.float().masked_fill(~real[:, None, None, :], torch.finfo(torch.float32).min)
        shares = nn.functional.dropout(masked.softmax(-1).to(query.dtype), dropout_p)
        attended: Tensor = of.shares(shares) @ of.value_out(padded(value, known))
        return attended.transpose(1, 2)[asked]  # [queries, heads, head_dim]


def _places(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Each token's sequence and its place in it, `[tokens]` both."""
    starts, each = cu_seqlens.long(), torch.arange(tokens, device=cu_seqlens.device)
    rows = torch.searchsorted(starts[1:], each, right=True)
    return rows, each - starts[rows]


mtq.register(original_cls=BertSelfAttention, quantized_cls=_QuantSelfAttention)


def insert(model: BertForSequenceClassification, form: str, preset: str) -> BertForSequenceClassification:
    """Puts quantizers at every point of `preset`, uncalibrated; `form` is int8 or fp8. The model itself is changed."""
    bits = _BITS[form]
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for point in _points(units(model.config, preset)):
        entries.append({"quantizer_name": _activation(point), "cfg": {"num_bits": bits, "axis": None}})
        if _linear(point):
            entries.append({"quantizer_name": f"{point}.weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}})
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # it prints what it inserted
        warnings.simplefilter("ignore")
        mtq.quantize(model, {"quant_cfg": entries, "algorithm": None})
    return model


def smooth(model: BertForSequenceClassification, chosen: list[Unit], loop: Loop, alpha: float) -> None:
    """Moves the spread of input channels into the weights: factor = max|x|^-alpha * max|w|^(1 - alpha), a power of two.

    `loop` runs calibration rows through the model. `alpha` is SmoothQuant's migration strength, 0 to 1.
    """
    modules = dict(model.named_modules())
    groups = [
        [cast(Any, modules[f"bert.encoder.layer.{layer}.{name}"]) for name in group]
        for layer in range(model.config.num_hidden_layers)
        for group in _GROUPS
        if f"bert.encoder.layer.{layer}.{group[0]}" in _points(chosen)
    ]
    largest = [torch.zeros(()) for _ in groups]

    def watch(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen = inputs[0].detach().float().abs().flatten(0, -2).amax(0)  # [in]
            largest[index] = torch.maximum(largest[index].to(seen.device), seen)

        return hook

    hooks = [linears[0].register_forward_pre_hook(watch(index)) for index, linears in enumerate(groups)]
    quantize_only(model, [])
    loop(model)
    for handle in hooks:
        handle.remove()
    for linears, inputs in zip(groups, largest, strict=True):
        weights = torch.stack([linear.weight.detach().abs().amax(0) for linear in linears]).amax(0)  # [in]
        factor = inputs.clamp_min(1e-5).pow(-alpha) * weights.clamp_min(1e-5).pow(1 - alpha)
        factor = torch.exp2((factor / factor.log().mean().exp()).log2().round())
        for linear in linears:
            _set_smoothing(linear, factor)


def calibrate_weights(model: BertForSequenceClassification, chosen: list[Unit]) -> None:
    """Sets the range of each output channel of every quantized weight to its largest value."""
    modules = dict(model.named_modules())
    for point in filter(_linear, _points(chosen)):
        linear: Any = modules[point]
        linear.weight_quantizer.amax = linear.weight.detach().abs().amax(1, keepdim=True)  # [out, 1]


def set_activations(model: BertForSequenceClassification, ranges: dict[str, float]) -> None:
    """Sets the range of each point in `ranges`."""
    found = activation_quantizers(model, ranges)
    for point, amax in ranges.items():
        found[point].amax = torch.tensor(amax, device=next(model.parameters()).device)


def quantize_only(model: BertForSequenceClassification, chosen: Iterable[Unit]) -> None:
    """Turns on the quantizers of `chosen` units and turns all others off."""
    wanted = set(_points(chosen))
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            point = name.removesuffix(".input_quantizer").removesuffix(".weight_quantizer")
            module.enable() if point in wanted else module.disable()


def activation_quantizers(model: nn.Module, points: Iterable[str]) -> dict[str, TensorQuantizer]:
    """Point -> the quantizer of its activation."""
    modules = dict(model.named_modules())
    return {point: cast(TensorQuantizer, modules[_activation(point)]) for point in points}


def read_scales(model: BertForSequenceClassification, form: str, chosen: list[Unit]) -> Scales:
    """The ranges of `chosen` units as they stand in the model; smoothing of every layer that has it."""
    points = _points(chosen)
    modules = dict(model.named_modules())
    linears = {name: cast(Any, module) for name, module in modules.items() if name in points and _linear(name)}
    smoothed = {
        name.removesuffix(".input_quantizer"): _array(module.pre_quant_scale)
        for name, module in modules.items()
        if isinstance(module, TensorQuantizer) and module.pre_quant_scale is not None
    }
    return Scales(
        form,
        {point: float(quantizer.amax) for point, quantizer in activation_quantizers(model, points).items()},
        {name: _array(linear.weight_quantizer.amax).reshape(-1) for name, linear in linears.items()},
        {name: factor for name, factor in smoothed.items() if name in linears},
    )


def plain_state(model: BertForSequenceClassification) -> dict[str, Tensor]:
    """The model's own weights, smoothing undone: what a checkpoint of the plain model holds."""
    modules = dict(model.named_modules())
    state = {}
    for name, tensor in model.state_dict().items():
        if "quantizer" in name or (".attention.self." in name and name.split(".")[-2] in PRODUCTS):
            continue
        owner = modules[name.rpartition(".")[0]]
        factor = getattr(getattr(owner, "input_quantizer", None), "pre_quant_scale", None)
        if factor is not None and name.endswith(".weight") and isinstance(owner, nn.Linear):
            tensor = tensor * factor.to(tensor.device)  # [out, in]; a power of two: exact
        state[name] = tensor.detach().cpu().contiguous()
    return state


def with_scales(model: BertForSequenceClassification, scales: Scales) -> BertForSequenceClassification:
    """`model`, plain, with quantizers at the points of `scales` and nowhere else."""
    insert(model, scales.format, "attention")
    modules = dict(model.named_modules())
    device = next(model.parameters()).device
    for name, factor in scales.smooth.items():
        _set_smoothing(cast(Any, modules[name]), torch.from_numpy(factor).to(device))
    chosen = [unit for unit in units(model.config, "attention") if set(unit.points) <= scales.activations.keys()]
    set_activations(model, scales.activations)
    for name, amax in scales.weights.items():
        cast(Any, modules[name]).weight_quantizer.amax = torch.from_numpy(amax).to(device)[:, None]  # [out, 1]
    quantize_only(model, chosen)
    return model


def _set_smoothing(linear: Any, factor: Tensor) -> None:
    """Inputs are multiplied with `factor` [in], the weight divided by it."""
    linear.input_quantizer.pre_quant_scale = factor
    with torch.no_grad():
        linear.weight.div_(factor)


def _points(chosen: Iterable[Unit]) -> list[str]:
    return [point for unit in chosen for point in unit.points]


def _linear(point: str) -> bool:
    return not point.endswith(PRODUCTS)


def _activation(point: str) -> str:
    """The name of the quantizer of a point's activation."""
    return f"{point}.input_quantizer" if _linear(point) else point


def _array(tensor: Tensor) -> np.ndarray:
    found: np.ndarray = tensor.detach().float().cpu().numpy()
    return found

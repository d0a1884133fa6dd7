"""What a precision does to a model: products with rounded inputs and weights, the rest rounded to 16 bits, in float32.

This is the yardstick for engines of that precision: the error it makes in this model on these rows. It needs no library
and no instruction of the CPU. Weights have one scale an output channel. Activations have the ranges of `Scales`, or,
where there are none, the one that spans the whole pack, as engines have that quantize them as they come.

An engine's own error has the same size and not the same bits: a value on the edge of a step falls to either side, and
the layers above make another error of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from bertforge.data.loader import Examples
from bertforge.evaluation.logits import predict_logits
from bertforge.evaluation.scores import log_softmax
from bertforge.model.attention import BertSelfAttention
from bertforge.model.bert import BertPooler
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.model.points import Unit, linears, units
from bertforge.scales import FORMATS, Scales

BESIDE = ("bert.embeddings.word_embeddings", "bert.pooler.dense")
"""Weights that engines store in 16 bits, beside those of the encoder."""
_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@contextmanager
def rounded(
    model: BertForSequenceClassification,
    precision: str,
    names: Sequence[str],
    scales: Scales | None = None,
    *,
    activations: bool = True,
) -> Iterator[None]:
    """Within it the linear layers and embeddings `names` of `model` compute in `precision`, but for fp32.

    Without `activations` only weights are rounded, to what an engine stores; activations are clamped to their range.
    """
    modules = {name: module for name, module in model.named_modules() if name in names}
    kept = {name: module.weight.data for name, module in modules.items()}
    handles = []
    for name, module in modules.items() if precision != "fp32" else ():
        assert isinstance(module, nn.Linear | nn.Embedding)
        weight, read = _of(module, name, precision, scales)
        module.weight.data = weight
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(_before(read if activations else read.unrounded)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, module in modules.items():
            module.weight.data = kept[name]


@contextmanager
def sixteen_bits(model: BertForSequenceClassification, rest: str, but: Sequence[str] = ()) -> Iterator[None]:
    """Within it all that is not in 8 bits is rounded to `rest`, fp16 or bf16: what modules give, and what linear layers
    read, those named in `but` aside. In fp32 nothing is rounded.
    """
    if rest == "fp32":
        yield
        return
    kinds = (nn.Linear, nn.LayerNorm, nn.Embedding, BertSelfAttention, BertPooler)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    others = [name for name, module in modules.items() if isinstance(module, nn.Linear) and name not in but]
    handles = [module.register_forward_hook(_after(_TYPES[rest])) for module in modules.values()]
    for module in modules.values():
        if isinstance(module, nn.LayerNorm):  # it reads a sum
            handles.append(module.register_forward_pre_hook(_before(_Read(rest, None, None))))
    try:
        with rounded(model, rest, others):
            yield
    finally:
        for handle in handles:
            handle.remove()


def layers_of(model: BertForSequenceClassification, scales: Scales | None = None) -> list[str]:
    """The linear layers of the encoder, those that `scales` has where there are some."""
    every = linears(units(model.config, "projections"))
    return every if scales is None else [name for name in every if name in scales.activations]


def row_shifts(reference: np.ndarray, found: np.ndarray) -> np.ndarray:
    """How far each row's probabilities moved: their total variation, `[rows]`, 0 to 1, from logits `[rows, labels]`.

    Logits are divided by the spread of the reference's first. Otherwise the few rows on which a model is in doubt would
    be the whole mean, and what happens to a row on which it is sure would not be seen.
    """
    centered = reference - reference.mean(1, keepdims=True)
    spread = max(float(centered.std()), 1e-6)
    before, after = (np.exp(log_softmax(logits / spread)) for logits in (reference, found))
    moved: np.ndarray = np.abs(before - after).sum(1) / 2
    return moved


def shifts_alone(
    model: BertForSequenceClassification, precision: str, examples: Examples, rows: np.ndarray, names: Sequence[str]
) -> dict[Unit, float]:
    """The mean shift that each part of the encoder brings when it alone, as far as it is in `names`, is in 8 bits."""
    plain, found = predict_logits(model, examples, rows, "fp32"), {}
    for unit in units(model.config, "projections"):
        if own := [name for name in linears([unit]) if name in names]:
            with rounded(model, precision, own):
                found[unit] = float(row_shifts(plain, predict_logits(model, examples, rows, "fp32")).mean())
    return found


class _Read:
    """How a layer reads its input: channels scaled by `smooth`, values clamped to `amax`, then rounded."""

    def __init__(self, precision: str, smooth: Tensor | None, amax: float | None) -> None:
        self.precision, self.smooth, self.amax = precision, smooth, amax

    def unrounded(self, value: Tensor) -> Tensor:
        value = value if self.smooth is None else value * self.smooth
        if self.amax is None:
            return value
        steps = 128 if self.precision == "int8" else FORMATS[self.precision]  # integers have one more below 0
        return value.clamp(-self.amax * steps / FORMATS[self.precision], self.amax)

    def __call__(self, value: Tensor) -> Tensor:
        value = self.unrounded(value)
        if self.precision in _TYPES:
            return value.to(_TYPES[self.precision]).to(value.dtype)
        amax = value.abs().amax() if self.amax is None else torch.tensor(self.amax, device=value.device)
        return _eight_bits(value, amax, self.precision)


def _of(module: nn.Linear | nn.Embedding, name: str, precision: str, scales: Scales | None) -> tuple[Tensor, _Read]:
    """A layer's weight as it is stored, `[out, in]`, and how it reads its input."""
    weight: Tensor = module.weight.data
    if precision in _TYPES:
        return weight.to(_TYPES[precision]).to(weight.dtype), _Read(precision, None, None)
    factors = scales.smooth.get(name) if scales else None
    smooth = None if factors is None else torch.from_numpy(factors).to(weight)
    weight = weight if smooth is None else weight / smooth
    given = scales.weights.get(name) if scales else None
    amax = weight.abs().amax(1) if given is None else torch.from_numpy(given).to(weight)  # [out]
    stored = _eight_bits(weight, amax[:, None], precision)
    return stored, _Read(precision, smooth, scales.activations[name] if scales else None)


def _eight_bits(value: Tensor, amax: Tensor, form: str) -> Tensor:
    scale = (amax / FORMATS[form]).clamp_min(torch.finfo(torch.float32).tiny)
    steps = (value / scale).clamp(-FORMATS[form], FORMATS[form])
    steps = steps.round() if form == "int8" else steps.to(torch.float8_e4m3fn).to(value.dtype)
    return steps * scale


def _before(read: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda module, inputs: (read(inputs[0]), *inputs[1:])


def _after(dtype: torch.dtype) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    return lambda module, inputs, output: output.to(dtype).to(output.dtype)

"""8-bit ranges of a plain model in seconds: what `compile` needs where `quantize` has not been.

The range of an activation is the largest value that the calibration rows have, after SmoothQuant has moved the spread
of its channels into the weight (Xiao et al. 2022, arXiv 2211.10438, equation 4): a BERT has a few channels that are a
hundred times as large as the others, and one scale for all would leave these a bit or two. How far to move it differs
from model to model, so some alphas are tried by simulation, on rows that judge nothing.

`quantize` searches for more: percentiles and entropy, layer by layer costs, a budget, fine-tuning.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bertforge.data.loader import Examples
from bertforge.evaluation.logits import predict_logits
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.model.points import Unit, shared, units
from bertforge.proof.simulation import layers_of, rounded, row_shifts
from bertforge.scales import Scales

ALPHAS = (0.0, 0.65, 0.8, 0.9)
"""Below 0.65 the outliers are still there (docs/engineering-log.md has the figures); 0 smooths nothing."""
_LEAST = 1e-5  # a channel that is always 0 has no spread to move


def find_ranges(
    model: BertForSequenceClassification, form: str, examples: Examples, calibration: np.ndarray, tuning: np.ndarray
) -> Scales:
    """Ranges of every linear layer of the encoder, from the rows `calibration`; `tuning` choose the alpha.

    `form` is int8 or fp8.
    """
    chosen = units(model.config, "projections")
    largest = _largest(model, chosen, examples, calibration)
    plain = predict_logits(model, examples, tuning, "fp32")
    best, least = None, np.inf
    for alpha in ALPHAS:
        scales = _scales(model, form, chosen, largest, alpha)
        with rounded(model, form, layers_of(model), scales):
            moved = float(row_shifts(plain, predict_logits(model, examples, tuning, "fp32")).mean())
        if best is None or moved < least:
            best, least = scales, moved
    assert best is not None
    return best


def _largest(
    model: BertForSequenceClassification, chosen: list[Unit], examples: Examples, rows: np.ndarray
) -> dict[str, Tensor]:
    """Linear layer -> the largest |x| of each input channel, `[in]`."""
    modules, found = dict(model.named_modules()), dict[str, Tensor]()

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen = inputs[0].detach().abs().flatten(0, -2).amax(0)  # [in]
            found[name] = torch.maximum(found[name], seen) if name in found else seen

        return modules[name].register_forward_pre_hook(hook)

    handles = [watch(name) for unit in chosen for name in unit.points]
    try:
        predict_logits(model, examples, rows, "fp32")
    finally:
        for handle in handles:
            handle.remove()
    return found


def _scales(
    model: BertForSequenceClassification, form: str, chosen: list[Unit], largest: dict[str, Tensor], alpha: float
) -> Scales:
    modules, activations, smooth = dict(model.named_modules()), dict[str, float](), dict[str, np.ndarray]()
    for unit in chosen:
        # All layers of a unit read the same values, and share the factors so that these are quantized once.
        weights = [modules[name].weight.detach().abs().amax(0) for name in unit.points]  # [in] each
        weight = torch.stack(weights).amax(0).clamp_min(_LEAST)
        values = torch.stack([largest[name] for name in unit.points]).amax(0).clamp_min(_LEAST)
        factors = values**-alpha * weight ** (1 - alpha) if alpha else torch.ones_like(values)  # [in]
        for name in unit.points:
            activations[name] = float((largest[name] * factors).max())
            if alpha:
                smooth[name] = factors.cpu().numpy()
    return Scales(form, shared(chosen, activations), smooth=smooth)

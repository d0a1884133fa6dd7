"""A model and rows -> logits, whatever the model is: the one inference loop of training, evaluation and prediction."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from bertforge.data.loader import Examples, load, sorted_plan
from bertforge.hardware import autocast

TOKENS_PER_PACK = 16_384


@torch.no_grad()
def predict_logits(
    model: nn.Module,
    examples: Examples,
    rows: np.ndarray,
    precision: str,
    advance: Callable[[int], None] = lambda rows: None,
) -> np.ndarray:
    """Logits `[rows, labels]` float32 in the order of `rows`, from a model that maps packed batches to logits.

    `advance` is told the rows of each pack. The model runs in evaluation mode and is left in the mode it was in.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    plan = sorted_plan(examples.lengths(rows), TOKENS_PER_PACK)
    outputs = []
    with autocast(device, precision):
        for batch, _ in load(examples, (rows[places] for places in plan), device):
            outputs.append(model(batch).float())
            advance(len(batch))
    model.train(was_training)
    packed = torch.cat(outputs).cpu().numpy()  # [rows, labels], in the order of the plan
    logits = np.empty_like(packed)
    logits[np.concatenate(plan)] = packed
    return logits

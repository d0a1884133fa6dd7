"""The optimizer's parameter groups and the learning rate over time."""

from __future__ import annotations

import torch
from torch import nn

from bertforge.training.config import Recipe

_HEADS = ("classifier.", "tabular.")


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2017) over what is trainable; biases and LayerNorms have no weight decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim > 1 and not name.endswith("bias")  # each numeric column has a vector of biases
            groups.setdefault((name.startswith(_HEADS), matrix), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": (recipe.head_lr or recipe.lr) if head else recipe.lr,
                "weight_decay": recipe.weight_decay if matrix else 0.0,
            }
            for (head, matrix), parameters in groups.items()
        ],
        fused=True,
    )


def lr_scale(step: int, total_steps: int, warmup: float) -> float:
    """Share of the peak learning rate at `step` (from 0): linear up over the warm-up, linear down to 0 at the end."""
    rising = max(1, round(warmup * total_steps))
    if step < rising:
        return (step + 1) / rising
    return max(0.0, (total_steps - step) / max(1, total_steps - rising))

"""The optimizer, its parameter groups and the learning rate over time."""

from __future__ import annotations

import torch
from torch import nn

_HEADS = ("classifier.", "tabular.")


def make_optimizer(model: nn.Module, lr: float, head_lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2017) over what is trainable; biases and LayerNorms have no weight decay.

    `lr` and `head_lr` are the peaks. Learning rates are tensors, and on a GPU the moments exist from the start, so that
    a CUDA graph can hold the step.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim > 1 and not name.endswith("bias")  # each numeric column has a vector of biases
            groups.setdefault((name.startswith(_HEADS), matrix), []).append(parameter)
    device = next(model.parameters()).device
    made = []
    for (head, matrix), parameters in groups.items():
        peak = head_lr if head else lr
        decay = weight_decay if matrix else 0.0
        rate = torch.tensor(peak, device=device)
        made.append({"params": parameters, "lr": rate, "peak": peak, "weight_decay": decay})
    optimizer = torch.optim.AdamW(made, fused=True, capturable=device.type == "cuda")
    if device.type == "cuda":
        for parameter in (parameter for parameters in groups.values() for parameter in parameters):
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=device), **moments}
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Sets each group's learning rate to `scale` times its peak."""
    for group in optimizer.param_groups:
        group["lr"].fill_(group["peak"] * scale)


def lr_scale(step: int, total_steps: int, warmup: float) -> float:
    """Share of the peak learning rate at `step` (from 0): linear up over the warm-up, linear down to 0 at the end."""
    rising = max(1, round(warmup * total_steps))
    if step < rising:
        return (step + 1) / rising
    return max(0.0, (total_steps - step) / max(1, total_steps - rising))

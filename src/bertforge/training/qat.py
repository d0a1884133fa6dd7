"""Quantization-aware training: the ordinary loop on a model whose quantizers stand in the forward pass.

Rounding has no slope, so gradients pass it as if it were not there (the straight-through estimator, Bengio et al. 2013,
arXiv 1308.3432). Ranges stay as calibration set them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bertforge.data.loader import Examples
from bertforge.determinism import seed_everything
from bertforge.hardware import choose_precision, detect
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.training.checkpoint import Progress, trainable
from bertforge.training.config import Recipe
from bertforge.training.loop import Split, Trainer

LR = 1e-5  # a tenth and less of what the model was trained with: it is to settle, not to learn anew
_TOLD = 20  # steps between two words of it


def tune(
    model: BertForSequenceClassification,
    examples: Examples,
    train: np.ndarray,
    validation: np.ndarray,
    recipe: dict[str, Any],
    folder: Path,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """One epoch over every weight of `model`, by the recipe of its run; `folder` is for the loop's files and goes.

    Returns the validation loss before and after, in nats, and whether the epoch lowered it: `kept`. If not, the weights
    are left as they were.
    """
    given = Recipe.from_dict(recipe)
    settings = replace(given, lora=None, epochs=1, patience=1, lr=LR, head_lr=0.0, name=f"{given.name}-qat")
    seed_everything(settings.seed)
    before = {name: tensor.detach().clone() for name, tensor in trainable(model).items()}
    folder.mkdir()
    split = Split(examples, train, validation)
    trainer = Trainer(model, split, settings, folder, choose_precision(detect()), eager=True)
    loss_before, _ = trainer.validation()

    def show(progress: Progress, sequences: int, loss: float) -> None:
        if progress.step % _TOLD == 0:
            say(f"fine-tuning the quantized model: step {progress.step:,} of {trainer.total_steps:,}, loss {loss:.4f}")

    progress = trainer.fit(show)
    kept = progress.best_loss < loss_before
    if not kept:
        with torch.no_grad():
            for name, parameter in trainable(model).items():
                parameter.copy_(before[name])
    model.eval()
    shutil.rmtree(folder)
    return {"kept": kept, "validation_loss_before": loss_before, "validation_loss": progress.best_loss}

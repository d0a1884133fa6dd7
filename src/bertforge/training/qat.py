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
import torch.nn.functional as F

from bertforge.data.loader import Examples, Split
from bertforge.determinism import seed_everything
from bertforge.evaluation.logits import predict_logits
from bertforge.hardware import choose_precision, detect
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.training.checkpoint import Progress
from bertforge.training.config import Recipe
from bertforge.training.loop import Trainer

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

    Returns the validation loss before and after in nats, both in float32: in bfloat16, 8 bits are not what they are.
    """
    given = Recipe.from_dict(recipe)
    settings = replace(given, lora=None, epochs=1, patience=None, lr=LR, head_lr=LR, name=f"{given.name}-qat")
    seed_everything(settings.seed)
    folder.mkdir()
    split = Split(examples, train, validation)
    trainer = Trainer(model, split, settings, folder, choose_precision(detect()), eager=True)
    before = _loss(model, split)

    def show(progress: Progress, sequences: int, loss: float) -> None:
        if progress.step % _TOLD == 1:  # the first too: a step may take seconds
            say(f"fine-tuning the quantized model: step {progress.step:,} of {trainer.total_steps:,}, loss {loss:.4f}")

    trainer.fit(show)
    model.eval()
    shutil.rmtree(folder)
    return {"validation_loss_before": before, "validation_loss": _loss(model, split)}


def _loss(model: BertForSequenceClassification, split: Split) -> float:
    logits = torch.from_numpy(predict_logits(model, split.examples, split.validation, "fp32"))
    return float(F.cross_entropy(logits, torch.from_numpy(split.examples.labels[split.validation])))

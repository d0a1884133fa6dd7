"""The loop: steps, validation after each epoch, the best weights kept, checkpoints in between.

One pack of tokens is one optimizer step. The loss of a step is the mean over its sequences; the epoch's loss is the
mean over all sequences, so packs of different sizes weigh as they should.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from bertforge.artifact import write_atomic
from bertforge.data.loader import Examples, PackShape, epoch_plan, load
from bertforge.errors import ArtifactError, DataError
from bertforge.evaluation.logits import predict_logits
from bertforge.model.encoder import multiply_in_fp8
from bertforge.training import checkpoint
from bertforge.training.checkpoint import Progress
from bertforge.training.config import Recipe
from bertforge.training.history import History
from bertforge.training.optim import lr_scale, make_optimizer
from bertforge.training.step import EagerStep, GraphedStep

CHECKPOINT = "checkpoint.safetensors"
BEST = "best.safetensors"
_POINT_STEPS = 20  # steps between two points of the loss curve; reading the loss waits for the GPU


@dataclass(frozen=True)
class Split:
    """What the loop trains on and what it chooses the best epoch by."""

    examples: Examples
    train: np.ndarray
    """Row numbers."""
    validation: np.ndarray
    """Row numbers."""


class Trainer:
    """One run in one folder; `fit` may be interrupted and called again on a new Trainer with `resume`."""

    def __init__(
        self, model: nn.Module, split: Split, recipe: Recipe, directory: Path, precision: str, *, eager: bool = False
    ) -> None:
        """`eager` records no CUDA graph, for a model that may look at its values on the way (ModelOpt's quantizers)."""
        self.model = model
        self.split = split
        self.recipe = recipe
        self.directory = directory
        self.precision = precision
        self.device = next(model.parameters()).device
        if precision == "fp8":
            multiply_in_fp8(model)
        self.optimizer = make_optimizer(model, recipe)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.progress = Progress()
        self.plans = [
            epoch_plan(split.examples, split.train, recipe.tokens_per_step, recipe.seed, epoch)
            for epoch in range(recipe.epochs)
        ]
        self.total_steps = sum(map(len, self.plans))
        step = EagerStep(
            model,
            _class_weights(split, recipe).to(self.device),
            recipe.label_smoothing,
            recipe.max_grad_norm,
            precision,
        )
        # In float32, attention on a GPU reads the sequences' lengths back, which no graph can record.
        graphed = self.device.type == "cuda" and precision != "fp32" and not eager
        self.step = GraphedStep(step) if graphed else step
        self.shape = PackShape.of(self.plans, split.examples)

    def resume(self) -> None:
        """Goes on from the folder's checkpoint; without one, the run starts from its beginning."""
        path = self.directory / CHECKPOINT
        if path.is_file():
            self.progress = checkpoint.restore(path, self.model, self.optimizer)
            if self.progress.best_epoch:
                self._read_best()  # a damaged file is told now, not after the last epoch

    def fit(self, show: Callable[[Progress, int, float], None]) -> Progress:
        """Trains to the end, leaves the best epoch's weights in the model and says where the run stands.

        `show(progress, sequences, loss)` is called after every step. An interrupt ends the step or validation under
        way, saves a checkpoint and raises KeyboardInterrupt.
        """
        with History(self.directory, self.progress.history) as history, _interruptible() as interrupted:
            self._saved_at = time.monotonic()
            self._started = self._saved_at - self.progress.seconds
            while self.progress.epoch < self.recipe.epochs and not self._out_of_patience():
                self._train_epoch(history, interrupted, show)
                self._validate(history)
                self._save()
                if interrupted.is_set():
                    raise KeyboardInterrupt
        checkpoint.load_trainable(self.model, self._read_best(), self.directory / BEST)
        return self.progress

    def _train_epoch(
        self, history: History, interrupted: threading.Event, show: Callable[[Progress, int, float], None]
    ) -> None:
        progress, plan = self.progress, self.plans[self.progress.epoch]
        self.model.train()
        losses: list[Tensor] = []  # read together, so that the GPU is not waited for at every step
        loss_value = progress.history[-1].get("train/loss", float("nan")) if progress.history else float("nan")
        todo = plan[progress.step_in_epoch :]
        for rows, (batch, labels) in zip(todo, load(self.split.examples, todo, self.device, self.shape), strict=True):
            scale = lr_scale(progress.step, self.total_steps, self.recipe.warmup)
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * scale
            losses.append(self.step(batch, labels) * len(rows))
            self.optimizer.step()
            progress.step += 1
            progress.step_in_epoch += 1
            progress.sequences += len(rows)
            due = progress.step_in_epoch % _POINT_STEPS == 0 or progress.step_in_epoch == len(plan)
            stop = interrupted.is_set()  # asked once: an interrupt after this waits for the next step
            save = stop or self._checkpoint_due()
            if due or save:
                loss_value = self._read_losses(losses)
            if due:
                history.add({"step": progress.step, "train/loss": loss_value, "train/lr": self.peaks[0] * scale})
            if save:
                self._save()
            if stop:
                raise KeyboardInterrupt
            show(progress, len(rows), loss_value)

    def _read_losses(self, losses: list[Tensor]) -> float:
        """Adds the waiting losses to the epoch's sum and returns the mean of the epoch so far."""
        progress = self.progress
        for value in torch.stack(losses).tolist():  # one by one: the sum must not depend on when it is taken
            progress.loss_sum += value
        losses.clear()
        return self._finite(progress.loss_sum / progress.sequences)

    def _finite(self, loss: float) -> float:
        if not np.isfinite(loss):
            raise DataError(f"the loss became {loss} at step {self.progress.step}; lower lr or set precision=fp32")
        return loss

    def _validate(self, history: History) -> None:
        progress, split = self.progress, self.split
        logits = torch.from_numpy(predict_logits(self.model, split.examples, split.validation, self.precision))
        labels = torch.from_numpy(split.examples.labels[split.validation])
        loss = self._finite(float(F.cross_entropy(logits, labels)))
        accuracy = float((logits.argmax(1) == labels).double().mean())
        train_loss = progress.loss_sum / progress.sequences
        progress.epoch += 1
        history.add(
            {
                "step": progress.step,
                "epoch": progress.epoch,
                "epoch/train_loss": train_loss,
                "epoch/validation_loss": loss,
                "epoch/validation_accuracy": accuracy,
            }
        )
        progress.step_in_epoch, progress.sequences, progress.loss_sum = 0, 0, 0.0
        if loss < progress.best_loss:
            progress.best_loss, progress.best_epoch = loss, progress.epoch
            best = {
                name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.trainable(self.model).items()
            }
            write_atomic(self.directory / BEST, to_bytes(best))

    def _save(self) -> None:
        self.progress.seconds = time.monotonic() - self._started
        checkpoint.save(self.directory / CHECKPOINT, self.model, self.optimizer, self.progress)
        self._saved_at = time.monotonic()

    def _read_best(self) -> dict[str, Tensor]:
        path = self.directory / BEST
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ArtifactError(
                f"{path} is missing or damaged ({reason}); start the run anew without --resume"
            ) from error

    def _checkpoint_due(self) -> bool:
        return time.monotonic() - self._saved_at > self.recipe.checkpoint_seconds

    def _out_of_patience(self) -> bool:
        return self.progress.epoch - self.progress.best_epoch >= self.recipe.patience


def _class_weights(split: Split, recipe: Recipe) -> Tensor:
    labels = split.examples.labels[split.train]
    counts = np.bincount(labels)
    if recipe.class_weights == "balanced":
        return torch.tensor(len(labels) / (len(counts) * counts), dtype=torch.float32)
    return torch.ones(len(counts))


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C or SIGTERM into an event that the loop looks at between steps.

    A second one, of either kind, raises KeyboardInterrupt at once.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield event
        return

    numbers = (signal.SIGINT, signal.SIGTERM)

    def remember(number: int, frame: FrameType | None) -> None:
        event.set()
        for each in numbers:
            signal.signal(each, signal.default_int_handler)

    previous = {number: signal.signal(number, remember) for number in numbers}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

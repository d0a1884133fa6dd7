"""The loop: steps, validation after each epoch, the best weights kept, checkpoints in between.

One pack of tokens is one optimizer step. The loss of a step is the mean over its sequences; the epoch's loss is the
mean over all sequences, so packs of different sizes weigh as they should.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bertforge.data.loader import PackShape, Split, epoch_plan, load
from bertforge.data.packing import shares
from bertforge.errors import DataError
from bertforge.evaluation.logits import predict_logits
from bertforge.evaluation.temperature import fit_temperature
from bertforge.manifest import BEST, CHECKPOINT
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.model.encoder import multiply_in_fp8
from bertforge.training import checkpoint
from bertforge.training.checkpoint import Progress
from bertforge.training.config import Recipe
from bertforge.training.distributed import ALONE, WorkerLostError, World
from bertforge.training.history import History
from bertforge.training.idle import IdleMeter
from bertforge.training.optim import lr_scale, make_optimizer, set_lr
from bertforge.training.prefix import EagerPrefix, FrozenPrefix, frozen_layers
from bertforge.training.schedule import Schedule
from bertforge.training.sealed import read_tensors, write_tensors
from bertforge.training.step import EagerStep, GraphedStep

log = logging.getLogger(__name__)
_LEEWAY = 0.05  # of a run's `minutes` by which its steps may lie behind before its learning rate falls with the time
CPU_SHAPES = 16  # of packs: on average half a sixteenth of the largest pack is filled up
_POINT_STEPS = 20  # steps between two points of the loss curve; reading the loss waits for the GPU


class Trainer:
    """One run in one folder; `fit` may be interrupted and called again on a new Trainer with `resume`."""

    def __init__(
        self,
        model: BertForSequenceClassification,
        split: Split,
        recipe: Recipe,
        directory: Path,
        precision: str,
        *,
        eager: bool = False,
        world: World = ALONE,
    ) -> None:
        """`eager` records no CUDA graph, for a model that may look at its values on the way (ModelOpt's quantizers)."""
        self.model = model
        self.split = split
        self.recipe = recipe
        self.directory = directory
        self.precision = precision
        self.world = world
        self.device = next(model.parameters()).device
        if precision == "fp8":
            multiply_in_fp8(model)
        self.schedule = schedule = Schedule.of(recipe, split, model.config)
        self.optimizer = make_optimizer(model, schedule.lr, schedule.head_lr, recipe.weight_decay)
        self.progress = Progress()
        self.plans = [
            epoch_plan(
                split.examples, split.train, schedule.tokens_per_step, schedule.rows_per_step, recipe.seed, epoch
            )
            for epoch in range(schedule.epochs)
        ]
        self.total_steps = sum(map(len, self.plans))
        step = EagerStep(
            model,
            self.optimizer,
            class_weights(split, recipe).to(self.device),
            recipe.label_smoothing,
            recipe.max_grad_norm,
            precision,
            world,
        )
        # In float32, attention on a GPU reads the sequences' lengths back, which no graph can record.
        graphed = self.device.type == "cuda" and precision != "fp32" and not eager
        self.step = GraphedStep(step) if graphed else step
        dealt = ([share for rows in plan for share in split.examples.shares(rows, world.size)] for plan in self.plans)
        layers = frozen_layers(model.bert)
        # What frozen layers gave in one pack is read in another: bit for bit the same where all packs have one shape.
        one_shape = self.device.type == "cuda" or layers
        self.shape = PackShape.of(dealt, split.examples, 1 if one_shape else CPU_SHAPES)
        self.prefix: FrozenPrefix | None = None
        if layers:
            below = EagerPrefix(model.bert, layers, precision)
            self.prefix = FrozenPrefix(below, split, schedule.epochs, recipe.prefix_cache_gb, world, graphed=graphed)
        self._started = self._saved_at = time.monotonic()

    def resume(self) -> None:
        """Goes on from the folder's checkpoint; without one, the run starts from its beginning."""
        path = self.directory / CHECKPOINT
        if not path.is_file():
            log.warning(f"{self.directory} holds no checkpoint: the run starts from its beginning")
            return
        self.progress = checkpoint.restore(path, self.model, self.optimizer, self.world)
        if self.progress.best_epoch:
            read_tensors(self.directory / BEST)  # a damaged file is told now, not after the last epoch

    def fit(self, show: Callable[[Progress, int, float], None]) -> Progress:
        """Trains to the end, leaves the best epoch's weights in the model and says where the run stands.

        `show(progress, sequences, loss)` is called after every step. An interrupt ends the step or validation under
        way, saves a checkpoint and raises KeyboardInterrupt. Raises WorkerLostError when another process is gone.
        """
        try:
            self._fit(show)
        except WorkerLostError as error:
            step = checkpoint.saved_step(self.directory / CHECKPOINT)
            raise WorkerLostError(
                f"{error}; go on with --resume: "
                + (f"the checkpoint of step {step:,} in {self.directory} is whole" if step else "none was saved yet")
            ) from error
        finally:
            if isinstance(self.step, GraphedStep):
                self.step.release()
        best = self.directory / BEST
        checkpoint.load_trainable(self.model, read_tensors(best)[0], best)
        return self.progress

    def _fit(self, show: Callable[[Progress, int, float], None]) -> None:
        files = self.directory if self.world.first else None
        with History(files, self.progress.history) as history, _interruptible() as interrupted:
            self._saved_at = time.monotonic()
            self._started = self._saved_at - self.progress.seconds
            while self.progress.epoch < self.schedule.epochs and not self._is_enough():
                self.train_epoch(history.add, interrupted, show)
                self._validate(history)
                self._save()
                if self.world.any(interrupted.is_set())[0]:
                    raise KeyboardInterrupt

    def train_epoch(
        self,
        add: Callable[[dict[str, Any]], object],
        interrupted: threading.Event,
        show: Callable[[Progress, int, float], None],
    ) -> None:
        """Trains on what is left of the epoch under way; `add` is given the points of the loss curve."""
        progress, plan = self.progress, self.plans[self.progress.epoch]
        self.model.train()
        losses: list[Tensor] = []  # read together, so that the GPU is not waited for at every step
        loss_value = progress.history[-1].get("train/loss", float("nan")) if progress.history else float("nan")
        todo = plan[progress.step_in_epoch :]
        used = self._time_used()
        examples, world, meter, idle = self.split.examples, self.world, IdleMeter(self.device), 0.0
        mine = [examples.shares(rows, world.size)[world.rank] for rows in todo]
        packs = load(examples, mine, self.device, self.shape)
        if self.prefix:
            packs = self.prefix.feed(packs, mine, self.shape.tokens, meter.work)
        for rows, (batch, labels) in zip(todo, packs, strict=True):
            # With too little time for all steps, the next one's learning rate is that of a later step.
            late = int((used - _LEEWAY) / (1 - _LEEWAY) * self.total_steps)
            place = max(progress.step, min(late, self.total_steps - 1))
            scale = lr_scale(place, self.total_steps, self.schedule.warmup)
            set_lr(self.optimizer, scale)
            with meter.work():
                losses.append(self.step(batch, labels) * len(rows))
            progress.step += 1
            progress.step_in_epoch += 1
            progress.sequences += len(rows)
            used = self._time_used()
            last = progress.step_in_epoch == len(plan) or used > 1
            due = progress.step_in_epoch % _POINT_STEPS == 0 or last
            # Asked once: an interrupt after this waits for the next step. All processes stop and save at one step.
            stop, save = world.any(interrupted.is_set(), self._checkpoint_due())
            save = save or stop
            if due or save:
                loss_value = self._read_losses(losses)
                idle = progress.add_time(*meter.read())
            if due:
                lr = self.optimizer.param_groups[0]["peak"] * scale
                add({"step": progress.step, "train/loss": loss_value, "train/lr": lr, "train/idle": idle})
            if save:
                self._save()
            if stop:
                raise KeyboardInterrupt
            show(progress, len(rows), loss_value)
            if used > 1:
                break

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
        logits = self.validation_logits()
        labels = torch.from_numpy(split.examples.labels[split.validation])
        loss = self._finite(float(F.cross_entropy(logits, labels)))
        # Late epochs are surer than they should be and right more often. What is served is calibrated, so that counts.
        calibrated = float(F.cross_entropy(logits / fit_temperature(logits, labels), labels))
        accuracy = float((logits.argmax(1) == labels).double().mean())
        train_loss = progress.loss_sum / progress.sequences
        progress.epoch += 1
        history.add(
            {
                "step": progress.step,
                "epoch": progress.epoch,
                "epoch/train_loss": train_loss,
                "epoch/validation_loss": loss,
                "epoch/calibrated_loss": calibrated,
                "epoch/validation_accuracy": accuracy,
            }
        )
        progress.step_in_epoch, progress.sequences, progress.loss_sum = 0, 0, 0.0
        if calibrated < progress.best_loss:
            progress.best_loss, progress.best_epoch = calibrated, progress.epoch
            if self.world.first:
                write_tensors(self.directory / BEST, checkpoint.trainable(self.model), {"epoch": progress.epoch})

    def validation_logits(self) -> Tensor:
        """`[rows, labels]` float32; each process computes its share, and all get all."""
        examples, rows = self.split.examples, self.split.validation
        places = shares(examples.lengths(rows), self.world.size)[self.world.rank]
        logits = torch.zeros(len(rows), len(self.model.config.labels))
        if len(places):
            found = predict_logits(self.model, examples, rows[places], self.precision)
            logits[torch.from_numpy(places)] = torch.from_numpy(found)
        return self.world.sum(logits)

    def _save(self) -> None:
        self.progress.seconds = time.monotonic() - self._started
        checkpoint.save(self.directory / CHECKPOINT, self.model, self.optimizer, self.progress, self.world)
        self._saved_at = time.monotonic()

    def _checkpoint_due(self) -> bool:
        return time.monotonic() - self._saved_at > self.recipe.checkpoint_seconds

    def _is_enough(self) -> bool:
        """Whether the time or the patience is used up, once there is an epoch to keep."""
        patience, since = self.recipe.patience, self.progress.epoch - self.progress.best_epoch
        impatient = patience is not None and since >= patience
        return impatient or (self._time_used() > 1 and self.progress.best_epoch > 0)

    def _time_used(self) -> float:
        """The share of the run's `minutes`, 0 without; all processes go by the clock of the first."""
        if self.recipe.minutes is None:
            return 0.0
        seconds = torch.tensor(time.monotonic() - self._started)
        return float(self.world.gather(seconds)[0]) / (60 * self.recipe.minutes)


def class_weights(split: Split, recipe: Recipe) -> Tensor:
    """How heavy a row of each label is in the loss, `[labels]`."""
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
            if signal.getsignal(number) in (remember, signal.default_int_handler):  # not one that came since
                signal.signal(number, handler)

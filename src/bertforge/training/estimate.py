"""What fine-tuning will cost on this machine and this data: training's own steps, run for a minute and multiplied out.

Every variant is put together as for a run and driven by the same loop, on packs taken evenly from an epoch's plan, so
the figures hold the loader, the recorded graph and the precision that the run would have. A pack is filled up to one
shape, so an epoch costs its number of packs; validation packs are not, and cost their tokens. The learning rate is
next to nothing, which changes no speed and lets no loss blow up. Nothing is left on disk.
"""

from __future__ import annotations

import math
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bertforge.data.loader import spread
from bertforge.data.prepared import PreparedData
from bertforge.determinism import seed_everything
from bertforge.evaluation.logits import TOKENS_PER_PACK, predict_logits
from bertforge.hardware import choose_training_precision, detect
from bertforge.model.config import BertConfig
from bertforge.models import resolve
from bertforge.training.checkpoint import Progress, count_trainable
from bertforge.training.config import LoraRecipe, Recipe, load_recipe
from bertforge.training.finetune import assemble
from bertforge.training.loop import Trainer
from bertforge.training.memory import PeakMemory

SECONDS = 15.0  # of timed steps for each variant
OUT_OF_MEMORY = "out of memory: lower tokens_per_step"
_VALIDATION_SHARE = 0.2  # of those seconds, for validation
_LR = 1e-9
# In the RuntimeErrors of torch on a CPU and of cuBLAS.
_NO_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Estimate:
    """What one variant takes."""

    trainable_parameters: int
    set_up_seconds: float
    """Once a run: what the first step takes beyond another one, when kernels are chosen and a GPU's graph recorded."""
    steps_timed: int
    train_seconds: float
    """Of an epoch, the first one."""
    later_seconds: float
    """Of every epoch after it: fewer where the output of frozen layers is kept."""
    validation_seconds: float
    """Of an epoch."""
    questions_per_s: float
    """While the first epoch trains."""
    idle: float
    """Share of the timed steps' time in which no step was at work."""
    peak_memory_gb: float | None

    def seconds(self, epochs: int) -> float:
        """Seconds of so many epochs, validation included, set-up not."""
        return self.train_seconds + (epochs - 1) * self.later_seconds + epochs * self.validation_seconds


def estimate(
    data: Path,
    recipe: Recipe,
    price_per_hour: float | None = None,
    seconds: float | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Measures full fine-tuning, `lora-r8` and `lora-r8-last-4` with the rest of `recipe`; JSON-ready.

    A recipe with another [lora] section is measured too. A variant that does not fit the model or the memory has a row
    that says so; for everything else it raises what `assemble` and `choose_training_precision` raise.
    """
    prepared, hardware = PreparedData.open(data), detect()
    layers = BertConfig.load(resolve(recipe.model)).num_hidden_layers
    precision = choose_training_precision(hardware, recipe.precision)
    rehearsal = _Rehearsal(prepared, hardware.device, precision, seconds or SECONDS, say)
    rows = []
    for name, lora in _variants(recipe).items():
        row: dict[str, Any] = {"variant": name}
        if lora and lora.last_layers > layers:
            rows.append(row | {"missing": f"the model has {layers} layers, fewer than {lora.last_layers}"})
            continue
        if lora is None and precision == "fp8":
            rows.append(row | {"missing": "it trains the feed-forward, which precision=fp8 wants frozen"})
            continue
        try:
            found = rehearsal.measure(replace(recipe, name=name, lora=lora))
            rows.append(row | _figures(found, recipe.epochs, price_per_hour))
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            rows.append(row | {"missing": OUT_OF_MEMORY})
    return {
        "device": hardware.name,
        "peak_memory_of": "tensors on the GPU" if hardware.device.type == "cuda" else "the whole process",
        "precision": precision,
        "model": recipe.model,
        "tokens_per_step": recipe.tokens_per_step,
        "train_rows": len(prepared.rows(recipe.split, "train")),
        "validation_rows": len(prepared.rows(recipe.split, "validation")),
        "epochs": recipe.epochs,
        "price_per_hour": price_per_hour,
        "rows": rows,
    }


@dataclass(frozen=True)
class _Rehearsal:
    """What all variants share."""

    prepared: PreparedData
    device: torch.device
    precision: str
    seconds: float
    """To spend on timed steps."""
    say: Callable[[str], object]

    def measure(self, recipe: Recipe) -> Estimate:
        """Sets up a run of `recipe`, times some of its steps and some of its validation."""
        self.say(f"measuring {recipe.name}: set-up and first steps")
        memory = PeakMemory(self.device)
        seed_everything(recipe.seed)
        settings = replace(recipe, lr=_LR, head_lr=0.0, checkpoint_seconds=math.inf)  # no checkpoint falls due
        run = assemble(self.prepared, settings, self.device)
        with tempfile.TemporaryDirectory() as folder:  # frozen layers' output may go there; its file has no name
            trainer = Trainer(run.model, run.split, settings, Path(folder), self.precision)
        plan, steps_an_epoch = trainer.plans[0], trainer.total_steps / recipe.epochs
        first = _train(trainer, plan, 1)
        step = first if first > self.seconds else _train(trainer, plan, 1)  # a guess of what a step takes
        steps = min(len(plan), max(2, round(self.seconds / step)))
        self.say(f"measuring {recipe.name}: {steps:,} of {steps_an_epoch:,.0f} steps")
        step = _train(trainer, plan, steps) / steps
        idle = trainer.progress.idle
        kept = trainer.prefix is not None and trainer.prefix.cache is not None
        later = _train(trainer, plan, steps, later=True) / steps if kept else step
        self.say(f"measuring {recipe.name}: validation")
        validation = _validation_seconds(trainer, _VALIDATION_SHARE * self.seconds)
        return Estimate(
            trainable_parameters=count_trainable(run.model),
            set_up_seconds=max(0.0, first - step),
            steps_timed=steps,
            train_seconds=step * steps_an_epoch,
            later_seconds=later * steps_an_epoch,
            validation_seconds=validation,
            questions_per_s=len(run.split.train) / (step * steps_an_epoch),
            idle=idle,
            peak_memory_gb=memory.gb(),
        )


def _variants(recipe: Recipe) -> dict[str, LoraRecipe | None]:
    """The [lora] section of each, by the name it is shown under."""
    known = {"full": None, **{name: load_recipe(name).lora for name in ("lora-r8", "lora-r8-last-4")}}
    return known if recipe.lora in known.values() else {"as set": recipe.lora, **known}


def _train(trainer: Trainer, plan: list[np.ndarray], steps: int, *, later: bool = False) -> float:
    """Seconds of an epoch of so many packs, at even distances in `plan`.

    A `later` one finds what the one before it kept of frozen layers' output.
    """
    if trainer.prefix and not later:
        trainer.prefix.forget()
    places = np.linspace(0, len(plan) - 1, steps).astype(int)
    trainer.plans, trainer.progress = [[plan[place] for place in places]], Progress()
    start = time.perf_counter()
    trainer.train_epoch(lambda point: None, threading.Event(), lambda progress, sequences, loss: None)
    return time.perf_counter() - start  # the epoch ends by reading its losses, so a GPU is done by then


def _validation_seconds(trainer: Trainer, seconds: float) -> float:
    """Of all validation rows, from as many as it takes to spend `seconds`, by their share of the tokens.

    One pack at least, so that the peak memory is that of a run.
    """
    examples, rows = trainer.split.examples, trainer.split.validation
    count = math.ceil(TOKENS_PER_PACK / examples.lengths(rows).mean())
    while True:
        sample = spread(rows, count)
        start = time.perf_counter()
        predict_logits(trainer.model, examples, sample, trainer.precision)
        took = time.perf_counter() - start
        if took > seconds / 4 or len(sample) == len(rows):
            return float(took * examples.lengths(rows).sum() / examples.lengths(sample).sum())
        count *= 4


def _figures(found: Estimate, epochs: int, price_per_hour: float | None) -> dict[str, Any]:
    hours = {"device_hours_per_epoch": found.seconds(1) / 3600, "device_hours": found.seconds(epochs) / 3600}
    cost = {}
    if price_per_hour is not None:
        cost = {name.replace("device_hours", "cost"): price_per_hour * value for name, value in hours.items()}
    return {**asdict(found), "seconds_per_epoch": found.seconds(1), **hours, **cost}


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a lack of memory is what went wrong at first; while a graph is recorded, another error follows it."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(said in str(error) for said in _NO_MEMORY):
            return True
        error = error.__context__
    return False

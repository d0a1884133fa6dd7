"""What fine-tuning will cost on this machine and this data: training's own steps, run for a minute and multiplied out.

Every variant is put together as for a run and driven by the same loop, on packs taken evenly from an epoch's plan, so
the figures hold the loader, the recorded graph and the precision that the run would have. Packs are filled up to few
shapes, so an epoch costs its number of packs; validation packs are not, and cost their tokens. The learning rate is
next to nothing, which changes no speed and lets no loss blow up. Nothing is left on disk.

The minute is shared by the variants, set-up included. A variant whose share is used up stops after the step under way,
so a slow machine is measured by fewer steps, and by one at least. Steps are timed in a few rounds, each spread over the
epoch, and the median round counts: a moment's other work does not. Other work that goes on all the time slows every
round alike, so it is measured as well: the system counts how long a thread was ready to run and waited for a core.
"""

from __future__ import annotations

import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bertforge.data.loader import spread
from bertforge.data.prepared import PreparedData
from bertforge.data.tokens import Tokenizer
from bertforge.determinism import seed_everything
from bertforge.errors import is_out_of_memory
from bertforge.evaluation.logits import TOKENS_PER_PACK, predict_logits
from bertforge.hardware import choose_training_precision, detect
from bertforge.model.config import BertConfig
from bertforge.models import resolve
from bertforge.peak_memory import PeakMemory
from bertforge.training.checkpoint import Progress, count_trainable
from bertforge.training.config import Recipe, load_recipe, variants
from bertforge.training.finetune import assemble
from bertforge.training.loop import Trainer

SECONDS = 60.0  # for all variants
OUT_OF_MEMORY = "out of memory: lower tokens_per_step"
_ROUNDS = 5
_VALIDATION_SHARE = 0.2  # of a variant's seconds
_LR = 1e-9
_BUSY_WAITED, _BUSY_SPREAD = 0.2, 1.5  # more than this much waiting, or between two rounds: a busy machine
_SCHEDULED = Path("/proc/thread-self/schedstat")  # Linux: nanoseconds on a core, nanoseconds waiting for one, slices


@dataclass(frozen=True)
class Estimate:
    """What one variant takes."""

    epochs: int
    """Of a run by the variant's recipe."""
    trainable_parameters: int
    set_up_seconds: float
    """Once a run: what the first step takes beyond another one, when kernels are chosen and a GPU's graph recorded."""
    steps_timed: int
    train_seconds: float
    """Of an epoch, the first one: the median of the rounds."""
    train_seconds_low: float
    """By the fastest round."""
    train_seconds_high: float
    """By the slowest round."""
    later_seconds: float
    """Of every epoch after it: fewer where the output of frozen layers is kept."""
    validation_seconds: float
    """Of an epoch."""
    questions_per_s: float
    """Rows a second while the first epoch trains."""
    idle: float | None
    """Share of the timed steps' time in which no step was at work; None where too few were timed."""
    waited: float | None
    """Share of that time in which the training thread was ready and other work had the cores; None if not told."""
    peak_memory_gb: float | None

    @property
    def busy(self) -> bool:
        """Whether other work slowed the steps, so that an idle machine takes less."""
        return (self.waited or 0.0) > _BUSY_WAITED or self.train_seconds_high > _BUSY_SPREAD * self.train_seconds_low

    def seconds(self, epochs: int) -> float:
        """Seconds of so many epochs, validation included, set-up not."""
        return self.train_seconds + (epochs - 1) * self.later_seconds + epochs * self.validation_seconds


@dataclass(frozen=True)
class _Pass:
    """Steps that were run one after another."""

    steps: int
    seconds: float
    """Of each of them, on average."""
    idle: float
    """As `Estimate.idle`; NaN where the pass was cut short."""
    waited: float | None


class _TimeUpError(Exception):
    """Ends a pass."""


def estimate(
    data: Path,
    recipe: Recipe,
    price_per_hour: float | None = None,
    seconds: float | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Measures full fine-tuning, `lora-r8`, `lora-r8-last-4` and `recipe`; JSON-ready.

    It takes `seconds` (None: SECONDS), or a step of each variant where that is longer; a table whose tokens are not
    stored yet is tokenized first. A variant that does not fit the model or the memory has a row that says so; for
    everything else it raises what `assemble` and `choose_training_precision` raise.
    """
    prepared, hardware = PreparedData.open(data), detect()
    base = resolve(recipe.model)
    layers = BertConfig.load(base).num_hidden_layers
    precision = choose_training_precision(hardware, recipe.precision)
    prepared.tokens(Tokenizer.load(base))
    rehearsal = _Rehearsal(prepared, hardware.device, precision, say)
    end = time.monotonic() + (seconds or SECONDS)
    rows, todo = [], _variants(recipe)
    for place, (name, variant) in enumerate(todo.items()):
        row: dict[str, Any] = {"variant": name}
        if variant.lora and variant.lora.last_layers > layers:
            rows.append(row | {"missing": f"the model has {layers} layers, fewer than {variant.lora.last_layers}"})
            continue
        if variant.lora is None and precision == "fp8":
            rows.append(row | {"missing": "it trains the feed-forward, which precision=fp8 wants frozen"})
            continue
        left = end - time.monotonic()
        try:
            found = rehearsal.measure(variant, time.monotonic() + left / (len(todo) - place))
            rows.append(row | _figures(found, price_per_hour))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            rows.append(row | {"missing": OUT_OF_MEMORY})
    return {
        "device": hardware.name,
        "peak_memory_of": "tensors on the GPU" if hardware.device.type == "cuda" else "the whole process",
        "precision": precision,
        "model": recipe.model,
        "train_rows": len(prepared.rows(recipe.split, "train")),
        "validation_rows": len(prepared.rows(recipe.split, "validation")),
        "price_per_hour": price_per_hour,
        "rows": rows,
    }


@dataclass(frozen=True)
class _Rehearsal:
    """What all variants share."""

    prepared: PreparedData
    device: torch.device
    precision: str
    say: Callable[[str], object]

    def measure(self, recipe: Recipe, end: float) -> Estimate:
        """Sets up a run of `recipe`, times some of its steps and some of its validation until `end` (monotonic)."""
        start = time.monotonic()
        self.say(f"measuring {recipe.name}: set-up and first steps")
        memory = PeakMemory(self.device)
        seed_everything(recipe.seed)
        recipe = recipe.on(self.prepared.schema)
        settings = replace(recipe, lr=_LR, head_lr=_LR, checkpoint_seconds=math.inf)  # no checkpoint falls due
        run = assemble(self.prepared, settings, self.device)
        trainer = Trainer(run.model, run.split, settings, Path(os.devnull), self.precision)  # nothing is saved
        epochs, plan = len(trainer.plans), trainer.plans[0]
        steps_an_epoch = trainer.total_steps / epochs
        first = guess = _train(trainer, plan[:1], end)
        if time.monotonic() + first.seconds < end:
            guess = _train(trainer, plan[:1], end)
        self.say(f"measuring {recipe.name}: validation")
        validation = _validation_seconds(trainer, _VALIDATION_SHARE * (end - start), guess.seconds)
        rounds = []
        kept = trainer.prefix is not None and trainer.prefix.cache is not None
        for packs in _rounds(plan, (end - time.monotonic()) / guess.seconds / (2 if kept else 1)):
            if time.monotonic() + guess.seconds > end:
                break
            self.say(f"measuring {recipe.name}: {_ROUNDS} times {len(packs):,} of {steps_an_epoch:,.0f} steps")
            whole = _train(trainer, packs, end)
            later = _train(trainer, packs[: whole.steps], end, later=True) if kept else whole
            rounds.append((whole, later))
        rounds = rounds or [(guess, guess)]
        epoch_seconds = [whole.seconds * steps_an_epoch for whole, _ in rounds]
        median = statistics.median(epoch_seconds)
        return Estimate(
            epochs=epochs,
            trainable_parameters=count_trainable(run.model),
            set_up_seconds=max(0.0, first.seconds - median / steps_an_epoch),
            steps_timed=sum(whole.steps for whole, _ in rounds),
            train_seconds=median,
            train_seconds_low=min(epoch_seconds),
            train_seconds_high=max(epoch_seconds),
            later_seconds=statistics.median(later.seconds for _, later in rounds) * steps_an_epoch,
            validation_seconds=validation,
            questions_per_s=len(run.split.train) / median,
            idle=_median(whole.idle for whole, _ in rounds),
            waited=_median(whole.waited for whole, _ in rounds),
            peak_memory_gb=memory.gb(),
        )


def _variants(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe of each row by its name: three known ones, and `recipe` where it is none of them.

    A known one keeps its own settings where `recipe` changes none: where that has the value of the variant it is named
    after, or a recipe's default where it is named after none.
    """
    start = load_recipe(recipe.name) if recipe.name in variants() else Recipe()
    names = [field.name for field in fields(Recipe) if field.name not in ("name", "lora", "stackoverflow")]
    changed = {name: getattr(recipe, name) for name in names if getattr(recipe, name) != getattr(start, name)}
    found, as_set = {}, True
    for name, variant in {"full": "bert-base", "lora-r8": "lora-r8", "lora-r8-last-4": "lora-r8-last-4"}.items():
        known = replace(load_recipe(variant), **{"model": recipe.model, **changed})
        if (known.lora, known.tabular) == (recipe.lora, recipe.tabular):
            known, as_set = recipe, False
        found[name] = replace(known, name=name)
    return {"as set": replace(recipe, name="as set"), **found} if as_set else found


def _rounds(plan: list[np.ndarray], steps: float) -> list[list[np.ndarray]]:
    """`_ROUNDS` times packs at even distances in `plan`, each in a round once; some `steps` in all."""
    each = min(len(plan), max(1, int(steps / _ROUNDS)))
    places = np.linspace(0, len(plan) - 1, each * _ROUNDS).astype(int)
    return [[plan[place] for place in np.unique(places[number::_ROUNDS])] for number in range(_ROUNDS)]


def _train(trainer: Trainer, packs: list[np.ndarray], end: float, *, later: bool = False) -> _Pass:
    """An epoch of `packs`, or as many of them as are begun by `end`, one at least.

    A `later` one finds what the one before it kept of frozen layers' output.
    """
    if trainer.prefix and not later:
        trainer.prefix.forget()
    trainer.plans, trainer.progress = [packs], Progress()

    def stop_in_time(progress: Progress, sequences: int, loss: float) -> None:
        if time.monotonic() > end:
            raise _TimeUpError

    start, waited = time.perf_counter(), _waited()
    with suppress(_TimeUpError):
        trainer.train_epoch(lambda point: None, threading.Event(), stop_in_time)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    seconds, steps = time.perf_counter() - start, trainer.progress.step
    share = None if waited is None else ((_waited() or waited) - waited) / seconds
    return _Pass(steps, seconds / steps, trainer.progress.idle, share)


def _waited() -> float | None:
    """Seconds that this thread was ready to run while others had the cores, since it began; None if not told."""
    return int(_SCHEDULED.read_text().split()[1]) / 1e9 if _SCHEDULED.exists() else None


def _median(values: Iterable[float | None]) -> float | None:
    """Of those that are numbers."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return statistics.median(known) if known else None


def _validation_seconds(trainer: Trainer, seconds: float, step_seconds: float) -> float:
    """Of all validation rows, from as many as can be measured in `seconds`, by their share of the tokens.

    One pack at least, so that the peak memory is that of a run, unless that takes too long: a step of training, of
    `step_seconds`, does more for its tokens.
    """
    examples, rows = trainer.split.examples, trainer.split.validation
    end = time.monotonic() + seconds
    step_tokens = int(examples.lengths(trainer.plans[0][0]).sum())
    first = min(TOKENS_PER_PACK, seconds / 4 / step_seconds * step_tokens)
    count = max(1, math.ceil(first / examples.lengths(rows).mean()))
    while True:
        sample = spread(rows, count)
        took = [_scored(trainer, sample)]
        if took[0] > seconds / 8 or len(sample) == len(rows):
            break
        count *= 4
    while len(took) < 3 and time.monotonic() + took[-1] < end:
        took.append(_scored(trainer, sample))
    return float(statistics.median(took) * examples.lengths(rows).sum() / examples.lengths(sample).sum())


def _scored(trainer: Trainer, rows: np.ndarray) -> float:
    """Seconds that scoring `rows` takes."""
    start = time.perf_counter()
    predict_logits(trainer.model, trainer.split.examples, rows, trainer.precision)
    return time.perf_counter() - start


def _figures(found: Estimate, price_per_hour: float | None) -> dict[str, Any]:
    hours = {"device_hours_per_epoch": found.seconds(1) / 3600, "device_hours": found.seconds(found.epochs) / 3600}
    cost = {}
    if price_per_hour is not None:
        cost = {name.replace("device_hours", "cost"): price_per_hour * value for name, value in hours.items()}
    return {**asdict(found), "busy": found.busy, "seconds_per_epoch": found.seconds(1), **hours, **cost}

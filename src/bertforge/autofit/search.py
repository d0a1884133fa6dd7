"""Which settings suit a table: short trials on validation rows, by successive halving (Jamieson and Talwalkar 2016).

A trial is a whole small training, warm-up and decay included, of the settings that the run would have but on fewer
rows: a part of the train rows, or all of them for fewer epochs. All candidates get a short trial, the best third one of
three times the length, and the best of these is trained in full. How many candidates there are and how long a short
trial is follows from the time there is: a first, still shorter trial tells what a row costs on this machine.

A trial that is not done when the time for trials is up counts for nothing. The run takes what time is left; where that
is less than its epochs need, it ends sooner (`minutes` in training/config.py).

Trials are compared by the validation loss after temperature scaling, which tells two models apart sooner than the
accuracy of a few hundred rows. The probe that a run starts from is the same for all, and fitted once.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from bertforge.columns.transform import TabularSpec
from bertforge.data.loader import Split
from bertforge.data.prepared import PreparedData
from bertforge.determinism import generator, seed_everything
from bertforge.hardware import choose_training_precision, detect
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.model.config import BertConfig
from bertforge.models import resolve
from bertforge.training.checkpoint import Progress
from bertforge.training.config import Recipe, load_recipe
from bertforge.training.finetune import Run, assemble
from bertforge.training.loop import Trainer
from bertforge.training.schedule import Schedule
from bertforge.training.start import PROBE_SHARE, probe

ETA = 3  # one candidate in so many goes on, to trials of so many times the rows
LEAST_STEPS = 40  # of a trial: fewer say nothing
MOST_VALIDATION_ROWS = 2_000
_FORWARD = 0.4  # what a validation row costs, as a share of a train row
_MARGIN = 1.15  # of the time that a row should take, for what else the machine does

Say = Callable[[str], object]
"""Tells the user one line."""


@dataclass(frozen=True)
class Candidate:
    """Settings to try."""

    adapters: bool
    """LoRA on every linear layer; else every weight is trained."""
    speed: float
    """By which the derived learning rates are multiplied."""
    columns: bool
    """Whether the model reads columns beside the text."""

    @property
    def name(self) -> str:
        """For people."""
        kind = "LoRA" if self.adapters else "every weight"
        return f"{kind}, learning rate x {self.speed:g}{', with columns' if self.columns else ''}"


@dataclass(frozen=True)
class Trial:
    """What a trial of a candidate gave."""

    candidate: Candidate
    rows_seen: int
    """Train rows, each as often as it was seen."""
    loss: float
    """On validation rows, after temperature scaling."""
    accuracy: float
    seconds: float
    """Of training and validation; set-up not counted."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(**{**values, "candidate": Candidate(**values["candidate"])})


def candidates(columns: bool) -> list[Candidate]:
    """The likeliest first: a search of little time tries the first few."""
    kinds = ((True, 1.0), (False, 1.0), (True, 2.0), (False, 0.5), (True, 0.5), (False, 2.0))
    return [Candidate(*kind, read) for kind in kinds for read in ((True, False) if columns else (False,))]


class TimeUpError(Exception):
    """A trial would not end in time."""


class Workbench:
    """Puts candidates for one table together and tries them."""

    def __init__(self, data: PreparedData, model: str, columns: TabularSpec | None, seed: int) -> None:
        self.data, self.model, self.columns, self.seed = data, model, columns, seed
        split = data.split_name()
        self.rows, self.validation = (len(data.rows(split, part)) for part in ("train", "validation"))
        self.max_length = min(load_recipe().max_length, BertConfig.load(resolve(model)).max_position_embeddings)
        self.hardware = detect()
        self.precision = choose_training_precision(self.hardware)
        self.probe_s = 0.0
        """What the probe took, which the run makes again."""
        self._start: dict[str, Tensor] = {}

    def recipe(self, candidate: Candidate) -> tuple[Recipe, Run, Schedule]:
        """The candidate's recipe with its learning rates set, its model and data, and the schedule they multiply."""
        known = load_recipe()
        recipe = replace(
            known,
            name=("lora" if candidate.adapters else "full") + ("-columns" if candidate.columns else ""),
            model=self.model,
            max_length=self.max_length,
            split=self.data.split_name(),
            seed=self.seed,
            lora=known.lora if candidate.adapters else None,
            tabular=self.columns if candidate.columns else None,
        )
        seed_everything(self.seed)
        run = assemble(self.data, recipe, self.hardware.device)
        derived = Schedule.of(recipe, run.split, run.model.config)
        lr = derived.lr * candidate.speed
        recipe = replace(recipe, lr=lr, head_lr=derived.head_lr if candidate.columns else lr)
        return recipe, run, derived

    def trial(self, candidate: Candidate, rows_seen: int, end: float) -> Trial:
        """Trains the candidate on so many rows; raises TimeUpError when it is not done by `end` (monotonic).

        More rows than there are must be whole epochs.
        """
        recipe, run, _ = self.recipe(candidate)
        train, validation = run.split.train, run.split.validation
        draw = generator(self.seed, "trial")
        if rows_seen < len(train):
            train = np.sort(draw.choice(train, rows_seen, replace=False))
        if len(validation) > MOST_VALIDATION_ROWS:
            validation = np.sort(draw.choice(validation, MOST_VALIDATION_ROWS, replace=False))
        epochs = rows_seen // len(train)
        if run.probed:
            self._set_start(run, PROBE_SHARE * (end - time.monotonic()))

        def stop_in_time(progress: Progress, sequences: int, loss: float) -> None:
            if time.monotonic() > end:
                raise TimeUpError

        with tempfile.TemporaryDirectory() as folder:
            split = Split(run.split.examples, train, validation)
            trainer = Trainer(run.model, split, replace(recipe, epochs=epochs), Path(folder), self.precision)
            began = time.monotonic()
            progress = trainer.fit(stop_in_time)
        kept = next(point for point in progress.history if point.get("epoch") == progress.best_epoch)
        return Trial(
            candidate=candidate,
            rows_seen=rows_seen,
            loss=progress.best_loss,
            accuracy=kept["epoch/validation_accuracy"],
            seconds=time.monotonic() - began,
        )

    def _set_start(self, run: Run, seconds: float) -> None:
        """Probes the first model, and gives the others what was found; columns' part of the classifier is zero."""
        model = run.model
        if not self._start:
            began = time.monotonic()
            probe(model, run.split, self.precision, self.seed, seconds)
            self.probe_s = time.monotonic() - began
            self._start = {name: value.clone() for name, value in _text_part(model).items()}
        with torch.no_grad():
            model.classifier.weight.zero_()
            for name, value in _text_part(model).items():
                value.copy_(self._start[name])


def _text_part(model: BertForSequenceClassification) -> dict[str, Tensor]:
    """What a probe sets: views of the pooler, and of the classifier as far as it reads the text."""
    pooler, classifier = model.bert.pooler.dense, model.classifier
    return {
        "pooler.weight": pooler.weight.detach(),
        "pooler.bias": pooler.bias.detach(),
        "classifier.weight": classifier.weight.detach()[:, : model.config.hidden_size],
        "classifier.bias": classifier.bias.detach(),
    }


def short_trials(spare: float, a_row: float, overhead: float, count: int, least: float, most: float) -> tuple[int, int]:
    """How many candidates to try, of `count`, and the rows of a short trial: all that fits into `spare` seconds.

    A train row costs `a_row` seconds and a trial `overhead` beside its rows; a short trial has `least` to `most` rows.
    Fewer than two candidates are no search: (1, 0).
    """
    for tried in range(count, 1, -1):
        longer = math.ceil(tried / ETA)
        rows = (spare - (tried + longer) * overhead) / (a_row * (tried + ETA * longer))
        if rows >= least:
            return tried, int(min(rows, most))
    return 1, 0


@dataclass
class Log:
    """What a search has done so far, from which an interrupted one goes on."""

    keep: Callable[[], object] = lambda: None
    """Called after each change."""
    trials: list[Trial] = field(default_factory=list)
    count: int = 0
    """Candidates that get a short trial; 0 before that is decided."""
    short: int = 0
    """Rows of a short trial."""

    def trial(self, bench: Workbench, candidate: Candidate, rows: int, end: float, say: Say) -> Trial | None:
        """The trial on so many rows, made now if it was not before; None when it would not be done by `end`."""
        seen = rows if rows < bench.rows else round(rows / bench.rows) * bench.rows
        for trial in self.trials:
            if (trial.candidate, trial.rows_seen) == (candidate, seen):
                return trial
        say(f"trying {candidate.name}: {seen:,} rows")
        try:
            trial = bench.trial(candidate, seen, end)
        except TimeUpError:
            return None
        self.trials.append(trial)
        self.keep()
        return trial


def search(bench: Workbench, seconds: float, log: Log, say: Say) -> Recipe:
    """The recipe of the best candidate; its `minutes` are what the trials leave of `seconds`.

    Trials in `log` are not made again. What is evaluated after training is counted in.
    """
    end = time.monotonic() + seconds
    wanted = candidates(columns=bench.columns is not None)
    began = time.monotonic()
    recipe, _, schedule = bench.recipe(wanted[0])
    set_up = time.monotonic() - began
    least = min(bench.rows, LEAST_STEPS * (schedule.rows_per_step or 1))
    gauge = log.trial(bench, wanted[0], least, time.monotonic() + seconds / 4, say)
    if gauge is None:
        say("no time to compare settings; more --minutes make a better model")
        return replace(recipe, minutes=0.75 * max(end - time.monotonic(), seconds / 2) / 60)
    judged = _FORWARD * min(bench.validation, MOST_VALIDATION_ROWS)  # a trial's validation, in train rows
    a_row = _MARGIN * gauge.seconds / (gauge.rows_seen + judged)
    an_epoch = a_row * (bench.rows + _FORWARD * bench.validation)  # of the run
    end -= bench.probe_s + 3 * _FORWARD * a_row * bench.validation  # the kept epoch's validation, and as many test rows
    left = end - time.monotonic()
    spare = max(left / 4, left - schedule.epochs * an_epoch)  # for trials; the run takes the rest
    if not log.count:
        most = bench.rows * schedule.epochs / ETA**2
        log.count, log.short = short_trials(spare, a_row, set_up + a_row * judged, len(wanted), least, most)
        log.keep()
    best = _best(bench, wanted[: log.count], log, time.monotonic() + spare, say) if log.count > 1 else wanted[0]
    recipe, _, schedule = bench.recipe(best)
    left = max(end - time.monotonic(), left / 2)
    say(f"chosen: {best.name}" + (f" ({log.count} candidates)" if log.count > 1 else " (no time to compare settings)"))
    if left < schedule.epochs * an_epoch:
        say(f"{left / an_epoch:.1f} of {schedule.epochs} epochs fit into the time; more --minutes make a better model")
    return replace(recipe, minutes=left / 60)


def _best(bench: Workbench, rung: list[Candidate], log: Log, end: float, say: Say) -> Candidate:
    """The candidate with the lowest loss in the longest trials that `end` allows."""
    goes_on = math.ceil(len(rung) / ETA)
    for rows in (log.short, ETA * log.short):
        trials: list[Trial] = []
        for candidate in rung:
            trial = log.trial(bench, candidate, rows, end, say)
            if trial is None:
                break
            trials.append(trial)
        if not trials:
            break
        rung = [trial.candidate for trial in sorted(trials, key=lambda trial: trial.loss)[:goes_on]]
    return rung[0]

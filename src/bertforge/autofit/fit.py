"""`fit`: from a table to the best model and its fastest proved engine, in a given time and with nothing to set.

Each stage leaves a folder: `data`, `run`, `model` (an adapter merged), `engine`; and `report.html`. `fit.json` holds
what was decided and how much of the time is used, so that the same call goes on where an interrupted one stopped. The
last thing written is `bertforge.json`: the folder then stands for its engine, and `predict` takes it by name.

Of the time, a part is set aside for what follows training; short trials and the run share the rest (search.py). What
takes its time whatever the settings, the table and the baselines, comes first, so that all else can be cut to what is
left. Test rows are read once, at the end.
"""

from __future__ import annotations

import atexit
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from bertforge.artifact import hash_file
from bertforge.autofit.columns import Columns, choose_columns
from bertforge.autofit.search import Log, Say, Trial, Workbench, search
from bertforge.data.concerns import concerns
from bertforge.data.dialect import Dialect
from bertforge.data.prepare import prepare
from bertforge.data.prepared import PreparedData
from bertforge.data.tokens import Tokenizer
from bertforge.digests import read_sealed, write_sealed
from bertforge.engines.fastest import AUTO, candidates
from bertforge.errors import ArtifactError, DataError, MachineError, UsageError, reason, removal
from bertforge.evaluation.baselines import baselines
from bertforge.hardware import detect
from bertforge.inference.evaluate import evaluate_run
from bertforge.inference.predictor import Predictor
from bertforge.jobs.compile import compile_fastest
from bertforge.jobs.merge import merge_run
from bertforge.locks import LOCK, locked
from bertforge.lora.adapter_io import ADAPTER_CONFIG
from bertforge.manifest import MANIFEST, RUNNING, read_manifest, write_manifest
from bertforge.models import resolve
from bertforge.training.config import Recipe
from bertforge.training.finetune import finetune

STATE = "fit.json"
LEAST_MINUTES = 1.0
_AFTER_SHARE, _AFTER_LEAST, _AFTER_MOST = 0.4, 30.0, 180.0  # of the time, for what follows training; seconds
_TRAINING_LEAST = 0.2  # of the time, for training, however long the table took

Train = Callable[[Path, Path, Recipe, bool], dict[str, Any]]
"""Prepared data, the run's folder, the recipe and whether to resume -> the run's manifest."""


@dataclass(frozen=True)
class FitOptions:
    """What decides a fit, beside the table."""

    label_column: str | None = None
    """None: the Stack Overflow questions table."""
    text_columns: tuple[str, ...] = ()
    """None named: those that read like text."""
    minutes: float = 10.0
    """That all may take."""
    model: str = "minilm"
    """The pretrained checkpoint."""
    seed: int = 42
    encoding: str = ""
    """Of a text table; "": detected."""
    separator: str = ""
    """Between its columns; "": detected."""

    @property
    def dialect(self) -> Dialect:
        return Dialect(self.encoding, self.separator)

    def __post_init__(self) -> None:
        if not LEAST_MINUTES <= self.minutes < math.inf:
            raise UsageError(
                f"--minutes {self.minutes:g} cannot be kept; name a number of minutes, {LEAST_MINUTES:g} or more"
            )


def fit(
    table: pd.DataFrame | str | Path,
    label: str,
    text: str | list[str] | tuple[str, ...] = (),
    *,
    minutes: float = 10.0,
    out: str | Path | None = None,
    model: str = "minilm",
    seed: int = 42,
    say: Say = print,
) -> Predictor:
    """The best classifier of the column `label` that can be had in `minutes`: `fit(frame, label="folder")`.

    `table` is a frame or a file that `bertforge prepare` reads; `text` names its text columns where the guess is wrong.
    All goes into the folder `out`; without one, into a folder that is removed when Python ends. A call that was
    interrupted goes on when it is made again with the same `out`, and one that was finished returns its model.
    `Predictor.load(out)` loads the result later.

    Raises DataError for a table that cannot be learnt from, UsageError for options that cannot be, and ArtifactError
    when `out` holds something else.
    """
    options = FitOptions(label, (text,) if isinstance(text, str) else tuple(text), minutes, model, seed)
    folder = Path(out) if out is not None else _passing_folder()
    if not isinstance(table, pd.DataFrame):
        fit_table(Path(table), folder, options, say=say)
        return Predictor.load(folder)
    with tempfile.TemporaryDirectory(prefix="bertforge-") as stored:
        path = Path(stored) / "table.parquet"
        try:
            table.rename(columns=str).to_parquet(path, index=False)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, ValueError) as error:
            raise DataError(f"the frame cannot be stored ({error}); give each column one type") from error
        fit_table(path, folder, options, say=say)
    return Predictor.load(folder)


def fit_table(
    table: Path,
    out: Path,
    options: FitOptions,
    *,
    say: Say = print,
    train: Train = lambda data, run, recipe, resume: finetune(data, run, recipe, resume=resume),
) -> dict[str, Any]:
    """Does all that is not done yet in `out`, and returns its manifest; see `fit`.

    `say` is told each stage, `train` trains and shows how far it is.
    """
    with locked(out):
        return _fit_table(table, out, options, say, train)


def _fit_table(table: Path, out: Path, options: FitOptions, say: Say, train: Train) -> dict[str, Any]:
    state = _State.open(table, out, options)
    if state.is_finished:
        say(f"{out} holds this fit, finished: nothing to do")
        return read_manifest(out, "fit")
    try:
        _all_stages(table, out, options, state, say, train)
    except BaseException:
        if state.path.is_file():
            state.save()  # the time that was used
        else:
            with suppress(OSError):  # it holds something
                out.rmdir()
        raise
    state.path.unlink()
    return read_manifest(out, "fit")


def _all_stages(table: Path, out: Path, options: FitOptions, state: _State, say: Say, train: Train) -> None:
    chosen = choose_columns(table, options.label_column, options.text_columns, options.seed, options.dialect)
    data, run = out / "data", out / "run"
    prepared = _prepared(table, data, chosen, options, say)
    state.save()  # not before: a table that cannot be learnt from leaves nothing behind
    if state.recipe is None:
        say("fitting simple baselines, to see what the model is worth")
        baselines(prepared, prepared.split_name(), chosen.beside)
        after = min(_AFTER_MOST, max(_AFTER_LEAST, _AFTER_SHARE * state.seconds))
        seconds = max(state.left() - after, _TRAINING_LEAST * state.seconds)
        bench = Workbench(prepared, options.model, chosen.beside, options.seed)
        state.recipe = search(bench, seconds, state.log, say)
        state.save()
    if not (run / MANIFEST).is_file():
        train(data, run, state.recipe, (run / RUNNING).is_file())
        state.save()
    model = out / "model" if (run / ADAPTER_CONFIG).is_file() else run
    if not (model / MANIFEST).is_file():
        say("merging the adapter")
        merge_run(run, model)
    say("evaluating on the test rows")
    evaluation = evaluate_run(run, data, "test")
    if state.engines is None:
        state.engines = _engines(model, data, out / "engine", state, say)
        state.save()
    ranked = sorted(state.log.trials, key=lambda trial: (-trial.rows_seen, trial.loss))
    trials = [{"name": trial.candidate.name, **trial.to_dict()} for trial in ranked]
    evaluation.write_mistakes(out / "report.html")
    try:
        evaluation.write_report(out / "report.html", trials, state.engines)
    except MachineError as error:
        say(f"note: no report was written: {error}")
    write_manifest(
        out,
        "fit",
        leave_out=(STATE,),
        serves="engine" if (out / "engine" / MANIFEST).is_file() else model.name,
        **state.identity,
        recipe=state.recipe.to_dict(),
        trials=trials,
        metrics=evaluation.metrics.to_dict(),
        baselines=evaluation.standing.to_dict() if evaluation.standing else None,
        calibration=evaluation.calibration,
        engines=state.engines,
        seconds=round(state.used(), 1),
    )


def _prepared(table: Path, data: Path, chosen: Columns, options: FitOptions, say: Say) -> PreparedData:
    for line in chosen.told:
        say(line)
    prepared = prepare(table, data, Tokenizer.load(resolve(options.model)), chosen.options)
    counts = prepared.manifest["splits"][prepared.split_name()]
    say(
        f"{len(prepared):,} rows, {len(prepared.label_names)} labels: {counts['train']:,} train, "
        f"{counts['validation']:,} validation, {counts['test']:,} test"
    )
    for concern in concerns(prepared):
        say(f"note: {concern}")
    return prepared


def _engines(model: Path, data: Path, out: Path, state: _State, say: Say) -> list[dict[str, Any]]:
    """The engines tried, the kept one first; none where none can be had."""
    shutil.rmtree(out, ignore_errors=True)  # of a fit that was stopped before it had noted what it tried
    try:
        wanted = candidates(model, AUTO, AUTO, detect(), data)
        return [tried.to_dict() for tried in compile_fastest(model, wanted, data, out, say, seconds=state.left())]
    except Exception as error:  # of any library: the model is there, whatever is wrong with its engines
        say(f"note: no engine was compiled, so PyTorch serves the model ({reason(error)})")
        return []


def _passing_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="bertforge-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


class _State:
    """`fit.json`: what an interrupted fit has decided, and the time it has used."""

    def __init__(self, out: Path, identity: dict[str, Any], saved: dict[str, Any]) -> None:
        self.path, self.identity = out / STATE, identity
        self.seconds: float = 60.0 * identity["options"]["minutes"]
        self.is_finished = (out / MANIFEST).is_file()
        trials = [Trial.from_dict(trial) for trial in saved.get("trials", [])]
        self.log = Log(self.save, trials, *saved.get("plan", (0, 0)))
        self.recipe = Recipe.from_dict(saved["recipe"]) if saved.get("recipe") else None
        self.engines: list[dict[str, Any]] | None = saved.get("engines")
        self._before, self._began = float(saved.get("seconds", 0.0)), time.monotonic()

    @classmethod
    def open(cls, table: Path, out: Path, options: FitOptions) -> _State:
        """The state in `out`, or a new one; raises ArtifactError when `out` holds another fit or something else."""
        if not table.is_file():
            raise DataError(f"{table} does not exist; name a table")
        identity = {"table": {"name": table.name, "hash": hash_file(table)}, "options": asdict(options)}
        identity = json.loads(json.dumps(identity))  # lists for tuples, as they come back from a file
        path = out / STATE
        if (out / MANIFEST).is_file():
            found = read_manifest(out, "fit")
            _check_same(out, found, identity)
            return cls(out, identity, {})
        if not path.is_file():
            others = out.iterdir() if out.is_dir() else ()
            if out.is_file() or any(not entry.name.startswith((".data.", LOCK)) for entry in others):
                raise ArtifactError(f"{out} is not an empty folder; name another one with --out")
            return cls(out, identity, {})
        try:
            saved = read_sealed(path)
            found = saved["identity"]
            state = cls(out, identity, saved)
        except (ValueError, KeyError, TypeError, UsageError) as error:
            raise ArtifactError(f"{path} is damaged ({error!r}); start anew: {removal(out)}") from error
        _check_same(out, found, identity)
        return state

    def used(self) -> float:
        """Seconds, those before an interruption included."""
        return self._before + time.monotonic() - self._began

    def left(self) -> float:
        """Seconds of the time that there was."""
        return self.seconds - self.used()

    def save(self) -> None:
        """Writes the file."""
        state = {
            "identity": self.identity,
            "seconds": self.used(),
            "trials": [trial.to_dict() for trial in self.log.trials],
            "plan": [self.log.count, self.log.short],
            "recipe": None if self.recipe is None else self.recipe.to_dict(),
            "engines": self.engines,
        }
        write_sealed(self.path, state)


def _check_same(out: Path, found: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises ArtifactError naming what was different when the fit in `out` was begun."""
    other = f"name another folder with --out, or start anew: {removal(out)}"
    if found["table"]["hash"] != given["table"]["hash"]:
        raise ArtifactError(f"{out} holds a fit of another table, {found['table']['name']}; {other}")
    for name, value in given["options"].items():
        if found["options"][name] != value:
            option = f"--{name.replace('_', '-')}"
            raise ArtifactError(f"{out} holds a fit with {option} {found['options'][name]}, not {value}; {other}")

"""`fit`: from a table to the best model and its fastest proved engine, in a given time and with nothing to set.

Each stage leaves a folder: `data`, `run`, `model` (an adapter merged), `engine`; and `report.html`. `fit.json` holds
what was decided and how much of the time is used, so that the same call goes on where an interrupted one stopped. The
last thing written is `bertforge.json`: the folder then stands for its engine, and `predict` takes it by name.

Of the time, a part is set aside for what follows training; short trials and the run share the rest (search.py). Test
rows are read once, at the end.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from bertforge.artifact import MANIFEST, RUNNING, hash_file, read_manifest, write_json, write_manifest
from bertforge.autofit.columns import Columns, choose_columns
from bertforge.autofit.search import Trial, Workbench, search
from bertforge.benchmark.fastest import AUTO, Candidate, candidates, compile_fastest
from bertforge.data.concerns import concerns
from bertforge.data.prepare import prepare
from bertforge.data.prepared import PreparedData
from bertforge.data.tokens import Tokenizer
from bertforge.errors import ArtifactError, DataError, MachineError, UsageError, reason
from bertforge.hardware import detect
from bertforge.inference.evaluate import Evaluation, evaluate_run
from bertforge.inference.merge import merge_run
from bertforge.inference.predictor import Predictor
from bertforge.lora.adapter_io import ADAPTER_CONFIG
from bertforge.models import resolve
from bertforge.training.config import Recipe
from bertforge.training.finetune import finetune

STATE = "fit.json"
LEAST_MINUTES = 1.0
_AFTER_SHARE, _AFTER_LEAST, _AFTER_MOST = 0.3, 30.0, 180.0  # of the time, for what follows training; seconds

Say = Callable[[str], object]
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

    def __post_init__(self) -> None:
        if not self.minutes >= LEAST_MINUTES:
            raise UsageError(f"--minutes {self.minutes:g} is too short to train in; name {LEAST_MINUTES:g} or more")


@dataclass(frozen=True)
class Fitted:
    """What a fit ended with."""

    out: Path
    manifest: dict[str, Any]
    evaluation: Evaluation
    engines: list[Candidate]
    """The kept one first; empty where the folder was complete already."""


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
    interrupted goes on when it is made again with the same `out`. `Predictor.load(out)` loads the result later.

    Raises DataError for a table that cannot be learnt from, UsageError for options that cannot be, and ArtifactError
    when `out` holds something else.
    """
    options = FitOptions(label, (text,) if isinstance(text, str) else tuple(text), minutes, model, seed)
    folder = Path(out) if out is not None else _passing_folder()
    if isinstance(table, pd.DataFrame):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "table.parquet"
        try:
            table.to_parquet(path, index=False)
        except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError) as error:
            raise DataError(f"the frame cannot be stored ({error}); give each column one type") from error
    else:
        path = Path(table)
    fit_table(path, folder, options, say=say)
    return Predictor.load(folder)


def fit_table(
    table: Path,
    out: Path,
    options: FitOptions,
    *,
    say: Say = print,
    train: Train = lambda data, run, recipe, resume: finetune(data, run, recipe, resume=resume),
) -> Fitted:
    """Does all that is not done yet in `out`; see `fit`. `say` is told each stage, `train` trains and shows how far."""
    state = _State.open(table, out, options)
    data, run = out / "data", out / "run"
    chosen = choose_columns(table, options.label_column, options.text_columns, options.seed)
    prepared = _prepared(table, data, chosen, options, say)
    recipe = state.recipe
    after = min(_AFTER_MOST, max(_AFTER_LEAST, _AFTER_SHARE * state.seconds))
    if recipe is None:
        bench = Workbench(prepared, options.model, chosen.beside, options.seed)
        recipe = search(bench, state.left() - after, state.trials, state.add, say)
        state.decide(recipe)
    if not (run / MANIFEST).is_file():
        train(data, run, recipe, (run / RUNNING).is_file())
        state.save()
    say("evaluating on the test rows")
    evaluation = evaluate_run(run, data, "test")
    model = out / "model" if (run / ADAPTER_CONFIG).is_file() else run
    if not (model / MANIFEST).is_file():
        say("merging the adapter")
        merge_run(run, model)
    engines = _engines(model, data, out / "engine", state, say)
    evaluation.write_report(out / "report.html")
    manifest = {
        "serves": "engine" if (out / "engine" / MANIFEST).is_file() else model.name,
        "model": model.name,
        "options": asdict(options),
        "table": state.identity["table"],
        "recipe": recipe.to_dict(),
        "trials": [trial.to_dict() for trial in state.trials],
        "metrics": evaluation.metrics.to_dict(),
        "seconds": round(state.used(), 1),
    }
    write_manifest(out, "fit", **manifest)
    (out / STATE).unlink()
    return Fitted(out, read_manifest(out, "fit"), evaluation, engines)


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


def _engines(model: Path, data: Path, out: Path, state: _State, say: Say) -> list[Candidate]:
    """The engines tried, the kept one first; none where one is there already or none can be had."""
    if (out / MANIFEST).is_file():
        return []
    try:
        wanted = candidates(model, AUTO, AUTO, detect(), data)
        return compile_fastest(model, wanted, data, out, say, seconds=state.left())
    except (MachineError, ArtifactError) as error:
        say(f"note: no engine was compiled, so PyTorch serves the model ({reason(error)})")
        return []


def _passing_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="bertforge-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


class _State:
    """`fit.json`: what an interrupted fit has decided, and the time it has used."""

    def __init__(self, path: Path, identity: dict[str, Any], seconds: float, saved: dict[str, Any]) -> None:
        self.path, self.identity, self.seconds = path, identity, seconds
        self.trials = [Trial.from_dict(trial) for trial in saved.get("trials", [])]
        self.recipe = Recipe.from_dict(saved["recipe"]) if saved.get("recipe") else None
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
            raise ArtifactError(f"{out} holds a finished fit; use it, or name another folder with --out")
        if not path.is_file():
            if out.is_file() or (out.exists() and any(entry != table for entry in out.iterdir())):
                raise ArtifactError(f"{out} is not an empty folder; name another one with --out")
            state = cls(path, identity, 60 * options.minutes, {})
            state.save()
            return state
        try:
            saved = json.loads(path.read_text())
            found = saved["identity"]
            state = cls(path, identity, 60 * options.minutes, saved)
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path} is damaged ({error!r}); start anew: rm -r {out}") from error
        for part in ("table", "options"):
            if found[part] != identity[part]:
                raise ArtifactError(f"{out} holds a fit that was begun with other {part}; name another --out")
        return state

    def used(self) -> float:
        """Seconds, those before an interruption included."""
        return self._before + time.monotonic() - self._began

    def left(self) -> float:
        """Seconds of the time that there was."""
        return self.seconds - self.used()

    def add(self, trial: Trial) -> None:
        """Keeps a trial."""
        self.trials.append(trial)
        self.save()

    def decide(self, recipe: Recipe) -> None:
        """Keeps what the search chose."""
        self.recipe = recipe
        self.save()

    def save(self) -> None:
        """Writes the file."""
        recipe = None if self.recipe is None else self.recipe.to_dict()
        trials = [trial.to_dict() for trial in self.trials]
        write_json(self.path, {"identity": self.identity, "seconds": self.used(), "trials": trials, "recipe": recipe})

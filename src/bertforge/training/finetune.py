"""One fine-tuning run from prepared data to a saved model; the six variants differ only in their recipe.

The run's folder ends as a Hugging Face folder (`config.json` and `model.safetensors`) or a PEFT one
(`adapter_config.json` and `adapter_model.safetensors`), with tokenizer files and `bertforge.json` beside them. While
training goes on it holds `checkpoint.safetensors` and `best.safetensors` instead, and `start.safetensors` where a
linear probe set the pooler and the classifier.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bertforge.artifact import hash_file
from bertforge.columns.transform import TabularTransform
from bertforge.data.loader import Examples, Split, spread
from bertforge.data.prepared import PreparedData
from bertforge.data.schema import CLOSED_DATE, STACK_OVERFLOW, Schema
from bertforge.data.tokens import Tokenizer
from bertforge.determinism import branch, seed_everything
from bertforge.digests import read_sealed, write_sealed
from bertforge.errors import ArtifactError, DataError, UsageError, removal
from bertforge.evaluation.baselines import fitted_beside, installed
from bertforge.evaluation.drift import REFERENCE_ROWS, Reference
from bertforge.evaluation.standing import standing
from bertforge.evaluation.temperature import fit_temperature
from bertforge.hardware import Hardware, choose_training_precision, detect
from bertforge.locks import holds_something, locked
from bertforge.lora.adapter_io import save_adapter
from bertforge.lora.config import LoraConfig
from bertforge.lora.inject import inject_lora
from bertforge.manifest import (
    CHECKPOINT,
    MANIFEST,
    RUNNING,
    START,
    WHILE_TRAINING,
    clear_training,
    put_right,
    write_manifest,
)
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.models import MINILM, MINILM_HUB_ID, minilm_folder, resolve, weights_file
from bertforge.proof.golden import GoldenRows, spread_rows
from bertforge.training.checkpoint import Progress, count_trainable
from bertforge.training.config import Recipe
from bertforge.training.distributed import World, joined
from bertforge.training.loop import Trainer, class_weights
from bertforge.training.schedule import Schedule
from bertforge.training.sealed import read_tensors, write_tensors
from bertforge.training.start import PROBE_SHARE, is_probed, probe

_OF_A_RUN = (".json", ".jsonl", ".safetensors")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a run is about to do, for the caller to show before it starts."""

    recipe: Recipe
    hardware: Hardware
    processes: int
    precision: str
    trainable_parameters: int
    train_rows: int
    validation_rows: int
    schedule: Schedule
    mean_tokens: float
    """Of a train row."""
    total_steps: int
    resumed_step: int
    probe: dict[str, Any] | None
    """What the linear probe found; None where the classifier starts otherwise."""
    frozen: str | None
    """Which layers are frozen and where their output is kept; None where the lowest layer is trained."""


@dataclass(frozen=True)
class Run:
    """A model put together from a recipe and data, ready to train."""

    model: BertForSequenceClassification
    split: Split
    tokenizer: Tokenizer
    transform: TabularTransform | None
    lora: LoraConfig | None
    base: Path
    probed: bool
    """The pooler and the classifier start from a linear probe."""


@dataclass(frozen=True)
class _Start:
    """A run about to take its first step, or its next."""

    prepared: PreparedData
    run: Run
    trainer: Trainer
    plan: Plan


def finetune(
    data: Path,
    out: Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    started: Callable[[Plan], None] = lambda plan: None,
    show: Callable[[Progress, int, float], None] = lambda progress, sequences, loss: None,
) -> dict[str, Any]:
    """Trains and saves a run in `out`; returns its manifest. Under torchrun, all its processes train one model.

    `started` and `show` are called in the first process alone. Raises ArtifactError when another command is training in
    `out`, when `out` holds a run already and `resume` is false, or when the run to resume was started with another
    recipe, other data, another base model or on another kind of device.
    """
    prepared = PreparedData.open(data)
    recipe = replace(recipe.on(prepared.schema), split=prepared.split_name(recipe.split))
    with joined() as world, ExitStack() as held:
        with world.together():
            if world.first:  # for all of them
                held.enter_context(locked(out))
        start = _start(data, out, recipe, resume, world)
        run, trainer, plan = start.run, start.trainer, start.plan
        if world.first:
            started(plan)
        beside = world.first and plan.hardware.device.type == "cuda" and installed()
        with fitted_beside(start.prepared, recipe.split, recipe.tabular) if beside else nullcontext():
            progress = trainer.fit(show if world.first else lambda progress, sequences, loss: None)
        with world.together():  # after it, nobody reads what goes
            if world.first:
                _save(run, recipe, out)
        logits = trainer.validation_logits().numpy()  # [rows, labels] of the weights that were kept
        manifest = {
            **describe(run, start.prepared, {**_json(recipe), **plan.schedule.to_dict(), "precision": plan.precision}),
            "precision": plan.precision,
            "device": plan.hardware.name,
            "processes": world.size,
            "trainable_parameters": plan.trainable_parameters,
            "probe": plan.probe,
            "metrics": _summary(progress, trainer),
            "history": progress.history,
            "temperature": fit_temperature(logits, run.split.examples.labels[run.split.validation]),
            "label_shares": label_shares(run.split, recipe),
            "reference": _reference(run, start.prepared, logits.argmax(axis=1)),
            **_golden(run, start.prepared),
        }
        if world.first:
            found = standing(start.prepared, recipe.split, "validation", recipe.tabular, logits)
            manifest["baselines"] = found.to_dict()
            # Curves for people, and what a user keeps here, such as a log, may change.
            others = [path.name for path in out.iterdir() if path.suffix not in _OF_A_RUN]
            write_manifest(out, "run", leave_out=(*WHILE_TRAINING, *others), **manifest)
            clear_training(out)
        return manifest


def _start(data: Path, out: Path, recipe: Recipe, resume: bool, world: World) -> _Start:
    """Everything up to the first step; see `finetune` for what it raises.

    The first process alone looks at the run's folder before it is in use, and writes to it.
    """
    with world.together():
        prepared = PreparedData.open(data)
        if world.first:
            resume = _check_folder(out, resume)
        hardware = detect()
        if hardware.device.type == "cuda":
            torch.cuda.set_device(hardware.device)
        identity = {
            "recipe": _json(replace(recipe, prefix_cache_gb=None)),  # where things are kept changes no result
            "data": prepared.fingerprint,
            "device": hardware.device.type,
        }
        if world.first and resume:
            _read_running(out / RUNNING, identity)  # before the model is looked for: it may be another by mistake
        identity["base weights"] = hash_file(weights_file(resolve(recipe.model)))
        precision = ""
        if world.first:
            # "auto" may measure something else on another day, so a resumed run keeps what it began with.
            wanted = _read_running(out / RUNNING, identity) if resume else recipe.precision
            precision = choose_training_precision(hardware, wanted)
        if world.first and world.size > 1:
            prepared.tokens(Tokenizer.load(resolve(recipe.model)))  # the others find the table tokenized
    settings = hashlib.sha256(json.dumps(_json(recipe), sort_keys=True).encode()).hexdigest()
    for what, text in {**identity, "recipe": f"of hash {settings[:12]}"}.items():
        world.check_same(str(text), what)
    precision = world.texts(precision)[0]
    with world.together():
        if not world.first:
            choose_training_precision(hardware, precision)
        seed_everything(recipe.seed)
        run = assemble(prepared, recipe, hardware.device)
        trainer = Trainer(run.model, run.split, recipe, out, precision, world=world)
        branch(world.rank)
    with world.together():
        if world.first and not resume:  # only now: a setting that cannot work leaves no folder to clear away
            write_sealed(out / RUNNING, {**identity, "precision": precision})
    with world.together():
        if not (out / RUNNING).is_file():
            raise ArtifactError(
                f"process {world.rank} on {platform.node()} finds no {out / RUNNING}; "
                "name a folder with --out that all machines share"
            )
        found = _start_from_probe(run, trainer, out) if run.probed and world.first else None
    with world.together():
        if run.probed and not world.first:
            _read_start(run, out)
        if resume:
            trainer.resume()
    world.check_same(str(trainer.progress.step), "the checkpoint of step")
    plan = Plan(
        recipe=recipe,
        hardware=hardware,
        processes=world.size,
        precision=precision,
        trainable_parameters=count_trainable(run.model),
        train_rows=len(run.split.train),
        validation_rows=len(run.split.validation),
        schedule=trainer.schedule,
        mean_tokens=float(run.split.examples.lengths(run.split.train).mean()),
        total_steps=trainer.total_steps,
        resumed_step=trainer.progress.step,
        probe=found,
        frozen=trainer.prefix.description if trainer.prefix else None,
    )
    return _Start(prepared, run, trainer, plan)


def _start_from_probe(run: Run, trainer: Trainer, out: Path) -> dict[str, Any]:
    """Probes, or takes over what a run to resume found, and says what that was.

    A file keeps the values: training goes on from the same bits, whatever the device computes the next time.
    """
    path = out / START
    if not path.is_file() and not (out / CHECKPOINT).is_file():
        minutes = trainer.recipe.minutes
        seconds = None if minutes is None else PROBE_SHARE * 60 * minutes
        found = probe(run.model, run.split, trainer.precision, trainer.recipe.seed, seconds)
        write_tensors(path, _probed_values(run.model), found)
        return found
    return _read_start(run, out)


def _read_start(run: Run, out: Path) -> dict[str, Any]:
    """Sets the values in `out` and returns what the probe found; raises ArtifactError when the file is damaged."""
    stored, found = read_tensors(out / START)
    for name, value in _probed_values(run.model).items():
        value.copy_(stored[name])
    return found


def _probed_values(model: BertForSequenceClassification) -> dict[str, Tensor]:
    """What a probe sets, by name."""
    state = model.state_dict()  # the tensors themselves, detached
    return {name: value for name, value in state.items() if name.startswith(("bert.pooler.", "classifier."))}


def assemble(prepared: PreparedData, recipe: Recipe, device: torch.device) -> Run:
    """Loads the model, injects adapters, fits the columns' transform on train rows and joins the data to it.

    Raises UsageError for a recipe that does not fit the data or the model, DataError for a label without train rows.
    """
    base = resolve(recipe.model)
    tokenizer = Tokenizer.load(base)
    train, validation = (prepared.rows(recipe.split, part) for part in ("train", "validation"))
    labels = prepared.labels
    present = np.unique(labels[train])
    if len(present) < len(prepared.label_names):
        absent = sorted(set(range(len(prepared.label_names))) - set(present.tolist()))
        raise DataError(f"the train rows hold no {prepared.label_names[absent[0]]!r}; prepare more rows of it")
    transform, arrays = None, None
    if recipe.tabular:
        _refuse_answers(recipe.tabular.columns, prepared.schema)
        columns = prepared.columns(recipe.tabular.columns)
        transform = TabularTransform.fit(columns.iloc[train], recipe.tabular)
        arrays = transform(columns)
    model = BertForSequenceClassification.from_pretrained(
        base,
        labels=tuple(prepared.label_names),
        tabular=None if transform is None else transform.config,
        attention_dropout=recipe.attention_dropout,
    )
    if recipe.max_length > model.config.max_position_embeddings:
        raise UsageError(
            f"max_length={recipe.max_length}, but {recipe.model} holds {model.config.max_position_embeddings} "
            f"positions; --set max_length={model.config.max_position_embeddings}"
        )
    if model.tabular is not None and transform is None:
        raise UsageError(
            f"{recipe.model} reads columns beside the text, but the recipe has no [tabular] section; add the section, "
            "or name a model of text alone with --model"
        )
    if transform is not None and model.tabular is not None:
        model.tabular.learn(transform.buffers)
    lora, probed = None, is_probed(recipe, model)
    if recipe.lora:
        pooler = "bert.pooler" in model.new_heads or probed
        parts = {"classifier": True, "tabular": transform is not None, "pooler": pooler}
        heads = tuple(name for name, trained_in_full in parts.items() if trained_in_full)
        lora = recipe.lora.config(model.config.num_hidden_layers, heads)
        inject_lora(model, lora)
        if probed:
            model.bert.pooler.requires_grad_(False)  # saved with the adapter, for it is set, but trained no further
    examples = Examples(prepared.tokens(tokenizer), labels, tokenizer.sep_id, recipe.max_length, arrays)
    return Run(model.to(device), Split(examples, train, validation), tokenizer, transform, lora, base, probed)


def _refuse_answers(columns: list[str], schema: Schema) -> None:
    """Raises UsageError when one of `columns` tells the label."""
    answers = {schema.label_column, *([CLOSED_DATE] if schema.kind == STACK_OVERFLOW else [])}
    if given := [name for name in columns if name in answers]:
        raise UsageError(f"[tabular] names {given[0]}, which gives the label away; take it out of the recipe")


def describe(run: Run, prepared: PreparedData, recipe: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says of a model so that raw rows can be put to it."""
    return {
        "recipe": recipe,
        "labels": list(prepared.label_names),
        "schema": prepared.schema.to_dict(),
        "tabular": None if run.transform is None else run.transform.to_dict(),
        "data": {
            "fingerprint": prepared.fingerprint,
            "tables": prepared.tables,
            "made_up": bool(prepared.manifest.get("made_up")),
        },
        "base": {"model": _found_anywhere(recipe["model"]), "weights": hash_file(weights_file(run.base))},
    }


def _golden(run: Run, prepared: PreparedData) -> dict[str, Any]:
    """The manifest's `golden` and `inputs`: some validation rows as the model reads them and as the table has them."""
    examples = run.split.examples
    rows = spread_rows(examples, run.split.validation)
    inputs = prepared.raw(rows, () if run.transform is None else run.transform.spec.columns)
    return {"golden": GoldenRows.record(run.model, examples, rows).to_dict(), "inputs": inputs}


def label_shares(split: Split, recipe: Recipe) -> list[float]:
    """Of the train rows, as the loss weighs them."""
    counts = np.bincount(split.examples.labels[split.train])
    weights = counts * class_weights(split, recipe).double().numpy()
    return [float(share) for share in weights / weights.sum()]


def _reference(run: Run, prepared: PreparedData, predicted: np.ndarray) -> dict[str, Any]:
    """The manifest's `reference`: what served rows are held against; `predicted` is of the validation rows."""
    examples, rows = run.split.examples, spread(run.split.train, REFERENCE_ROWS)
    columns = examples.tabular and {name: array[rows] for name, array in examples.tabular.items()}
    found = Reference.measure(
        examples.tokens.lengths[rows],
        np.array([np.count_nonzero(examples.tokens[row] == run.tokenizer.unk_id) for row in rows]),
        prepared.label_names,
        predicted,
        columns,
        run.transform,
    )
    return found.to_dict()


def _found_anywhere(model: str) -> str:
    """`minilm` and Hub ids as they are, a folder by its absolute path: a run may be loaded from another place."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if model != MINILM and folder.is_dir() else model


def _check_folder(out: Path, resume: bool) -> bool:
    """Whether to resume the run in `out`: what was asked for, unless nothing of the run can be read or is worth it.

    Raises ArtifactError when `out` holds no run to resume, or something that a new run must not be mixed with.
    """
    put_right(out)
    if (out / MANIFEST).is_file():
        raise ArtifactError(f"{out} holds a finished run; name another folder with --out")
    running = (out / RUNNING).is_file()
    if running and not (out / CHECKPOINT).is_file() and not _is_readable(out / RUNNING):
        log.warning(f"{out / RUNNING} is damaged, and no checkpoint was saved yet: the run starts anew")
        clear_training(out)
        return False
    if resume and not running:
        if any((out / name).is_file() for name in WHILE_TRAINING):
            anew = f"start it anew: {removal(out)}, then `bertforge train` without --resume"
            raise ArtifactError(f"{out / RUNNING} is missing, so the run cannot go on; {anew}")
        raise ArtifactError(f"{out} holds no run to resume; start one without --resume")
    if running and not resume:
        raise ArtifactError(f"{out} holds a run that has not ended; go on with --resume, or remove it: {removal(out)}")
    if not resume and holds_something(out):
        raise ArtifactError(f"{out} is not an empty folder; name another one with --out")
    return resume


def _is_readable(path: Path) -> bool:
    try:
        _read_running(path, {})
    except ArtifactError:
        return False
    return True


def _read_running(path: Path, identity: dict[str, Any]) -> str:
    """The precision of the run to resume; raises ArtifactError naming what of `identity` was another."""
    try:
        before = read_sealed(path)
        precision = str(before.pop("precision"))
        found, given = _flat(before), _flat(identity)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ArtifactError(f"{path} is damaged ({error!r}); start the run anew: {removal(path.parent)}") from error
    for name in {**given, **found}:
        if name.partition(".")[0] in identity and found.get(name) != given.get(name):
            raise ArtifactError(
                f"{path.parent} was started with {name.removeprefix('recipe.')} {found.get(name)}, "
                f"not {given.get(name)}; resume with the same, or start anew"
            )
    return precision


def _json(recipe: Recipe) -> dict[str, Any]:
    """Lists for tuples, as they come back from a file."""
    return dict(json.loads(json.dumps(recipe.to_dict())))


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _save(run: Run, recipe: Recipe, out: Path) -> None:
    run.tokenizer.save(out, recipe.max_length)
    run.model.config.save(out)
    if run.lora is None:
        run.model.save_pretrained(out)
    else:
        own = str(minilm_folder() or MINILM_HUB_ID)  # PEFT knows no `minilm`
        base = own if recipe.model == MINILM else _found_anywhere(recipe.model)
        save_adapter(run.model, run.lora, out, base)


def _summary(progress: Progress, trainer: Trainer) -> dict[str, Any]:
    seen = sum(map(len, islice(chain.from_iterable(trainer.plans), progress.step)))  # of the last epoch maybe a part
    epochs = [point for point in progress.history if "epoch" in point]
    best = epochs[progress.best_epoch - 1]
    return {
        "best_epoch": progress.best_epoch,
        "epochs": progress.epoch,
        "train_loss": best["epoch/train_loss"],
        "validation_loss": best["epoch/validation_loss"],
        "validation_accuracy": best["epoch/validation_accuracy"],
        "seconds": progress.seconds,
        "questions_per_s": seen / progress.seconds,
        "idle": progress.idle,
    }

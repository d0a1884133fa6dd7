"""What each variant reaches on prepared data at each number of epochs, and transformers with PEFT on the same rows.

    python benchmarks/accuracy.py PREPARED --model minilm --variants lora-r8 "lora-r8 lr=2e-3" \\
        --peers "full lr=5e-5" "lora-r8 lr=1e-3" --epochs 2,3,4 --seeds 42,43,44 [--at-once 8] [--json FILE]

Every run keeps the epoch of the lowest validation loss after temperature scaling, whosever system it is. A row is a run
on one part of the split: `validation`, by which epochs and learning rates are chosen, and `test`, scored once at the
end. Both losses of a row are in nats; the calibrated one has the temperature that suits the validation rows. Intervals
are Wilson's, 95%. The record is written anew after each run.

A peer is transformers' AutoModelForSequenceClassification, with PEFT's LoRA for the lora kinds, in the plain loop its
documentation shows: batches of 32 rows of like length, padded to the longest, bf16 autocast, AdamW, linear decay.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

import peers
from bertforge.artifact import write_json
from bertforge.data.prepared import PreparedData
from bertforge.data.tokens import Tokenizer
from bertforge.evaluation.groups import wilson_interval
from bertforge.evaluation.scores import log_softmax
from bertforge.evaluation.temperature import fit_temperature
from bertforge.inference.predictor import Predictor
from bertforge.inference.scoring import score
from bertforge.models import resolve
from bertforge.training.config import load_recipe
from bertforge.training.finetune import finetune
from record import record

Scored = dict[str, tuple[np.ndarray, np.ndarray]]
"""Part of the split -> logits `[rows, labels]` and labels `[rows]`."""


def main() -> None:
    """Parses, runs, prints and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--model", default="minilm")
    parser.add_argument(
        "--variants", nargs="*", default=[], metavar="RECIPE", help='a recipe: "NAME [SETTING=VALUE ...]"'
    )
    parser.add_argument("--peers", nargs="*", default=[], metavar="PEER", help='"full lr=RATE", "lora-r8 lr=RATE"')
    parser.add_argument("--epochs", default="2,3,4")
    parser.add_argument("--seeds", default="42")
    parser.add_argument("--at-once", type=int, default=1, help="processes that share the device")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    seeds, epochs = ([int(number) for number in text.split(",")] for text in (options.seeds, options.epochs))
    systems = [(ours, text) for text in options.variants] + [(theirs, text) for text in options.peers]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.at_once, multiprocessing.get_context("spawn")) as pool:
        runs = [
            pool.submit(run, options.prepared, options.model, text, count, seed)
            for seed, count, (run, text) in itertools.product(seeds, epochs, systems)
        ]
        for done in as_completed(runs):
            rows += done.result()
            for row in done.result():
                print(*(row[key] for key in ("system", "variant", "epochs", "seed", "split", "accuracy")), flush=True)
            if options.json:
                libraries = ("transformers", "peft") if options.peers else ()
                write_json(options.json, record("accuracy", rows, seeds, *libraries))


def ours(data: Path, model: str, text: str, epochs: int, seed: int) -> list[dict[str, Any]]:
    """Trains a variant and scores its validation and test rows with what was saved."""
    name, *settings = text.split()
    recipe = load_recipe(name).with_settings([f"model={model}", f"seed={seed}", f"epochs={epochs}", *settings])
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        manifest = finetune(data, run, recipe)
        predictor = Predictor.load(run)
        found = {part: score(predictor, data, part) for part in ("validation", "test")}
        shutil.rmtree(run)
    about = {
        "system": "bertforge",
        "model": model,
        "variant": text,
        "precision": manifest["precision"],
        "seed": seed,
        "epochs": epochs,
        "best_epoch": manifest["metrics"]["best_epoch"],
        "trainable_parameters": manifest["trainable_parameters"],
    }
    return measured(about, {part: (s.logits, s.labels) for part, s in found.items()})


def theirs(data: Path, model: str, text: str, epochs: int, seed: int) -> list[dict[str, Any]]:
    """Trains a peer on the same rows."""
    kind, _, lr = text.partition(" lr=")
    prepared = PreparedData.open(data)
    directory = resolve(model)
    tokens = prepared.tokens(Tokenizer.load(directory))
    parts = {part: prepared.rows("random", part) for part in ("train", "validation", "test")}
    found = peers.train(
        directory, tokens, np.asarray(prepared.labels), parts, kind=kind, lr=float(lr), epochs=epochs, seed=seed
    )
    about = {
        "system": "transformers" if kind == "full" else "transformers + PEFT",
        "model": model,
        "variant": text,
        "precision": "bf16",
        "seed": seed,
        "epochs": epochs,
        "best_epoch": found.best_epoch,
        "trainable_parameters": found.trainable_parameters,
    }
    return measured(about, {part: (logits, prepared.labels[parts[part]]) for part, logits in found.logits.items()})


def measured(about: dict[str, Any], scored: Scored) -> list[dict[str, Any]]:
    """A row for each part: accuracy with its interval, and cross-entropy before and after temperature scaling."""
    temperature = fit_temperature(*scored["validation"])
    return [about | {"split": part} | figures(*found, temperature) for part, found in scored.items()]


def figures(logits: np.ndarray, labels: np.ndarray, temperature: float) -> dict[str, Any]:
    """Of one part's `[rows, labels]` and `[rows]`."""
    correct = int((logits.argmax(1) == labels).sum())
    low, high = wilson_interval(correct, len(labels))
    loss, calibrated = (
        -float(log_softmax(logits / t)[np.arange(len(labels)), labels].mean()) for t in (1, temperature)
    )
    return {
        "rows": len(labels),
        "accuracy": round(correct / len(labels), 5),
        "accuracy_low": round(low, 5),
        "accuracy_high": round(high, 5),
        "loss": round(loss, 5),
        "calibrated_loss": round(calibrated, 5),
    }


if __name__ == "__main__":
    main()

"""What each variant reaches on prepared data, and transformers with PEFT on the same rows.

    python benchmarks/accuracy.py PREPARED --model minilm --variants lora-r8,columns --seeds 42,43 [--json FILE]
    python benchmarks/accuracy.py PREPARED --model minilm --peers full:5e-5,lora-r8:1e-3 [--json FILE]

Every run keeps the epoch of the lowest validation loss. A row is a run on one part of the split: `validation`, by which
settings were chosen, and `test`, scored once at the end. Intervals are Wilson's, 95%. The record is written anew after
each run. `questions_per_s` is that of training, validation included; it means something only when nothing else runs.

A peer is transformers' AutoModelForSequenceClassification, with PEFT's LoRA for the lora kinds, in the plain loop its
documentation shows: batches of 32 rows of like length, padded to the longest, bf16 autocast, AdamW, linear decay.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import peers
from bertforge.artifact import write_json
from bertforge.data.prepared import PreparedData
from bertforge.data.tokens import Tokenizer
from bertforge.evaluation.groups import wilson_interval
from bertforge.evaluation.scores import log_softmax
from bertforge.inference.predictor import Predictor
from bertforge.inference.scoring import score
from bertforge.models import resolve
from bertforge.training.config import load_recipe
from bertforge.training.finetune import finetune
from record import record


def main() -> None:
    """Parses, runs, prints and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--variants", default="", help="recipes, separated by commas")
    parser.add_argument("--peers", default="", help="full:LR, lora-r8:LR, lora-r8-all:LR, separated by commas")
    parser.add_argument("--peer-epochs", type=int, default=3)
    parser.add_argument("--seeds", default="42")
    parser.add_argument("--set", nargs="*", default=[], dest="settings", metavar="NAME=VALUE")
    parser.add_argument("--name", default="accuracy", help="the record's name")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    rows: list[dict[str, Any]] = []

    def keep(found: list[dict[str, Any]]) -> None:
        rows.extend(found)
        for row in found:
            print(*(row[key] for key in ("system", "variant", "seed", "split", "accuracy", "loss")), flush=True)
        if options.json:
            libraries = ("transformers", "peft") if options.peers else ()
            write_json(options.json, record(options.name, rows, seeds, *libraries))

    for seed in seeds:
        for variant in filter(None, options.variants.split(",")):
            keep(ours(options.prepared, options.model, variant, seed, options.settings))
        for peer in filter(None, options.peers.split(",")):
            kind, _, lr = peer.partition(":")
            keep(theirs(options.prepared, options.model, kind, float(lr), options.peer_epochs, seed))


def ours(data: Path, model: str, variant: str, seed: int, settings: list[str]) -> list[dict[str, Any]]:
    """Trains a variant and scores its validation and test rows with what was saved."""
    recipe = load_recipe(variant).with_settings([f"model={model}", f"seed={seed}", *settings])
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        manifest = finetune(data, run, recipe)
        predictor = Predictor.load(run)
        scored = {part: score(predictor, data, part) for part in ("validation", "test")}
        shutil.rmtree(run)
    metrics = manifest["metrics"]
    about = {
        "system": "bertforge",
        "model": model,
        "variant": variant,
        "settings": settings,
        "precision": manifest["precision"],
        "seed": seed,
        "epochs": metrics["epochs"],
        "best_epoch": metrics["best_epoch"],
        "trainable_parameters": manifest["trainable_parameters"],
        "questions_per_s": round(metrics["questions_per_s"], 1),
    }
    split = manifest["recipe"]["split"]
    return [about | measured(s.logits, s.labels, f"{split}/{part}") for part, s in scored.items()]


def theirs(data: Path, model: str, kind: str, lr: float, epochs: int, seed: int) -> list[dict[str, Any]]:
    """Trains a peer on the same rows."""
    prepared = PreparedData.open(data)
    directory = resolve(model)
    tokens = prepared.tokens(Tokenizer.load(directory))
    parts = {part: prepared.rows("random", part) for part in ("train", "validation", "test")}
    found = peers.train(
        directory, tokens, np.asarray(prepared.labels), parts, kind=kind, lr=lr, epochs=epochs, seed=seed
    )
    about = {
        "system": "transformers" if kind == "full" else "transformers + PEFT",
        "model": model,
        "variant": kind,
        "settings": [f"lr={lr}"],
        "precision": "bf16",
        "seed": seed,
        "epochs": epochs,
        "best_epoch": found.best_epoch,
        "trainable_parameters": found.trainable_parameters,
        "questions_per_s": round(found.questions_per_s, 1),
    }
    return [about | measured(logits, prepared.labels[parts[p]], f"random/{p}") for p, logits in found.logits.items()]


def measured(logits: np.ndarray, labels: np.ndarray, split: str) -> dict[str, Any]:
    """Accuracy with its interval, and cross-entropy in nats."""
    correct = int((logits.argmax(1) == labels).sum())
    low, high = wilson_interval(correct, len(labels))
    return {
        "split": split,
        "rows": len(labels),
        "accuracy": round(correct / len(labels), 5),
        "accuracy_low": round(low, 5),
        "accuracy_high": round(high, 5),
        "loss": round(-float(log_softmax(logits)[np.arange(len(labels)), labels].mean()), 5),
    }


if __name__ == "__main__":
    main()

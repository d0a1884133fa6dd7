"""Seconds of a first and a later epoch with frozen layers, whose output is kept nowhere, in host memory or on the GPU.

    python benchmarks/frozen_prefix.py PREPARED [--model minilm] [--last-layers 2] [--rows 400] [--json FILE]

`bert-base` is BERT-base with random weights, for speed. Every run trains the same rows three epochs, by `lora-r8` in
the last layers, and must give the first one's curve bit for bit: the program ends with 1 where one does not. An epoch's
seconds leave validation out; the first one's hold what is done once, such as recording CUDA graphs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bertforge.artifact import write_json
from bertforge.data.prepared import PreparedData
from bertforge.data.schema import QUESTIONS
from bertforge.data.tokens import Tokenizer
from bertforge.determinism import seed_everything
from bertforge.hardware import choose_precision, detect
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.model.config import BertConfig
from bertforge.training.config import Recipe, load_recipe
from bertforge.training.finetune import assemble
from bertforge.training.loop import Trainer
from bertforge.training.row_cache import Room
from record import record

SEED = 42
VALIDATION = 200  # rows


class Timed(Trainer):
    """Notes how long each epoch trains; an epoch ends by reading the loss, for which the GPU finishes."""

    def train_epoch(self, *arguments: Any) -> None:
        start = time.perf_counter()
        super().train_epoch(*arguments)
        self.seconds = [*getattr(self, "seconds", []), time.perf_counter() - start]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--last-layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a step")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        model = random_bert(args.prepared, Path(scratch) / "model") if args.model == "bert-base" else args.model
        settings = [f"model={model}", f"lora.last_layers={args.last_layers}", f"tokens_per_step={args.tokens}"]
        recipe = (
            load_recipe("lora-r8").on(QUESTIONS).with_settings([*settings, "epochs=3", f"precision={args.precision}"])
        )
        free = Room.free(detect().device)
        rooms = {"nowhere": Room(0, 0), "host": Room(0, free.host)}
        if free.gpu:
            rooms["gpu"] = Room(free.gpu, 0)
        rows, curves = [], []
        for tier, room in rooms.items():
            with patch.object(Room, "free", lambda *_, room=room: room):
                seconds, curve = train(args.prepared, recipe, args.rows, Path(scratch) / tier)
            curves.append(curve)
            rows.append({"system": "bertforge", "model": args.model, "kept": tier, **settings_of(args), **seconds})
            print(rows[-1], "the same curve" if curve == curves[0] else "ANOTHER CURVE", flush=True)
    if args.json:
        write_json(args.json, record("frozen_prefix", rows, SEED))
    return int(any(curve != curves[0] for curve in curves))


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "variant": f"lora-r8-last-{args.last_layers}",
        "precision": choose_precision(detect(), args.precision),
        "tokens_per_step": args.tokens,
    }


def train(prepared: Path, recipe: Recipe, rows: int, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What was measured, and the curve."""
    seed_everything(SEED)
    hardware = detect()
    run = assemble(PreparedData.open(prepared), recipe, hardware.device)
    split = replace(run.split, train=run.split.train[:rows], validation=run.split.validation[:VALIDATION])
    trainer = Timed(run.model, split, recipe, folder, choose_precision(hardware, recipe.precision))
    assert trainer.prefix is not None
    print(trainer.prefix.description, flush=True)
    history = trainer.fit(lambda progress, sequences, loss: None).history
    measured: dict[str, Any] = {"rows": len(split.train)}
    for epoch, seconds in (("first", trainer.seconds[0]), ("later", trainer.seconds[-1])):
        measured[f"seconds_{epoch}_epoch"] = seconds
        measured[f"seconds_per_112217_{epoch}_epoch"] = seconds / len(split.train) * 112_217
    return measured, [{name: value for name, value in point.items() if name != "train/idle"} for point in history]


def random_bert(prepared: Path, folder: Path) -> Path:
    """BERT-base with random weights, and the tokenizer of the prepared data."""
    tokenizer = Tokenizer.load(next((prepared / "tokens").iterdir()))
    BertForSequenceClassification.from_config(BertConfig(vocab_size=tokenizer.vocab_size)).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


if __name__ == "__main__":
    raise SystemExit(main())

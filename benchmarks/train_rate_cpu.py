"""Questions a second of LoRA training on a CPU, beside transformers with PEFT on the same rows.

    python benchmarks/train_rate_cpu.py PREPARED [--model minilm] [--rows-per-step N] [--rows 320] [--repeats 5]
                                        [--json FILE]

Every system trains lora-r8 on the same segments of train rows, one after another within a segment, so that whatever
else slows the machine down slows all of them. The first segment is a warm-up. A rate is the median over the other
segments; its spread is their minimum and maximum. Accuracy is that of the few steps taken, on some 1,000
validation rows spread over all of them: close together where all learn alike.

bertforge packs 4,096 tokens a step, and with --rows-per-step so many rows at most, for tables of short texts. The peer
pads batches of 32 rows of like length (`group_by_length`). It runs as it comes, with dropout on its attention weights,
and without, as bertforge does: torch's fused attention for CPUs has no dropout. Threads are torch's own choice and the
same for all."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import peers
from bertforge.artifact import write_json
from bertforge.data.loader import PackShape, epoch_plan, load
from bertforge.data.prepared import PreparedData
from bertforge.data.tokens import Tokenizer
from bertforge.determinism import seed_everything
from bertforge.evaluation.logits import predict_logits
from bertforge.models import resolve
from bertforge.training.config import load_recipe
from bertforge.training.finetune import assemble
from bertforge.training.loop import CPU_SHAPES
from bertforge.training.optim import make_optimizer, set_lr
from bertforge.training.schedule import Schedule
from bertforge.training.step import EagerStep
from record import record

SEED = 42
LR = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--rows-per-step", type=int, metavar="N", help="at most, of bertforge; the peer takes 32")
    parser.add_argument("--rows", type=int, default=320, help="rows a segment")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prepared = PreparedData.open(args.prepared)
    tokens = prepared.tokens(Tokenizer.load(resolve(args.model)))
    train, validation = (prepared.rows("random", part) for part in ("train", "validation"))
    segments = np.random.default_rng(SEED).permutation(train)[: args.rows * (args.repeats + 1)].reshape(-1, args.rows)
    systems: dict[tuple[str, str], System] = {}
    for precision in ("bf16", "fp32"):
        systems["bertforge", precision] = Ours(prepared, args.model, precision, args.rows_per_step)
        systems["transformers + PEFT", precision] = Peer(prepared, args.model, precision)
        systems["transformers + PEFT, no attention dropout", precision] = Peer(
            prepared, args.model, precision, attention_probs_dropout_prob=0.0
        )
    rates: dict[tuple[str, str], list[float]] = {name: [] for name in systems}
    for number, rows in enumerate(segments):
        for name, system in systems.items():
            start = time.perf_counter()
            system.train(rows)
            rates[name].append(len(rows) / (time.perf_counter() - start))
            print(f"segment {number}: {name[0]:41} {name[1]} {rates[name][-1]:6.1f} questions/s", flush=True)
    checked = validation[:: max(1, len(validation) // 1000)]  # rows stand in order of time
    lengths = tokens.lengths[segments[1:].ravel()]
    rows_out: list[dict[str, Any]] = []
    for (system_name, precision), measured in rates.items():
        logits = systems[system_name, precision].logits(checked)
        timed = measured[1:]
        rows_out.append(
            {
                "system": system_name,
                "model": args.model,
                "variant": "lora-r8",
                "precision": precision,
                "rows": int(segments[1:].size),
                "tokens_per_row": float(lengths.mean()),
                "questions_per_s": statistics.median(timed),
                "questions_per_s_low": min(timed),
                "questions_per_s_high": max(timed),
                "accuracy": float((logits.argmax(1) == prepared.labels[checked]).mean()),
                "accuracy_rows": len(checked),
            }
        )
        print(rows_out[-1])
    if args.json:
        result = record("train_rate_cpu", rows_out, SEED, "transformers", "peft")
        write_json(args.json, {**result, "threads": torch.get_num_threads(), "rows_per_step": args.rows_per_step})


class Ours:
    """A run of `lora-r8`, its learning rate warmed up over the first segment and constant from there."""

    def __init__(self, prepared: PreparedData, model: str, precision: str, rows_per_step: int | None) -> None:
        recipe = load_recipe("lora-r8").with_settings([f"model={model}", f"precision={precision}"])
        self.schedule = Schedule(rows_per_step, 4096, epochs=1, lr=LR, head_lr=LR, warmup=0.0)
        seed_everything(SEED)
        run = assemble(prepared, recipe, torch.device("cpu"))
        self.model, self.examples, self.precision = run.model.train(), run.split.examples, precision
        self.optimizer = make_optimizer(self.model, LR, LR, recipe.weight_decay)
        self.shares = warm_up()
        weights = torch.ones(len(prepared.label_names))
        self.step = EagerStep(self.model, self.optimizer, weights, 0.0, recipe.max_grad_norm, precision)

    def train(self, rows: np.ndarray) -> None:
        plan = epoch_plan(self.examples, rows, self.schedule.tokens_per_step, self.schedule.rows_per_step, SEED, 0)
        shape = PackShape.of([plan], self.examples, CPU_SHAPES)
        for batch, labels in load(self.examples, plan, torch.device("cpu"), shape):
            set_lr(self.optimizer, next(self.shares))
            self.step(batch, labels)

    def logits(self, rows: np.ndarray) -> np.ndarray:
        return predict_logits(self.model, self.examples, rows, self.precision)


class Peer:
    """transformers with PEFT, at the same learning rate."""

    def __init__(self, prepared: PreparedData, model: str, precision: str, **config: Any) -> None:
        torch.manual_seed(SEED)
        self.model, self.precision = (
            peers.make_model(resolve(model), "lora-r8", len(prepared.label_names), **config).train(),
            precision,
        )
        self.tokens = prepared.tokens(Tokenizer.load(resolve(model)))
        self.labels = prepared.labels
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.01)
        self.shares = warm_up()

    def train(self, rows: np.ndarray) -> None:
        for batch in peers.batches(rows, self.tokens.lengths, np.random.default_rng(SEED)):
            inputs = peers.collate(self.tokens, batch, torch.device("cpu"))
            self.optimizer.param_groups[0]["lr"] = LR * next(self.shares)
            peers.train_step(self.model, self.optimizer, inputs, torch.from_numpy(self.labels[batch]), self.precision)

    def logits(self, rows: np.ndarray) -> np.ndarray:
        return peers.predict(self.model, self.tokens, rows, torch.device("cpu"))


System = Ours | Peer


def warm_up(steps: int = 10) -> Iterator[float]:
    """The share of the peak learning rate at each step: up to 1 in `steps`, and 1 from there."""
    return itertools.chain((step / steps for step in range(1, steps)), itertools.repeat(1.0))


if __name__ == "__main__":
    main()

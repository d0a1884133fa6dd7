"""Seconds of training for 112,217 questions on a GPU, beside transformers with PEFT on rows of the same lengths.

    python benchmarks/train_rate_gpu.py PREPARED [--model minilm] [--tokens 32768] [--only bertforge] [--json FILE]

BERT-base with random weights: speed does not depend on what they are. bertforge runs its own `Trainer` for three epochs
of the train rows, so what is timed is what `bertforge train` does, loading and packing included; validation and the
recording of the CUDA graph are not. transformers runs 50 batches three times, which hold all lengths and lie on the
GPU already, with dropout on its attention weights as it comes and without, as bertforge trains. Both use bfloat16
autocast, AdamW and clipping; "-fp8" is bertforge with precision=fp8. Each figure is a median, with its lowest and
highest. torch.compile is given one layer after another: they are alike.

Each system has a process of its own, one after another: the peer ran at half its speed in a process that had trained
our variants before, we do not know why.

TFLOP/s counts the products that the variant needs for real tokens when the last layer computes first tokens only, for
every system alike; the ceiling is a product of 8,192-cubed bfloat16 matrices in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig as TheirConfig
from transformers import BertForSequenceClassification as TheirModel
from transformers.models.bert.modeling_bert import BertLayer

import peers
from bertforge.artifact import write_json
from bertforge.benchmark.roofline import product_rate
from bertforge.data.loader import Examples, Split, load
from bertforge.data.prepared import PreparedData
from bertforge.data.schema import QUESTIONS as SCHEMA
from bertforge.data.tokens import Tokenizer
from bertforge.determinism import seed_everything
from bertforge.hardware import detect
from bertforge.lora.inject import inject_lora
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.model.config import BertConfig
from bertforge.models import resolve
from bertforge.peak_memory import PeakMemory
from bertforge.training.config import load_recipe
from bertforge.training.loop import Trainer
from record import record

SEED = 42
QUESTIONS = 112_217  # an epoch of the study
VARIANTS = {  # name -> recipe, precision
    "lora-r8": ("lora-r8", "bf16"),
    "lora-r8-fp8": ("lora-r8", "fp8"),
    "lora-r8-last-4": ("lora-r8-last-4", "bf16"),
    "full": ("bert-base", "bf16"),
}
EPOCHS = 3
WARM_UP = 12  # steps
FAMILIES = {  # name -> pattern of kernels' names
    "attention": "_attention_forward|_query_gradient|_key_value_gradients|flash",
    "linear, GELU": "^_product",
    "linear": "nvjet|gemm|cutlass|xmma|splitK",
    "LayerNorm, dropout": "_norm_|layer_norm",
    "adapters": "_adapted|_a_gradient|_b_gradient",
    "optimizer": "multi_tensor|Adam|lpnorm",
    "copies": "Memcpy|Memset|copy|CatArray|direct_copy",
}
PADDED = "transformers + PEFT, padded to 512"  # as tutorials have it
BY_LENGTH = "transformers + PEFT, by length"
COMPILED = "transformers + PEFT, by length, torch.compile"
NO_DROPOUT = ", no attention dropout"  # behind a name: as bertforge trains, and as fused attention may
BATCHES = 50  # of a peer; all lengths are among them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--model", default="minilm", help="whose tokenizer")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens a step")
    parser.add_argument("--only", default="", help="systems and variants whose names match this pattern")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    ceiling = apart(measure_ceiling)
    print(f"ceiling {ceiling * 1e-12:.0f} TFLOP/s", flush=True)
    rows: list[dict[str, Any]] = []
    for system, variant in names():
        if not re.search(args.only, f"{system} {variant}"):
            continue
        about = {"system": system, "variant": variant, "model": "bert-base, random weights"}
        try:
            found = apart(measure, system, variant, args.prepared, args.model, args.tokens)
        except Exception as error:
            found = [{"missing": f"{type(error).__name__}: {str(error)[:300]}"}]
        for row in found:
            if "tflops" in row:
                row["share_of_ceiling"] = row["tflops"] * 1e12 / ceiling
            rows.append(about | row)
            print(rows[-1], flush=True)
        if args.json:  # after each system: what is measured is not lost
            result = record("train_rate_gpu", rows, SEED, "transformers", "peft", "triton")
            write_json(args.json, {**result, "ceiling_tflops": round(ceiling * 1e-12)})


def names() -> list[tuple[str, str]]:
    """Systems and variants, ours first."""
    bf16 = [variant for variant, (_, precision) in VARIANTS.items() if precision == "bf16"]
    return [
        *(("bertforge", variant) for variant in VARIANTS),
        (PADDED, "lora-r8"),
        *(
            (system + dropout, variant)
            for system in (BY_LENGTH, COMPILED)
            for dropout in ("", NO_DROPOUT)
            for variant in bf16
        ),
    ]


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, from a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure_ceiling() -> float:
    """Floating-point operations a second of the product that is the ceiling."""
    found = product_rate(detect(), "bf16")
    assert found is not None
    return found


def measure(system: str, variant: str, data: Path, model: str, tokens: int) -> list[dict[str, Any]]:
    """One system's rows, without what depends on the ceiling."""
    prepared, tokenizer = PreparedData.open(data), Tokenizer.load(resolve(model))
    examples = Examples(prepared.tokens(tokenizer), prepared.labels, tokenizer.sep_id, 512)
    split = Split(examples, prepared.rows("random", "train"), prepared.rows("random", "validation")[:256])
    if system == "bertforge":
        seed_everything(SEED)
        found = train(variant, split, tokens)
    else:
        torch.manual_seed(SEED)
        padded, batch = system == PADDED, 32 if system == PADDED else 128
        dropout = 0.0 if system.endswith(NO_DROPOUT) else 0.1
        by_layer = system.startswith(COMPILED)
        found = peer(split, variant, batch, padded=padded, by_layer=by_layer, attention_dropout=dropout)
    for row in found:
        rate = row["questions_per_s"]
        row["precision"] = VARIANTS[variant][1]
        row["seconds_per_112217"] = QUESTIONS / rate
        row["tflops"] = rate * operations(variant, row["part"], examples.lengths(split.train)) * 1e-12
    return found


def operations(variant: str, part: str, lengths: np.ndarray) -> float:
    """Floating-point operations of a question, the mean over `lengths`; later epochs read what a cache holds."""
    hidden, layers = 768, 12
    tokens, pairs = float(lengths.mean()), float((lengths.astype(float) ** 2).mean())
    linear = 2 * 12 * hidden**2 * tokens  # of one layer, forward
    attention = 4 * hidden * pairs
    last = 2 * 2 * hidden**2 * tokens + 2 * 10 * hidden**2 + 4 * hidden * tokens  # first tokens alone
    below = 8 if variant == "lora-r8-last-4" else 0
    forward = (layers - 1 - (below if part == "later epochs" else 0)) * (linear + attention) + last
    differentiated = (layers - 1 - below) * (linear + 2 * attention) + last
    weights = (layers - 1) * linear + last if variant == "full" else 0
    return forward + differentiated + weights


def trainer_of(variant: str, split: Split, tokens: int, folder: Path) -> Trainer:
    """A run of BERT-base with random weights, ready to start."""
    name, precision = VARIANTS[variant]
    recipe = (
        load_recipe(name)
        .on(SCHEMA)
        .with_settings(
            [f"tokens_per_step={tokens}", f"epochs={EPOCHS}", f"patience={EPOCHS}", "checkpoint_seconds=1e9"]
        )
    )
    config = BertConfig(labels=("open", "closed"), attention_probs_dropout_prob=0.0)
    model = BertForSequenceClassification.from_config(config).cuda()
    if recipe.lora:
        inject_lora(model, recipe.lora.config(config.num_hidden_layers, ("classifier",)))
    return Trainer(model, split, recipe, folder, precision)


def train(variant: str, split: Split, tokens: int) -> list[dict[str, Any]]:
    """Rows for the first epoch and, where they differ, the later ones."""
    memory, begun = PeakMemory(torch.device("cuda")), {"set-up": time.perf_counter()}
    marks: list[tuple[int, float, int]] = []  # epoch, time, questions of the epoch so far

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(variant, split, tokens, Path(folder))

        def show(progress: Any, sequences: int, loss: float) -> None:
            step, last = progress.step_in_epoch, len(trainer.plans[progress.epoch])
            if step in (WARM_UP, last // 3, 2 * last // 3, last):
                torch.cuda.synchronize()
                if progress.step == WARM_UP:
                    begun["set-up"] = time.perf_counter() - begun["set-up"]
                marks.append((progress.epoch, time.perf_counter(), progress.sequences))

        progress = trainer.fit(show)
    rates: dict[int, list[float]] = {}
    for (epoch, start, before), (same, end, after) in itertools.pairwise(marks):
        if epoch == same:
            rates.setdefault(epoch, []).append((after - before) / (end - start))
    cached = variant == "lora-r8-last-4"
    parts = (
        {"first epoch": rates[0], "later epochs": rates[1] + rates[2]}
        if cached
        else {"": [rate for each in rates.values() for rate in each]}
    )
    peak_memory_gb = memory.gb()
    shares = profile(trainer_of(variant, split, tokens, Path(tempfile.gettempdir())))
    shape = trainer.shape
    real = float(split.examples.lengths(split.train).sum()) / (len(trainer.plans[0]) * shape.tokens)
    return [
        {
            "framework": "PyTorch, packed",
            "part": part,
            "batch": f"{tokens} tokens",
            **spread(found),
            "set_up_s": begun["set-up"],
            "peak_memory_gb": peak_memory_gb,
            "padding_waste": 1 - real,
            "idle": progress.idle,
            # What frozen layers compute in a first epoch is not in the profile.
            **({"time_shares": shares} if part != "first epoch" else {}),
        }
        for part, found in parts.items()
    ]


def profile(trainer: Trainer) -> dict[str, float]:
    """Shares of the GPU's time by family of kernels, over a few steps; prints the largest kernels."""
    device = torch.device("cuda")
    plan, shape = trainer.plans[0][:4], trainer.shape
    packs = load(trainer.split.examples, plan, device, shape)
    batches = list(trainer.prefix.feed(packs, plan, shape.tokens, nullcontext) if trainer.prefix else packs)
    trainer.model.train()
    trainer.step(*batches[0])  # records the graph
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for batch, labels in batches:
            trainer.step(batch, labels)
        torch.cuda.synchronize()
    kernels = [event for event in found.key_averages() if event.self_device_time_total]
    total = sum(event.self_device_time_total for event in kernels)
    shares: dict[str, float] = {}
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total):
        family = next((name for name, pattern in FAMILIES.items() if re.search(pattern, event.key)), "other")
        share = event.self_device_time_total / total
        shares[family] = shares.get(family, 0.0) + share
        if share > 0.004:
            us = event.self_device_time_total / len(batches)
            calls = event.count / len(batches)
            print(f"  {share:6.1%} {us:8.0f} us a step, {calls:5.0f} calls  {family:12} {event.key[:90]}")
    print(f"  {total / len(batches):.0f} us a step in kernels: {shares}", flush=True)
    return shares


def peer(
    split: Split, variant: str, batch: int, *, padded: bool, by_layer: bool, attention_dropout: float
) -> list[dict[str, Any]]:
    """One row; batches are of `batch` rows of like length, padded to the longest or to 512."""
    device = torch.device("cuda")
    memory = PeakMemory(device)
    config = TheirConfig(num_labels=2, attn_implementation="sdpa")
    config.attention_probs_dropout_prob = attention_dropout
    model: Any = TheirModel(config)
    if variant != "full":
        layers = list(range(8, 12)) if variant == "lora-r8-last-4" else None
        model = peers.adapt(model, "lora-r8", layers)
    model = model.cuda().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    if by_layer:
        for layer in (module for module in model.modules() if isinstance(module, BertLayer)):
            layer.compile(dynamic=True)
    rng = np.random.default_rng(SEED)
    lengths = np.minimum(split.examples.tokens.lengths, 512)
    chosen = peers.batches(rng.permutation(split.train)[: BATCHES * batch], lengths, rng, batch)
    inputs = [peers.collate(split.examples.tokens, rows, device, 512 if padded else None) for rows in chosen]
    labels = [torch.from_numpy(split.examples.labels[rows]).to(device) for rows in chosen]

    def steps(places: Iterable[int]) -> None:
        for place in places:
            peers.train_step(model, optimizer, inputs[place], labels[place])
        torch.cuda.synchronize()

    begun = time.perf_counter()
    # Every width once, the widest first: asking the driver for memory takes longer than a step.
    steps(np.argsort([-i["input_ids"].shape[1] for i in inputs]))
    set_up = time.perf_counter() - begun
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        steps(range(BATCHES))
        rates.append(BATCHES * batch / (time.perf_counter() - start))
    used = sum(int(i["attention_mask"].sum()) for i in inputs) / sum(i["attention_mask"].numel() for i in inputs)
    return [
        {
            "framework": "PyTorch, SDPA" + (", torch.compile" if by_layer else ""),
            "part": "",
            "batch": f"{batch} rows",
            **spread(rates),
            "set_up_s": set_up,
            "peak_memory_gb": memory.gb(),
            "padding_waste": 1 - used,
        }
    ]


def spread(rates: list[float]) -> dict[str, float]:
    """Median, lowest, highest."""
    return {
        "questions_per_s": statistics.median(rates),
        "questions_per_s_low": min(rates),
        "questions_per_s_high": max(rates),
    }


if __name__ == "__main__":
    main()

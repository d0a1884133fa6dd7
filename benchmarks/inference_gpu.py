"""Questions a second of inference on a GPU: the study's table, on the same questions in one run.

    python benchmarks/inference_gpu.py PREPARED bert-base MODEL [--systems packed] [--json FILE]

`bert-base` is BERT-base with random weights, for speed; MODEL is a merged folder, for speed and accuracy. Questions are
validation rows: `--rows` of them for random weights (an eighth in float32, which is slow), all of them for a MODEL.

transformers gets batches of 32 that lie on the GPU before the clock starts, padded to the longest text the model takes,
as the study had them, or to the longest of the batch after sorting by length. What is ours, and ONNX Runtime with our
graph, is timed from token ids to logits on the host: sorting, laying out and copying are inside. A rate is the median
of the repeats after one warm-up, which also compiles. Operations are those of the model on the real tokens, whatever a
system computes besides or saves; the ceiling is the fastest matrix product, measured in the same run. Memory is
what the process took from the device. Logits are compared with float32's on the same rows.

`one of 128 tokens` is one question a call, called 1,000 times, from token ids on the host to logits on the host.

A system that fails is a row that says why. The record is written after every row.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bertforge.artifact import write_json
from bertforge.batch import PaddedBatch
from bertforge.benchmark.roofline import product_rate
from bertforge.data.loader import Examples
from bertforge.data.prepared import PreparedData
from bertforge.data.tokens import Tokenizer
from bertforge.engines import native as native_engine
from bertforge.engines.base import BatchShape, Engine, Order
from bertforge.engines.onnxruntime import OnnxRuntimeEngine
from bertforge.engines.pytorch import PyTorchEngine
from bertforge.engines.run import batch_of, group, padding_waste, run
from bertforge.evaluation.groups import wilson_interval
from bertforge.export.bert_onnx import export_onnx
from bertforge.hardware import Hardware, detect
from bertforge.inference.predictor import Predictor, plain_model
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.model.config import BertConfig
from bertforge.native.ladder import sizes
from bertforge.peak_memory import PeakMemory
from bertforge.quantize.ranges import find_ranges
from record import record

SEED = 42
BATCH = 32
QUESTIONS = 112_217  # of an epoch of the study
LIBRARIES = ("transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "triton")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CEILINGS = ("fp32", "fp16", "bf16", "fp8", "int8")
ONE, CALLS = 128, 1000
FAMILIES = {  # name -> pattern of kernels' names
    "products": "^_product|nvjet|gemm|cutlass|xmma",
    "attention": "^_attention",
    "LayerNorm, embeddings": "^_residual_norm|^_embed",
}


@dataclass(frozen=True)
class Job:
    """A model and the questions it answers."""

    name: str
    folder: Path
    """Where transformers loads it from."""
    model: BertForSequenceClassification
    """On the CPU, in float32."""
    examples: Examples
    rows: np.ndarray
    calibration: np.ndarray
    """Train rows, which find 8-bit ranges."""
    reference: np.ndarray
    """[rows, labels] float32's logits."""
    labelled: bool
    """The weights are fine-tuned, so that labels mean something."""
    hardware: Hardware

    @property
    def padded(self) -> BatchShape:
        """32 rows, each as long as the longest text may be."""
        return BatchShape(tokens=BATCH * self.examples.max_length, rows=BATCH, edges=(self.examples.max_length,))

    @property
    def operations(self) -> float:
        """Of the encoder on real tokens: its linear layers, and attention's two products."""
        config, lengths = self.model.config, self.examples.lengths(self.rows).astype(float)
        linear = 8 * config.hidden_size**2 + 4 * config.hidden_size * config.intermediate_size
        return float(config.num_hidden_layers * (linear * lengths.sum() + 4 * config.hidden_size * (lengths**2).sum()))

    def eighth(self) -> Job:
        """For a system that is slow."""
        return replace(self, rows=self.rows[::8], reference=self.reference[::8])


@dataclass(frozen=True)
class Ready:
    """A system that is loaded: `work` gives the logits of a job's rows, in their order, on the host."""

    work: Callable[[], np.ndarray]
    padding_waste: float
    engine: Engine | None = None
    """Where the system is one of ours."""


@dataclass(frozen=True)
class System:
    """A row of the table."""

    system: str
    framework: str
    precision: str
    batch: str
    load: Callable[[Job], Ready]


def main() -> None:
    """Parses, measures, prints and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="bert-base, or a merged folder")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--systems", default="", metavar="TEXT", help="only those whose line contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args()
    hardware = detect()
    ceilings = {precision: (product_rate(hardware, precision) or math.nan) * 1e-12 for precision in CEILINGS}
    there = {distribution.metadata["Name"] for distribution in metadata.distributions()}
    found: list[dict[str, Any]] = [
        {"system": "torch", "framework": "matrix product", "precision": precision, "tflops": rate}
        for precision, rate in ceilings.items()
    ]
    print(*(f"{row['precision']} {row['tflops']:.0f} TFLOP/s" for row in found))
    with tempfile.TemporaryDirectory() as scratch:
        for model in options.models:
            job = load_job(model, options.prepared, options.rows, hardware, Path(scratch))
            for system in systems():
                if options.systems not in line(system):
                    continue
                try:
                    numbers = measure(system, job, options.repeats, ceilings)
                except Exception as error:  # a system that is missing or fails is a row, not the end
                    numbers = {"missing": f"{type(error).__name__}: {str(error)[:300]}"}
                found.append({**describe(system), "model": job.name, "split": "random/validation", **numbers})
                print(f"{job.name:10.10} {line(system)} {summary(found[-1])}", flush=True)
                if options.json:
                    write_json(options.json, record("inference_gpu", found, SEED, *sorted(there & set(LIBRARIES))))


def load_job(model: str, prepared: Path, rows: int, hardware: Hardware, scratch: Path) -> Job:
    """`bert-base` with random weights, saved to `scratch`, or a merged folder."""
    data = PreparedData.open(prepared)
    chosen, train = data.rows("random", "validation"), data.rows("random", "train")
    if labelled := model != "bert-base":
        folder, predictor = Path(model), Predictor.load(model, "fp32")
        network, examples = plain_model(predictor).cpu(), predictor.examples(data, chosen)
    else:
        folder, tokenizer = scratch, Tokenizer.load(next((prepared / "tokens").iterdir()))
        torch.manual_seed(SEED)
        network = BertForSequenceClassification.from_config(BertConfig(vocab_size=30_522)).eval()
        network.save_pretrained(folder)
        examples = Examples(data.tokens(tokenizer), data.labels, tokenizer.sep_id, 512)
        chosen = np.random.default_rng(SEED).permutation(chosen)[:rows]
    reference = run(PyTorchEngine(copy.deepcopy(network), hardware, "fp32"), examples, chosen)
    return Job(Path(model).name, folder, network, examples, chosen, train[:300], reference, labelled, hardware)


def systems() -> Iterator[System]:
    """Every row, the study's first."""
    for precision, attention in (("fp32", "eager"), ("fp32", "sdpa"), ("fp16", "eager"), ("fp16", "sdpa")):
        load = partial(peer, precision=precision, attention=attention)
        yield System("transformers", f"pytorch, {attention}", precision, "32, padded to the limit", load)
    sdpa = partial(peer, precision="fp16", attention="sdpa")
    sorted_32 = "32, sorted, padded to the longest"
    yield System("transformers", "pytorch, sdpa", "fp16", sorted_32, partial(sdpa, by_length=True))
    compiled = partial(sdpa, compiled=True)
    yield System("transformers", "torch.compile, sdpa", "fp16", "32, padded to the limit", compiled)
    for name, fused in (("onnxruntime", False), ("onnxruntime, fused", True)):
        for tokens, batch in ((None, "32, padded to the limit"), (16_384, "16384 tokens"), (65_536, "65536 tokens")):
            yield System("bertforge", name, "fp16", batch, partial(onnxruntime, tokens=tokens, fused=fused))
    yield from packed_systems()
    yield from native_systems()
    yield System("transformers", "pytorch, sdpa", "fp16", one(), sdpa)
    yield System("bertforge", "pytorch, packed", "bf16", one(), partial(packed, tokens=65_536))


def native_systems() -> Iterator[System]:
    """Our engine for GPUs."""
    for precision in ("bf16", "int8", "fp8"):
        for tokens in (16_384, 65_536):
            load = partial(native, precision=precision, tokens=tokens)
            yield System("bertforge", "native", precision, f"{tokens} tokens", load)
        yield System("bertforge", "native", precision, one(), partial(native, precision=precision, tokens=65_536))


def one() -> str:
    """What a row says that measures single questions."""
    return f"one of {ONE} tokens"


def packed_systems() -> Iterator[System]:
    """Our PyTorch model on packs."""
    for tokens in (16_384, 32_768, 65_536):
        yield System("bertforge", "pytorch, packed", "bf16", f"{tokens} tokens", partial(packed, tokens=tokens))


def peer(job: Job, precision: str, attention: str, by_length: bool = False, compiled: bool = False) -> Ready:
    """transformers."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = job.hardware.device
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        job.folder, dtype=DTYPES[precision], attn_implementation=attention
    )
    model = model.to(device).eval()
    if compiled:
        model = torch.compile(model, dynamic=False)
    shape = replace(job.padded, edges=()) if by_length else job.padded
    plan = group(job.examples.lengths(job.rows), shape, False)
    batches = []
    for places in plan:  # the last one is filled up for a compiled model, which has one shape
        rows = job.rows[np.resize(places, BATCH) if compiled else places]
        batch = batch_of(job.examples, rows, False, shape)
        assert isinstance(batch, PaddedBatch)
        batches.append(batch.to(device))

    @torch.inference_mode()
    def work() -> np.ndarray:
        found = [
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[: len(places)]
            for places, batch in zip(plan, batches, strict=True)
        ]
        logits = np.empty_like(job.reference)
        logits[np.concatenate(plan)] = torch.cat(found).float().cpu().numpy()
        return logits

    return Ready(work, padding_waste(job.examples.lengths(job.rows), False, shape))


def onnxruntime(job: Job, tokens: int | None, fused: bool) -> Ready:
    """Our graph in float16, or as it is for ONNX Runtime alone."""
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(job.model, Path(folder) / "model.onnx", precision="fp16", fused=fused)
        engine = OnnxRuntimeEngine(Path(folder), "fp16", job.hardware)
    return ready(job, engine, replace(engine.shape, tokens=tokens) if tokens else job.padded)


def packed(job: Job, tokens: int) -> Ready:
    """Our model as it is served."""
    return ready(job, PyTorchEngine(copy.deepcopy(job.model), job.hardware, "bf16"), BatchShape(tokens))


def native(job: Job, precision: str, tokens: int) -> Ready:
    """Our engine, with ranges of 300 train rows where it has 8 bits."""
    scales = None
    if precision != "bf16":
        network = copy.deepcopy(job.model).to(job.hardware.device)
        scales = find_ranges(network, precision, job.examples, job.calibration, job.calibration[:100])
    folder = Path(tempfile.mkdtemp())
    try:
        order = Order(precision, job.model, job.examples.max_length, scales)
        native_engine.TARGET.build(folder, order, job.hardware)
        engine = native_engine.TARGET.open(folder, precision, job.hardware)
    finally:
        shutil.rmtree(folder)
    rows = next(size.sequences for size in sizes(native_engine.USUAL) if size.tokens == tokens)
    return ready(job, engine, replace(engine.shape, tokens=tokens, rows=rows))


def ready(job: Job, engine: Engine, shape: BatchShape) -> Ready:
    """An engine with the batches it is given."""
    waste = padding_waste(job.examples.lengths(job.rows), engine.packed, shape)
    return Ready(partial(run, engine, job.examples, job.rows, shape=shape), waste, engine)


def measure(system: System, job: Job, repeats: int, ceilings: dict[str, float]) -> dict[str, Any]:
    """Loads, warms up and times a system; what it takes is given back before it returns."""
    if system.precision == "fp32" and not job.labelled:
        job = job.eighth()
    torch.compiler.reset()
    memory = PeakMemory(job.hardware.device)
    if system.batch == one():
        return latency(system, job, memory)
    loaded = system.load(job)
    logits = loaded.work()
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        loaded.work()
        rates.append(len(job.rows) / (time.perf_counter() - start))
    taken, waste = memory.taken_gb(), loaded.padding_waste
    shares = {"time_shares": time_shares(loaded.work)} if system.framework == "native" else {}
    del loaded  # the next system finds its memory free
    median = float(np.median(rates))
    tflops = job.operations * median / len(job.rows) * 1e-12
    return {
        "rows": len(job.rows),
        "tokens_per_row": float(job.examples.lengths(job.rows).mean()),
        "questions_per_s": median,
        "questions_per_s_low": min(rates),
        "questions_per_s_high": max(rates),
        "seconds_per_112217": QUESTIONS / median,
        "tflops": tflops,
        "share_of_ceiling": tflops / ceilings[system.precision],
        "peak_memory_gb": taken,
        "padding_waste": waste,
        **shares,
        **quality(job, logits),
    }


def time_shares(work: Callable[[], object]) -> dict[str, float]:
    """Family of kernels -> its share of the time that all kernels take."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
    took = dict.fromkeys([*FAMILIES, "other"], 0.0)
    for event in seen.key_averages():
        family = next((name for name, pattern in FAMILIES.items() if re.search(pattern, event.key)), "other")
        took[family] += event.self_device_time_total
    return {family: time_us / sum(took.values()) for family, time_us in took.items()}


def latency(system: System, job: Job, memory: PeakMemory) -> dict[str, Any]:
    """Milliseconds of a call with one question, its tokens taken from the first that has enough."""
    lengths = job.examples.lengths(job.rows)
    row = job.rows[lengths >= ONE][:1]
    single = replace(job, examples=replace(job.examples, max_length=ONE), rows=row, reference=job.reference[:1])
    loaded = system.load(single)
    batch = batch_of(single.examples, row, True, BatchShape(ONE))
    call = partial(loaded.engine.logits, batch) if loaded.engine else loaded.work
    for _ in range(50):
        call()
    calls = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        calls.append(1e3 * (time.perf_counter() - start))
    p50, p95, p99 = (float(value) for value in np.percentile(calls, [50, 95, 99]))
    return {"rows": 1, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "peak_memory_gb": memory.taken_gb()}


def quality(job: Job, logits: np.ndarray) -> dict[str, Any]:
    """Against float32, and against the labels where the model knows any."""
    changed = logits.argmax(1) != job.reference.argmax(1)
    found = {
        "max_logit_difference": float(np.abs(logits - job.reference).max()),
        "changed_labels": int(changed.sum()),
    }
    if not job.labelled:
        return found
    labels = job.examples.labels[job.rows]
    right = int((logits.argmax(1) == labels).sum())
    low, high = wilson_interval(right, len(labels))
    recovery = right / int((job.reference.argmax(1) == labels).sum())
    return {**found, "accuracy": right / len(labels), "accuracy_low": low, "accuracy_high": high, "recovery": recovery}


def describe(system: System) -> dict[str, str]:
    """What names a row."""
    return {name: getattr(system, name) for name in ("system", "framework", "precision", "batch")}


def line(system: System) -> str:
    return f"{system.system:12} {system.framework:36} {system.precision} {system.batch:33}"


def summary(row: dict[str, Any]) -> str:
    """The numbers of a row for people."""
    if "missing" in row:
        return row["missing"]
    if "p50_ms" in row:
        return f"p50 {row['p50_ms']:.3f}, p95 {row['p95_ms']:.3f}, p99 {row['p99_ms']:.3f} ms"
    memory = f"{row['peak_memory_gb']:5.1f} GB" if row["peak_memory_gb"] is not None else ""
    accuracy = f"accuracy {row['accuracy']:.2%}" if "accuracy" in row else ""
    spread = f"({row['questions_per_s_low']:,.0f} to {row['questions_per_s_high']:,.0f})"
    return (
        f"{row['questions_per_s']:9,.1f} questions/s {spread} {row['seconds_per_112217']:7.1f} s, "
        f"{row['tflops']:6.1f} TFLOP/s {row['share_of_ceiling']:6.1%}, waste {row['padding_waste']:.2f}, {memory} "
        f"logits {row['max_logit_difference']:.1e}, {row['changed_labels']} labels {accuracy}"
    )


if __name__ == "__main__":
    main()

"""Questions a second of inference on a CPU: engines of ours beside transformers, on the same questions in one run.

    python benchmarks/inference_cpu.py MODEL PREPARED [--rows 500] [--repeats 3] [--json FILE]

MODEL is a merged folder; its engines are compiled into MODEL/engines if they are not there. Questions are validation
rows in a random order. From token ids to logits: tokenizing is left out for all. transformers runs batches of 32 in the
order of arrival, padded to the longest of the batch, as its pipelines do, in float32 and bfloat16; and sorted by
length, its best. Ours sorts by itself. All use every core. A rate is the median of the repeats after one warm-up.

Test rows take no part; accuracy is that of the timed rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

import peers
from bertforge.artifact import write_json
from bertforge.backends.run import run
from bertforge.benchmark.measure import rate
from bertforge.benchmark.run import engine
from bertforge.data.loader import Examples
from bertforge.data.prepared import PreparedData
from bertforge.inference.predictor import Predictor
from record import record

BATCH = 32
ENGINES = [("openvino", "bf16"), ("openvino", "int8")]


def main() -> None:
    """Parses, measures, prints and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args()
    prepared = PreparedData.open(options.prepared)
    reference = Predictor.load(options.model, "fp32")
    rows = np.random.default_rng(0).permutation(prepared.rows("random", "validation"))[: options.rows]
    tokens = prepared.tokens(reference.tokenizer)
    examples = Examples(tokens, prepared.labels, reference.tokenizer.sep_id, reference.max_length)
    found: list[dict[str, Any]] = []

    def measure(system: str, framework: str, precision: str, work: Callable[[], np.ndarray]) -> None:
        logits = work()
        rates = rate(work, len(rows), options.repeats)
        found.append(
            {
                "system": system,
                "framework": framework,
                "precision": precision,
                "questions_per_s": rates.median,
                "questions_per_s_low": rates.low,
                "questions_per_s_high": rates.high,
                "accuracy": float((logits.argmax(1) == prepared.labels[rows]).mean()),
                "rows": len(rows),
                "tokens_per_row": float(examples.lengths(rows).mean()),
            }
        )
        print(f"{system:13} {framework:36} {precision} {rates.median:7.1f} questions/s", flush=True)

    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model: Any = AutoModelForSequenceClassification.from_pretrained(options.model, dtype=dtype).eval()
        arrival = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
        order = rows[np.argsort(-tokens.lengths[rows], kind="stable")]
        ordered = [order[start : start + BATCH] for start in range(0, len(rows), BATCH)]
        for name, batches in (("batches of 32", arrival), ("batches of 32, sorted", ordered)):
            measure(
                "transformers", f"pytorch, {name}", precision, lambda b=batches, m=model: padded(m, tokens, b, rows)
            )
    for precision in ("fp32", "bf16"):
        backend = Predictor.load(options.model, precision).backend
        measure("bertforge", "pytorch, packed", precision, partial(run, backend, examples, rows))
    for target, precision in ENGINES:
        try:
            folder = engine(options.model, target, precision, options.prepared, print)
        except Exception as error:  # an engine that loses too much accuracy is no system to compare
            print(f"{target} {precision}: {error}", flush=True)
            continue
        backend = Predictor.load(folder).backend
        measure("bertforge", target, precision, partial(run, backend, examples, rows))
        backend.close()
    if options.json:
        names = ("transformers", "openvino", "onnxruntime", "nncf")
        print(f"wrote {write_json(options.json, record('inference_cpu', found, 0, *names))}")


@torch.inference_mode()
def padded(model: torch.nn.Module, tokens: Any, batches: list[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """transformers' logits `[rows, labels]` in the order of `rows`."""
    place = {int(row): index for index, row in enumerate(rows)}
    logits = np.zeros((len(rows), 2), np.float32)
    for batch in batches:
        found = model(**peers.collate(tokens, batch, torch.device("cpu"))).logits.float().numpy()
        logits[[place[int(row)] for row in batch]] = found
    return logits


if __name__ == "__main__":
    main()

"""From raw texts to labels on a GPU: how many a second, and how long one question waits.

    python benchmarks/text_gpu.py TABLE ENGINE [ENGINE ...] [--rows 1000000] [--json FILE]

TABLE is the raw table; ENGINE a folder that `Predictor.load` takes. Three measurements each:

- `Predictor.predict` on all texts of the table, median of the repeats after one warm-up.
- `bertforge predict` from Parquet to Parquet in a process of its own, everything included. The table is repeated up to
  `--rows` rows: after the first pass no word is new to the tokenizer, so beside it stands the table as it is.
- `Predictor.predict` of one question, of real length, 2,000 calls, and apart from it the tokenizer and the engine; and
  the seconds from the start of a process to its first answer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bertforge.artifact import write_json
from bertforge.data.raw import read_raw
from bertforge.data.tokens import TokenStore
from bertforge.inference.predictor import Predictor
from record import record

SEED, CALLS = 42, 2000
FIRST = "import sys; from bertforge import Predictor; print(Predictor.load(sys.argv[1]).predict(['How do I sort?']))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("engines", nargs="+", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        frame = pd.read_parquet(args.table)
        tables = {len(frame): args.table}
        if args.rows > len(frame):
            many = Path(scratch, "many.parquet")
            pd.concat([frame] * -(-args.rows // len(frame)), ignore_index=True)[: args.rows].to_parquet(many)
            tables[args.rows] = many
        for engine in args.engines:
            about = {"system": "bertforge", "model": str(engine), "first_answer_s": first_answer(engine)}
            predictor = Predictor.load(engine)
            about |= {"framework": predictor.engine.name, "precision": predictor.precision}
            texts = [text for chunk in read_raw(frame, predictor.schema, require_labels=False) for text in chunk.texts]
            found.append(about | {"batch": "all texts", **rate(predictor, texts, args.repeats)})
            found.append(about | {"batch": "one question", **latency(predictor, texts)})
            predictor.close()
            for rows, table in tables.items():
                start = time.perf_counter()
                command = ["predict", str(engine), str(table), "--out", str(Path(scratch, "out.parquet"))]
                subprocess.run([sys.executable, "-m", "bertforge", *command], check=True, stdout=subprocess.DEVNULL)
                seconds = time.perf_counter() - start
                found.append(
                    about | {"batch": "predict", "rows": rows, "seconds": seconds, "rows_per_s": rows / seconds}
                )
            for row in found[-2 - len(tables) :]:
                print(row, flush=True)
            if args.json:
                write_json(args.json, record("text_gpu", found, SEED, "triton"))


def first_answer(engine: Path) -> float:
    """Seconds from the start of a process to its first answer."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", FIRST, str(engine)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def rate(predictor: Predictor, texts: list[str], repeats: int) -> dict[str, Any]:
    """Questions a second; the first time apart, when every word is new."""
    rates = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        predictor.predict(texts)
        rates.append(len(texts) / (time.perf_counter() - start))
    return {
        "rows": len(texts),
        "questions_per_s_first": rates[0],
        "end_to_end_questions_per_s": float(np.median(rates[1:])),
    }


def latency(predictor: Predictor, texts: list[str]) -> dict[str, Any]:
    """Milliseconds of one question: text to label, tokenizer, engine."""
    took: dict[str, list[float]] = {"": [], "tokenizer_": [], "engine_": []}
    for text in texts[:CALLS]:
        start = time.perf_counter()
        predictor.predict([text])
        took[""].append(time.perf_counter() - start)
        if predictor.transform is not None:
            continue
        start = time.perf_counter()
        store = TokenStore(*predictor.tokenizer.encode([text]))
        between = time.perf_counter()
        predictor.token_logits(store, np.arange(1), None)
        took["tokenizer_"].append(between - start)
        took["engine_"].append(time.perf_counter() - between)
    return {
        f"{name}p{share}_ms": 1e3 * float(np.percentile(calls, share))
        for name, calls in took.items()
        for share in (50, 95, 99)
        if calls
    }


if __name__ == "__main__":
    main()

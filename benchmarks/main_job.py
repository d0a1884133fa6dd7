"""The main job from the command line on a real table: prepare, train, evaluate, predict, merge, each timed.

    python benchmarks/main_job.py TABLE.parquet --work DIR [--epochs 1] [--json FILE]

Predictions are made of the table's first rows, read anew. DIR keeps what the commands write. A run that stands there
already is not trained again (an interrupted one goes on); its seconds are those its manifest tells.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from bertforge.artifact import write_json
from record import record

PREDICTED = 8192  # rows


def main() -> None:
    """Runs the commands and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args()
    work, table = options.work.resolve(), options.table.resolve()
    work.mkdir(parents=True, exist_ok=True)
    measured = work / "metrics.json"
    for old in ("data", "model"):  # prepared data would be found there and not be prepared again
        shutil.rmtree(work / old, ignore_errors=True)
    rows = [timed(f"prepare {table.name} --out data", work, table)]

    train = f"train --data data --out run --variant lora-r8 --model minilm --set epochs={options.epochs}"
    if not (work / "run" / "bertforge.json").is_file():
        timed(train + (" --resume" if (work / "run").is_dir() else ""), work, table)
    manifest = json.loads((work / "run" / "bertforge.json").read_text())
    metrics = manifest["metrics"]
    told = {name: metrics[name] for name in ("seconds", "questions_per_s", "validation_accuracy", "validation_loss")}
    rows.append(
        {"command": train, **told, "precision": manifest["precision"], "parameters": manifest["trainable_parameters"]}
    )
    for split in ("validation", "test"):
        row = timed(f"evaluate run --data data --split {split} --json metrics.json", work, table)
        rows.append({**row, "split": f"random/{split}", **headline(json.loads(measured.read_text()))})

    pq.write_table(pq.read_table(table).slice(0, PREDICTED), work / "new.parquet")
    row = timed("predict run new.parquet --out predictions.parquet", work, table)
    predicted = pq.read_metadata(work / "predictions.parquet").num_rows
    rows.append({**row, "rows": predicted, "questions_per_s": predicted / row["seconds"]})
    row = timed("merge run --out model", work, table)
    rows.append({**row, **json.loads((work / "model" / "bertforge.json").read_text())["merge"]})
    if options.json:
        print(f"wrote {write_json(options.json, record('main_job', rows, 42))}")


def timed(command: str, work: Path, table: Path) -> dict[str, Any]:
    """Runs `bertforge COMMAND` in `work`; seconds include Python's start."""
    print(f"bertforge {command}", flush=True)
    start = time.perf_counter()
    arguments = [str(table) if word == table.name else word for word in command.split()]
    subprocess.run([sys.executable, "-m", "bertforge", *arguments], cwd=work, check=True)
    return {"command": command, "seconds": time.perf_counter() - start}


def headline(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Accuracy with its interval, and the loss, of `bertforge evaluate --json`."""
    found = evaluation["metrics"]
    accuracy = found["accuracy"]
    return {
        "rows": found["rows"],
        "accuracy": accuracy["value"],
        "accuracy_low": accuracy["low"],
        "accuracy_high": accuracy["high"],
        "loss": found["loss"]["value"],
    }


if __name__ == "__main__":
    main()

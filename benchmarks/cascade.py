"""An engine in 8 bits whose close rows are asked again: speed, labels that still differ, and whether margins hold.

    python benchmarks/cascade.py MODEL PREPARED ENGINE [--second ENGINE ...] [--rows N] [--repeats N] [--json FILE]

MODEL is a merged folder, ENGINE was compiled from it with PREPARED and so has a margin, and so were the second engines;
MODEL itself, in float32, is a second too. Every system, and the engine with each second, answers the same test rows
from token ids to logits, in turns, so that whatever else disturbs the machine hits all alike. A rate is the median of
the turns. `changed_labels` are those of all test rows that differ from the model's in float32.

`margins` asks whether a margin holds on rows that had no part in choosing it: from the validation and test rows, some
are drawn to choose, and the others tell the share that was asked again and the share left with another label. Beside
`Margin.of` stand two ways without it: the largest gap of a row whose label changed, and the largest drop of any row.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bertforge.artifact import write_json
from bertforge.data.loader import spread
from bertforge.data.prepared import PreparedData
from bertforge.inference.predictor import Predictor
from bertforge.proof.margin import Margin, drops, gaps
from record import record

SEED, DRAWS = 42, 150
CHOOSING = (300, 1000, 3000)
MAY_BE_LEFT = 1e-3
Choose = Callable[[np.ndarray, np.ndarray], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--second", type=Path, nargs="*", default=[], help="engines in 16 or 32 bits")
    parser.add_argument("--rows", type=int, default=2000, help="test rows to time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prepared = PreparedData.open(args.prepared)
    alone = {str(folder): Predictor.load(folder) for folder in (args.engine, *args.second)}
    alone[str(args.model)] = Predictor.load(args.model, "fp32")
    both = {f"{args.engine} + {name}": Predictor.load(args.engine, recheck=name) for name in list(alone)[1:]}
    rows = timed(alone | both, prepared, args.rows, args.repeats, str(args.model))
    for row in rows:
        print(row)
    found = record("cascade", rows, SEED)
    found["margins"] = margins(alone[str(args.model)], alone[str(args.engine)], prepared)
    for row in found["margins"]:
        print(row)
    if args.json:
        print(f"wrote {write_json(args.json, found)}")


def part(predictor: Predictor, prepared: PreparedData, name: str) -> np.ndarray:
    """Row numbers of a part of the split that the model was trained on."""
    return prepared.rows(predictor.manifest["recipe"]["split"], name)


def timed(
    systems: dict[str, Predictor], prepared: PreparedData, rows: int, repeats: int, model: str
) -> list[dict[str, Any]]:
    """A row for each system: its speed, and what it makes of all test rows beside `model`."""
    whole = part(systems[model], prepared, "test")
    some, examples = spread(whole, rows), systems[model].examples(prepared, whole)
    rates: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(repeats + 1):
        for name, predictor in systems.items():
            start = time.perf_counter()
            predictor.example_logits(examples, some)
            if turn:  # the first warms up
                rates[name].append(len(some) / (time.perf_counter() - start))
    logits = {}
    asked: dict[str, float | None] = dict.fromkeys(systems)
    for name, predictor in systems.items():
        before = (predictor.recheck.asked, predictor.recheck.rows) if predictor.recheck else (0, 0)
        logits[name] = predictor.example_logits(examples, whole)
        if predictor.recheck:
            asked[name] = (predictor.recheck.asked - before[0]) / (predictor.recheck.rows - before[1])
    labels = logits[model].argmax(1)
    return [
        {
            "system": name,
            "precision": predictor.precision,
            "questions_per_s": float(np.median(rates[name])),
            "asked_again": asked[name],
            "changed_labels": int((logits[name].argmax(1) != labels).sum()),
            "accuracy": float((logits[name].argmax(1) == prepared.labels[whole]).mean()),
            "rows": len(whole),
        }
        for name, predictor in systems.items()
    ]


def margins(model: Predictor, engine: Predictor, prepared: PreparedData) -> list[dict[str, Any]]:
    """How each way to choose a margin does on rows that did not choose."""
    rows = np.concatenate([part(model, prepared, name) for name in ("validation", "test")])
    examples = model.examples(prepared, rows)
    plain, found = model.example_logits(examples, rows), engine.example_logits(examples, rows)
    gap, changed = gaps(found), plain.argmax(1) != found.argmax(1)
    ways: dict[str, Choose] = {
        "largest gap of a changed label": lambda plain, found: float(
            gaps(found)[plain.argmax(1) != found.argmax(1)].max(initial=0.0)
        ),
        "largest drop": lambda plain, found: float(drops(plain, found).max()),
        "Margin.of": lambda plain, found: Margin.of(plain, found).value,
    }
    results = []
    for count in (count for count in CHOOSING if 2 * count < len(rows)):
        for way, choose in ways.items():
            rng, asked, left = np.random.default_rng(SEED), [], []
            for _ in range(DRAWS):
                order = rng.permutation(len(rows))
                chosen, others = order[:count], order[count:]
                value = choose(plain[chosen], found[chosen])
                asked.append(float((gap[others] <= value).mean()))
                left.append(float((changed & (gap > value))[others].mean()))
            results.append(
                {
                    "chosen_on": count,
                    "by": way,
                    "asked_again": float(np.mean(asked)),
                    "left": float(np.mean(left)),
                    "draws_with_more_left": float((np.array(left) > MAY_BE_LEFT).mean()),
                    "rows": len(rows),
                    "changed_labels": int(changed.sum()),
                }
            )
    return results


if __name__ == "__main__":
    main()

"""Questions a second, latency and accuracy of inference on a CPU: engines of ours beside their peers, in one run.

    python benchmarks/inference_cpu.py MODEL PREPARED [--quantized Q] [--onnx-python P] [--openvino-python P] [...]

MODEL is a merged folder, Q what `bertforge quantize MODEL --precision int8` made of it; their engines are compiled into
their `engines` folders if they are not there. Questions are validation rows in a random order. From token ids to
logits: tokenizing is left out for all. Peers run batches of 32 in the order of arrival, padded to the longest of the
batch, as transformers' pipelines do, and sorted by length, their best and what
sentence-transformers does by itself; `padded_peers.py` says what each is. Ours sort
by themselves. Every system has every core; one works at a time.

All systems are warmed up, then take turns, --repeats rounds of them, so that whatever else disturbs the machine hits
all alike; a rate is the median of the rounds. A slow system answers every tenth of its batches, sorted every fourth,
spread over all lengths; `tokens_per_row` says how long their questions were. Latencies are those of single calls with
one question, unpadded.

Of the questions timed, accuracy is that of the validation rows. With --accuracy-split, ours and transformers' float32
also answer a whole part, and `recovery` is an accuracy divided by transformers' own.

sentence-transformers' two engines need other versions of transformers than one another, so each an environment of its
own, whose interpreter is named here:

    pip install "sentence-transformers[onnx]"                  # --onnx-python
    pip install "sentence-transformers[openvino]" datasets     # --openvino-python
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from bertforge.artifact import write_json
from bertforge.benchmark.run import compiled
from bertforge.data.loader import Examples
from bertforge.data.prepared import PreparedData
from bertforge.engines.base import Engine
from bertforge.engines.measure import latencies_ms, singles
from bertforge.engines.run import run
from bertforge.evaluation.groups import wilson_interval
from bertforge.hardware import detect
from bertforge.inference.predictor import Predictor
from record import record

BATCH = 32
LATENCY_ROWS = 100
CALIBRATION_ROWS = 300
PEERS = [
    ("transformers", "fp32"),
    ("transformers", "bf16"),
    ("onnxruntime", "int8"),
    ("sentence-onnx", "fp32"),
    ("sentence-onnx", "int8"),
    ("sentence-openvino", "bf16"),
    ("sentence-openvino", "int8"),
]
FRAMEWORKS = {
    "transformers": ("transformers", "pytorch"),
    "onnxruntime": ("onnxruntime", "quantize_dynamic of transformers' graph"),
    "sentence-onnx": ("sentence-transformers", "CrossEncoder, onnx engine"),
    "sentence-openvino": ("sentence-transformers", "CrossEncoder, openvino engine"),
}


@dataclass
class System:
    """Something to measure, and what was found so far."""

    about: dict[str, Any]
    """system, framework, precision: the row's first keys."""
    answer: Callable[[np.ndarray], tuple[float, np.ndarray]]
    """Rows -> seconds and logits `[rows, labels]`, in their order."""
    latencies: Callable[[np.ndarray], np.ndarray] | None
    """Rows -> milliseconds of each alone; None where another entry of the same system tells."""
    rows: np.ndarray
    judged: bool = False
    """Whether it answers the whole part that --accuracy-split names."""
    logits: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Of `rows`."""
    rates: list[float] = field(default_factory=list)


class Peer:
    """A process of `padded_peers.py`."""

    def __init__(self, process: subprocess.Popen[str], places: dict[int, int]) -> None:
        self.process, self.places = process, places
        self.libraries: dict[str, str] = self._line()["libraries"]

    def answer(self, rows: np.ndarray) -> tuple[float, np.ndarray]:
        """In batches of 32, as the rows stand."""
        found = self.ask([rows[start : start + BATCH] for start in range(0, len(rows), BATCH)])
        return sum(found["seconds"]), np.array(found["logits"], np.float32)

    def latencies(self, rows: np.ndarray) -> np.ndarray:
        """Milliseconds of each row alone, every shape seen before."""
        single = [rows[i : i + 1] for i in range(len(rows))]
        self.ask(single)
        return 1e3 * np.array(self.ask(single)["seconds"])

    def ask(self, batches: list[np.ndarray]) -> dict[str, Any]:
        """Seconds of each batch and logits of all."""
        assert self.process.stdin is not None
        lines = [[self.places[int(row)] for row in batch] for batch in batches]
        self.process.stdin.write(json.dumps(lines) + "\n")
        self.process.stdin.flush()
        return self._line()

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise OSError(f"the peer ended with {self.process.wait()}; its log has the last words")
        found: dict[str, Any] = json.loads(line)
        return found


class Benchmark:
    """The questions, and the systems that answer them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.cores = options, detect().cores
        self.prepared = PreparedData.open(options.prepared)
        reference = Predictor.load(options.model, "fp32")
        rows = self.prepared.rows("random", "validation")
        self.rows = np.random.default_rng(0).permutation(rows)[: options.rows]
        self.tokens = self.prepared.tokens(reference.tokenizer)
        self.examples = Examples(self.tokens, self.prepared.labels, reference.tokenizer.sep_id, reference.max_length)
        self.few, self.few_sorted = _spread(self.rows, 10), _spread(self._sorted(self.rows), 4)
        self.single = self.rows[:LATENCY_ROWS]
        split = options.accuracy_split
        self.whole = self._sorted(self.prepared.rows("random", split) if split else np.zeros(0, np.int64))
        self.systems: list[System] = []
        self.missing: list[dict[str, Any]] = []
        self.libraries: dict[str, dict[str, str]] = {}

    def add_peers(self, stack: ExitStack) -> None:
        """Each in a process, its input in a folder that goes with `stack`."""
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        everything = np.unique(np.concatenate([self.few, self.few_sorted, self.single, self.whole]))
        places = {int(row): place for place, row in enumerate(everything)}
        np.save(work / "ids.npy", np.concatenate([self.tokens[int(row)] for row in everything]))
        np.save(work / "lengths.npy", np.asarray(self.tokens.lengths[everything]))
        train = self.prepared.rows("random", "train")[:CALIBRATION_ROWS]
        pd.DataFrame({"text": self.prepared.texts(train)}).to_csv(work / "calibration.csv", index=False)
        model = work / "model"  # a copy: a peer that exports writes beside what it reads
        model.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (model / name).symlink_to((self.options.model / name).resolve())
        pythons = {"sentence-onnx": self.options.onnx_python, "sentence-openvino": self.options.openvino_python}
        for name, precision in PEERS:
            system, framework = FRAMEWORKS[name]
            about = {"system": system, "framework": framework, "precision": precision}
            if not (python := pythons.get(name, sys.executable)):
                self.missing.append({**about, "missing": "no environment was named for it"})
                continue
            arguments = [name, precision, str(model), str(work), str(self.cores)]
            try:
                peer = Peer(stack.enter_context(_process(python, arguments, work / f"{name}-{precision}.log")), places)
            except OSError as error:
                log = (work / f"{name}-{precision}.log").read_text().strip().splitlines()
                self.missing.append({**about, "missing": log[-1] if log else str(error)})
                continue
            self.libraries[f"{system}, {framework}"] = peer.libraries
            self._add_peer(peer, about, judged=(name, precision) == PEERS[0])

    def _add_peer(self, peer: Peer, about: dict[str, Any], *, judged: bool) -> None:
        for rows, label in ((self.few, "batches of 32"), (self.few_sorted, "batches of 32, sorted")):
            ordered = rows is self.few_sorted
            self.systems.append(
                System(
                    about={**about, "framework": f"{about['framework']}, {label}"},
                    answer=peer.answer,
                    latencies=None if ordered else peer.latencies,
                    rows=rows,
                    judged=judged and ordered,
                )
            )

    def add_ours(self, stack: ExitStack) -> None:
        """PyTorch and every engine; one that loses too much accuracy is no system to compare."""
        torch.set_num_threads(self.cores)
        model, quantized = self.options.model, self.options.quantized
        for precision in ("fp32", "bf16"):
            rows = self.few if precision == "fp32" else self.rows
            self._add(Predictor.load(model, precision).engine, "pytorch, packed", precision, rows)
        engines = [(model, "openvino", "bf16", ""), (model, "openvino", "int8", "")]
        if quantized:
            engines += [(quantized, target, "int8", ", quantized folder") for target in ("openvino", "onnxruntime")]
        for source, target, precision, label in engines:
            try:
                folder = compiled(source, target, precision, self.options.prepared, print)
                engine = Predictor.load(folder).engine
            except Exception as error:
                about = {"system": "bertforge", "framework": target + label, "precision": precision}
                self.missing.append({**about, "missing": str(error)})
                continue
            stack.callback(engine.close)
            self._add(engine, target + label, precision, self.rows)

    def _add(self, engine: Engine, framework: str, precision: str, rows: np.ndarray) -> None:
        def answer(rows: np.ndarray) -> tuple[float, np.ndarray]:
            start = time.perf_counter()
            logits = run(engine, self.examples, rows)
            return time.perf_counter() - start, logits

        self.systems.append(
            System(
                about={"system": "bertforge", "framework": framework, "precision": precision},
                answer=answer,
                latencies=lambda rows: latencies_ms(engine.logits, singles(engine, self.examples, rows), 1),
                rows=rows,
                judged=precision != "fp32",
            )
        )

    def measure(self) -> list[dict[str, Any]]:
        """Warms all up, lets them take turns, and returns a row for each."""
        for system in self.systems:
            print("warming up", *system.about.values(), flush=True)
            _, system.logits = system.answer(system.rows)
        for _ in range(self.options.repeats):
            for system in self.systems:
                seconds, _ = system.answer(system.rows)
                system.rates.append(len(system.rows) / seconds)
        found: list[dict[str, Any]] = []
        reference = None
        for system in self.systems:
            row = self._row(system)
            if system.judged and len(self.whole):
                row |= self._judged(system)
                reference = reference or row["whole_accuracy"]  # transformers stands first
                row["recovery"] = row["whole_accuracy"] / reference
            found.append(row)
            print(_line(row), flush=True)
        for row in self.missing:
            print(f"{row['system']} {row['framework']} {row['precision']}: {row['missing']}", flush=True)
        return found + self.missing

    def _row(self, system: System) -> dict[str, Any]:
        row = {
            **system.about,
            "questions_per_s": float(np.median(system.rates)),
            "questions_per_s_low": min(system.rates),
            "questions_per_s_high": max(system.rates),
            "accuracy": self._accuracy(system.logits, system.rows),
            "rows": len(system.rows),
            "tokens_per_row": float(self.examples.lengths(system.rows).mean()),
            "threads": self.cores,
        }
        if system.latencies:
            calls = np.percentile(system.latencies(self.single), [50, 95, 99])
            row |= dict(zip(("p50_ms", "p95_ms", "p99_ms"), map(float, calls), strict=True))
        return row

    def _judged(self, system: System) -> dict[str, Any]:
        _, logits = system.answer(self.whole)
        accuracy = self._accuracy(logits, self.whole)
        low, high = wilson_interval(round(accuracy * len(self.whole)), len(self.whole))
        return {
            "whole_accuracy": accuracy,
            "whole_accuracy_low": low,
            "whole_accuracy_high": high,
            "whole_rows": len(self.whole),
            "whole_part": self.options.accuracy_split,
        }

    def _sorted(self, rows: np.ndarray) -> np.ndarray:
        """The longest first."""
        return rows[np.argsort(-self.tokens.lengths[rows], kind="stable")]

    def _accuracy(self, logits: np.ndarray, rows: np.ndarray) -> float:
        return float((logits.argmax(1) == self.prepared.labels[rows]).mean())


def main() -> None:
    """Parses, measures, prints and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--quantized", type=Path, metavar="Q", help="made by bertforge quantize, in int8")
    parser.add_argument("--onnx-python", metavar="P", help="has sentence-transformers[onnx]")
    parser.add_argument("--openvino-python", metavar="P", help="has sentence-transformers[openvino] and datasets")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--accuracy-split", choices=("validation", "test"), help="a part to answer as a whole")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args()
    benchmark = Benchmark(options)
    with ExitStack() as stack:
        benchmark.add_peers(stack)
        benchmark.add_ours(stack)
        rows = benchmark.measure()
    if options.json:
        names = ("transformers", "openvino", "onnxruntime")
        found = record("inference_cpu", rows, 0, *names) | {"peers": benchmark.libraries}
        print(f"wrote {write_json(options.json, found)}")


def _spread(rows: np.ndarray, step: int) -> np.ndarray:
    """The rows of every `step`-th batch, from the middle of the first `step` on."""
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    return np.concatenate(batches[min(step // 2, len(batches) - 1) :: step])


@contextmanager
def _process(python: str, arguments: list[str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """`padded_peers.py`, offline, what it prints in `log`; ended with the context."""
    script = str(Path(__file__).with_name("padded_peers.py"))
    threads = {"OMP_NUM_THREADS": arguments[-1], "HF_HUB_OFFLINE": "1"}
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [python, script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | threads,
        ) as process,
    ):
        yield process  # its input closed on the way out, it ends


def _line(row: dict[str, Any]) -> str:
    latency = f"  p50 {row['p50_ms']:.1f} ms" if "p50_ms" in row else ""
    recovery = f"  recovery {row['recovery']:.4f}" if "recovery" in row else ""
    rate = f"{row['questions_per_s']:7.1f} questions/s"
    return f"{row['system']:21} {row['framework']:65} {row['precision']} {rate}{latency}{recovery}"


if __name__ == "__main__":
    main()

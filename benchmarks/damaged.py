"""Two parts of faults.py: files damaged after they were written, and tables as no one should write them.

A file of a folder of each kind is damaged in one of six ways, and the folder is opened as its users open it. It must be
refused with one line that names what is damaged and what to type, or give what it gave before: then the damage changed
nothing. A checkpoint is damaged before its run goes on; where none is left, the run must say that it starts anew. A
hostile table must be prepared with every row kept or set aside, or be refused with one line.
"""

from __future__ import annotations

import logging
import random
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tests.data.hostile import hostile_tables
from tests.runs import made_up, make_base, prepare_frame, quick_recipe

from bertforge.data.prepare import PrepareOptions, prepare
from bertforge.data.prepared import PreparedData
from bertforge.data.tokens import Tokenizer
from bertforge.errors import BertforgeError
from bertforge.inference.predictor import Predictor
from bertforge.jobs.compile import compile_model
from bertforge.jobs.merge import merge_run
from bertforge.jobs.quantize import QuantizeOptions, quantize_model
from bertforge.training.finetune import Plan, finetune

Open = Callable[[Path], bytes]
"""Opens a folder as its users do -> what they get, to be compared."""


_ANEW = "started anew"
_WELL, _BADLY = ("refused", "changed nothing", _ANEW), ("silent", "traceback")


class _StopError(Exception):
    pass


def damages(work: Path, count: int, seed: int) -> dict[str, int]:
    """Damages `count` files, one after another, each in a folder that is whole but for it."""
    rng, found = random.Random(seed), Counter(dict.fromkeys((*_WELL, *_BADLY), 0))
    folders = {place: (open_folder, open_folder(place)) for place, open_folder in _made(work).items()}
    for _ in range(count):
        place = rng.choice(list(folders))
        open_folder, before = folders[place]
        files = [file for file in sorted(place.rglob("*")) if file.is_file() and not file.name.startswith(".")]
        name, way = rng.choice(list(DAMAGES.items()))
        file = rng.choice(files)
        kept = {path: path.read_bytes() for path in files}
        way(rng, file, [other for other in files if other != file])
        try:
            after = open_folder(place)
            outcome = _ANEW if after == _ANEW.encode() else "changed nothing" if after == before else "silent"
        except BertforgeError as error:
            told = str(error)
            helps = any(path.name in told for path in files) and ("`bertforge" in told or "rm -r" in told)
            outcome = "refused" if "\n" not in told and helps else "traceback"
        except Exception as error:
            told, outcome = f"{type(error).__name__}: {error}", "traceback"
        if outcome in _BADLY:
            print(f"  {outcome}: {name} of {file.relative_to(work)}: {'' if outcome == 'silent' else told}")
        found[outcome] += 1
        for path, content in kept.items():
            if not path.is_file() or path.read_bytes() != content:
                path.write_bytes(content)
    return dict(found)


def _bit(rng: random.Random, file: Path, others: list[Path]) -> None:
    content = bytearray(file.read_bytes() or b"\0")
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def _page(rng: random.Random, file: Path, others: list[Path]) -> None:
    content = bytearray(file.read_bytes())
    start = 4096 * rng.randrange(len(content) // 4096 + 1)
    end = min(len(content), start + 4096)
    content[start:end] = bytes(end - start)
    file.write_bytes(content)


def _cut(rng: random.Random, file: Path, others: list[Path]) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(max(1, len(content)))])


def _swapped(rng: random.Random, file: Path, others: list[Path]) -> None:
    other = rng.choice(others)
    content = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(content)


DAMAGES: dict[str, Callable[[random.Random, Path, list[Path]], object]] = {
    "a bit flipped": _bit,
    "a page zeroed": _page,
    "cut": _cut,
    "emptied": lambda rng, file, others: file.write_bytes(b""),
    "deleted": lambda rng, file, others: file.unlink(),
    "swapped": _swapped,
}


def _made(work: Path) -> dict[Path, Open]:
    """A folder of each kind, and how it is opened."""
    base = make_base(work / "base")
    data = prepare_frame(made_up(160), work / "data", base)
    for kind in ("lora", "full", "columns"):
        finetune(data, work / kind, quick_recipe(base, kind))
    merge_run(work / "lora", work / "merged")
    options = QuantizeOptions(rows=32, validation_rows=16, calibration="max")
    quantize_model(work / "merged", data, work / "quantized", options, None, lambda text: None)
    engines = {("openvino", "int8"): work / "openvino", ("onnxruntime", "fp32"): work / "onnxruntime"}
    for (target, precision), folder in engines.items():
        compile_model(work / "full", target, precision, data, folder)
    stopped = work / "stopped"
    recipe = quick_recipe(base, checkpoint_seconds=0.0)

    def stop(progress: Any, sequences: int, loss: float) -> None:
        if progress.step == 10:
            raise _StopError

    with suppress(_StopError):
        finetune(data, stopped, recipe, show=stop)
    frame, tokenizer = made_up(40, seed=5), Tokenizer.load(base)

    def read(folder: Path) -> bytes:
        prepared = PreparedData.open(folder)
        rows = np.arange(len(prepared))
        parts = [prepared.labels, prepared.lines, prepared.split(), prepared.tokens(tokenizer).ids]
        return b"".join([*(part.tobytes() for part in parts), "".join(prepared.texts(rows)).encode()])

    def predict(folder: Path) -> bytes:
        return Predictor.load(folder).predict(frame).to_csv().encode()

    def resume(folder: Path) -> bytes:
        copy = folder.with_name("resumed")
        shutil.copytree(folder, copy)
        told: list[str] = []
        listener = logging.Handler()
        listener.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]

        def started(plan: Plan) -> None:
            anew = plan.resumed_step == 0 and any("starts from its beginning" in line for line in told)
            told.append(_ANEW if anew else str(plan.resumed_step))
            raise _StopError

        logging.getLogger("bertforge").addHandler(listener)
        try:
            with suppress(_StopError):
                finetune(data, copy, recipe, resume=True, started=started)
        finally:
            logging.getLogger("bertforge").removeHandler(listener)
            shutil.rmtree(copy)
        return told[-1].encode()

    models = [work / name for name in ("lora", "full", "columns", "merged", "quantized")]
    return {data: read, **dict.fromkeys([*models, *engines.values()], predict), stopped: resume}


def hostile(work: Path, count: int, seed: int) -> dict[str, int]:
    """Prepares `count` hostile tables."""
    tokenizer = Tokenizer.load(make_base(work / "base"))
    options = PrepareOptions(text_columns=("text",), label_column="label")
    found = Counter(dict.fromkeys(("prepared", "refused", "rows lost", "traceback"), 0))
    slowest = 0.0
    for name, content, expected in islice(hostile_tables(seed), count):
        path, out = work / name, work / f"{name}.out"
        path.write_bytes(content)
        start = time.monotonic()
        try:
            data = prepare(path, out, tokenizer, options)
        except BertforgeError as error:
            outcome = "refused" if "\n" not in str(error) else "traceback"
        except Exception as error:
            outcome = "traceback"
            print(f"  traceback: {name}: {type(error).__name__}: {error}")
        else:
            rows = len(data) + sum(reason["rows"] for reason in data.manifest["set_aside"].values())
            outcome = "prepared" if expected in (None, rows) else "rows lost"
        slowest = max(slowest, time.monotonic() - start)
        found[outcome] += 1
        path.unlink()
        shutil.rmtree(out, ignore_errors=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {**found, "slowest_s": round(slowest, 1), "peak_memory_gb": round(peak, 2)}

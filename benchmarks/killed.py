"""Two parts of faults.py: writers killed at every moment of their writing, and training killed at random.

A writer is killed right before one of its changes to the file system, or by the kernel inside a write that makes a file
longer than some bytes (tests/crashes.py). What it leaves must be the older output or the new one, whole, or nothing;
running it again must give the new one, bit for bit, with nothing hidden beside it. Training is killed (SIGKILL) after a
random part of the time that a whole run takes, resumed and killed again until it ends.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file
from tests.crashes import FORKED, After, Before, changes, died
from tests.runs import made_up, make_base, prepare_frame, quick_recipe

from bertforge.data.prepare import prepare
from bertforge.data.prepared import PreparedData
from bertforge.data.tokens import Tokenizer
from bertforge.errors import BertforgeError
from bertforge.inference.predict import predict_table
from bertforge.inference.predictor import Predictor
from bertforge.jobs.compile import compile_model
from bertforge.jobs.merge import merge_run
from bertforge.locks import locked
from bertforge.manifest import MANIFEST, RUNNING, put_right
from bertforge.training.finetune import finetune

# So that a process begins in milliseconds.
FORKED.set_forkserver_preload(
    ["bertforge.autofit.fit", "torch._inductor.config", "onnxruntime", "sklearn.linear_model", "pytest"]
)
ROWS = 160
IN_WRITES = 0.25  # of the crash points, inside a write
# Differ from run to run: what is timed, and the digests of files that hold it.
_TIMED = {"seconds", "questions_per_s", "idle", "train/idle", "build_seconds", "files", "digest"}
_LEFTOVERS = (".partial", ".bertforge-old")
Writer = Callable[[Path], object]


def crash_points(work: Path, count: int, seed: int) -> dict[str, int]:
    """Kills each writer at `count` moments in all, spread over everything that it does."""
    made, found = _made(work), Counter(dict.fromkeys(("half-written", "not repaired", "leftovers", "stale locks"), 0))
    points = []
    for name, (writer, older) in _writers(made).items():
        place = work / name
        new = _fresh(place, older)
        number = changes(writer, new)
        states = {_digest(older) if older else "": "old" if older else "nothing", _digest(new): "new"}
        largest = max(file.stat().st_size for file in [new, *new.rglob("*")] if file.is_file())
        sizes = int(number * IN_WRITES / (1 - IN_WRITES))
        inside = [After(largest * i // (sizes + 1)) for i in range(sizes)]
        points += [(writer, older, place, states, point) for point in [*map(Before, range(number)), *inside]]
    step = max(1.0, len(points) / count)
    for i in range(count):
        _crash(*points[int(i * step) % len(points)], found)
    return {"possible points": len(points), **found}


def _crash(
    writer: Writer, older: Path | None, place: Path, states: dict[str, str], point: Before | After, found: Counter[str]
) -> None:
    """One crash, and what the next commands make of it."""
    path = _fresh(place, older)
    died(point, writer, path)
    try:
        with locked(path):  # as any command does
            put_right(path)
        unfinished = (path / RUNNING).is_file()
        state = states.get(_digest(path), "half-written")
        if unfinished or (state == "half-written" and path.is_dir() and not any(path.iterdir())):
            state = "half-written" if _half_written(path) else "a run to resume"
        found[state] += 1
        if state == "half-written":
            print(f"  half-written: {point} of {place.name}")
        if state not in ("new", "half-written"):
            writer(path)
            found["not repaired"] += states.get(_digest(path)) != "new"
    except (BertforgeError, OSError, ValueError) as error:
        print(f"  not repaired: {point} of {place.name}: {error}")
        found["not repaired"] += 1
    if left := [str(file.relative_to(place)) for file in place.rglob("*") if file.suffix in _LEFTOVERS]:
        print(f"  leftovers: {point} of {place.name}: {', '.join(left)}")
    found["leftovers"] += bool(left)
    found["stale locks"] += any(file.suffix == ".lock" for file in place.rglob("*"))  # for the next writer to take over


def kills_in_training(work: Path, count: int, seed: int) -> dict[str, int]:
    """Trains, killed at random moments and resumed, until `count` kills are made; each run goes on to its end."""
    made, moments = _made(work), random.Random(seed)
    train = partial(_train, made)
    whole = _fresh(work / "whole", None)
    start = time.monotonic()
    _in_a_process(train, whole)
    seconds, right = time.monotonic() - start, _digest(whole)
    found = Counter(dict.fromkeys(("runs", "half-written", "other bits", "not repaired", "leftovers"), 0))
    kills = 0
    while kills < count:
        path = _fresh(work / "killed", None)
        while True:
            process = FORKED.Process(target=train, args=(path,))
            process.start()
            process.join(moments.uniform(0, seconds) if kills < count else None)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills += 1
            found["half-written"] += _half_written(path)
        found["runs"] += 1
        found["not repaired"] += process.exitcode != 0
        found["other bits"] += _digest(path) != right
        put_right(path)
        found["leftovers"] += any(file.suffix in _LEFTOVERS for file in path.parent.rglob("*"))
    return dict(found)


def _made(work: Path) -> Path:
    """What the writers read: a base model, two tables, data and two runs."""
    made = work / "made"
    base = make_base(made / "base")
    for name, seed in (("a", 1), ("b", 2)):
        prepare_frame(made_up(ROWS, seed), made / name, base)
    for kind in ("lora", "full"):
        finetune(made / "a", made / kind, quick_recipe(base, kind, epochs=1))
    return made


def _writers(made: Path) -> dict[str, tuple[Writer, Path | None]]:
    """By name: what writes, and what stood there before."""
    return {
        "prepare-anew": (partial(_prepare, made), None),
        "prepare-over": (partial(_prepare, made), made / "a"),
        "tokens": (partial(_tokenize, made), made / "a"),
        "train": (partial(_train, made), None),
        "merge": (partial(_merge, made), None),
        "compile": (partial(_compile, made), None),
        "predict": (partial(_predict, made), None),
    }


def _prepare(made: Path, out: Path) -> None:
    prepare(made / "b.csv", out, Tokenizer.load(made / "base"))


def _tokenize(made: Path, out: Path) -> None:
    """A second folder of tokens, as training with another model adds it."""
    if not (second := made / "second").exists():
        shutil.copytree(made / "base", second)
        settings = json.loads((second / "tokenizer.json").read_text())
        settings["normalizer"]["lowercase"] = False
        (second / "tokenizer.json").write_text(json.dumps(settings))
    PreparedData.open(out).tokens(Tokenizer.load(second))


def _train(made: Path, out: Path) -> None:
    if (out / MANIFEST).is_file():  # it had ended, but for what goes at the end
        put_right(out)
        return
    recipe = quick_recipe(made / "base", "lora", checkpoint_seconds=0)
    finetune(made / "a", out, recipe, resume=(out / RUNNING).is_file())


def _merge(made: Path, out: Path) -> None:
    merge_run(made / "lora", out)


def _compile(made: Path, out: Path) -> None:
    compile_model(made / "full", "onnxruntime", "fp32", None, out)


def _predict(made: Path, out: Path) -> None:
    predict_table(Predictor.load(made / "full"), made / "b.csv", out / "predictions.csv")


def _fresh(place: Path, older: Path | None) -> Path:
    """`place`/out, empty or as it was before."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    if older:
        shutil.copytree(older, place / "out")
    return place / "out"


def _in_a_process(work: Writer, path: Path) -> None:
    process = FORKED.Process(target=work, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 0


def _half_written(path: Path) -> bool:
    """Whether a file under its final name cannot be read to its end."""
    for file in path.rglob("*"):
        try:
            if file.name.startswith("."):
                continue
            if file.suffix == ".safetensors":
                load_file(file)
            elif file.suffix == ".json":
                json.loads(file.read_text())
        except (SafetensorError, ValueError):
            return True
    return False


def _digest(path: Path) -> str:
    """Of all that equal outputs share: every file's bytes, in JSON all that is not timed; "" where there is nothing."""
    files = [file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file()]
    told = [file for file in files if not any(part.startswith((".", "tensorboard")) for part in file.parts)]
    parts = [(file.as_posix(), _content(path / file)) for file in told]
    return hashlib.sha256(repr(parts).encode()).hexdigest() if parts else ""


def _content(file: Path) -> str:
    if file.suffix == ".json":
        return json.dumps(_untimed(json.loads(file.read_text())), sort_keys=True)
    if file.name == "metrics.jsonl":
        return json.dumps([_untimed(json.loads(line)) for line in file.read_text().splitlines()])
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _untimed(inner) for name, inner in value.items() if name not in _TIMED}
    return [_untimed(inner) for inner in value] if isinstance(value, list) else value

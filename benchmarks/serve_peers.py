"""Our service beside LitServe, Ray Serve and infinity-emb: the same weights, questions, machine and load, in one run.

    python benchmarks/serve_peers.py ENGINE MODEL PREPARED [--litserve-python P] [--ray-python P] [--infinity-python P]

MODEL is a merged folder and ENGINE what `bertforge compile MODEL --target openvino --precision int8` made of it. The
load is serve.py's: real questions, one a request, in a closed loop of --connections. Each server runs alone, with all
cores, and is warmed up; dynamic batching is on, with batches of up to 8 and of up to 32, and also off (1), and the best
is its result. The service is measured first and last. `agreement` is the share of labels that are those of our engine.

- LitServe and Ray Serve serve what they are given: OpenVINO in INT8 (`peer_classifier.py`).
- infinity-emb serves the model itself, by PyTorch (without BetterTransformer, which is no part of today's optimum) and
  by its `optimum` engine, which prefers an ONNX graph in INT8: exported and quantized by `optimum-cli`. Version 0.0.78
  of that engine cuts no text, so the graph fails over its own warm-up, which is longer than 512 tokens.

An environment each, whose interpreter is named here; one that is not named, or does not serve, is in the record with
the reason:

    pip install "torch>=2.11,<2.14" litserve transformers openvino nncf               # --litserve-python
    pip install "torch>=2.11,<2.14" "ray[serve]" transformers openvino nncf           # --ray-python
    pip install "torch>=2.11,<2.14" "infinity-emb[server,torch,optimum]"              # --infinity-python
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # the tests' service

from bertforge.artifact import write_json
from bertforge.data.prepared import PreparedData
from bertforge.threads import usable_cores
from load import Plan, run
from record import record
from served import Setup, percentiles

BATCHES = (1, 8, 32)
CALIBRATION_ROWS = 300
_PATIENCE = 180.0  # seconds for a server to come up
_SETTLE = 0.2  # of the seconds, before the rate counts
_HERE = Path(__file__).parent
_OFFLINE = {
    "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "INFINITY_ANONYMOUS_USAGE_STATS": "0", "DO_NOT_TRACK": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """A server that others wrote."""

    name: str
    backend: str
    python: str | None
    libraries: tuple[str, ...]
    prepare: Callable[[], object]
    """Once, before it is started; may raise OSError."""
    command: Callable[[int, int], Sequence[str]]
    """Port, largest batch."""
    path: str
    body: Callable[[str], object]
    best: Callable[[Any, Sequence[str]], str]
    """Its answer and the names of the labels -> the label."""
    directory: Path


def peers(options: argparse.Namespace, work: Path) -> list[Peer]:
    """All of them; `work` has what they read."""
    model = work / "model"

    def quantized(python: str) -> None:
        if not (work / "int8" / "model.xml").exists():
            (work / "int8").mkdir(exist_ok=True)
            _call([python, str(_HERE / "peer_classifier.py"), str(model), str(work)], work)

    def exported(python: str) -> None:
        command, graph = str(Path(python).with_name("optimum-cli")), str(work / "onnx")
        _call([command, "export", "onnx", "--model", str(model), "--task", "text-classification", graph], work)
        _call([command, "onnxruntime", "quantize", "--onnx_model", graph, "--avx512_vnni", "-o", f"{graph}-int8"], work)
        shutil.copy(work / "onnx-int8" / "model_quantized.onnx", model)

    def script(python: str, name: str) -> Callable[[int, int], list[str]]:
        return lambda port, batch: [python, str(_HERE / name), str(model), str(work), str(port), str(batch)]

    def infinity(python: str, *engine: str) -> Callable[[int, int], list[str]]:
        return lambda port, batch: [
            str(Path(python).with_name("infinity_emb")), "v2", "--model-id", ".", "--served-model-name", "m",
            "--host", "127.0.0.1", "--port", str(port), "--batch-size", str(batch), "--device", "cpu", *engine,
        ]  # fmt: skip

    def highest(answer: Any, names: Sequence[str]) -> str:
        return names[int(np.argmax(answer["scores"]))]

    def first(answer: Any, names: Sequence[str]) -> str:
        return max(answer["data"][0], key=lambda each: each["score"])["label"]

    lit, ray, inf = (python or "" for python in (options.litserve_python, options.ray_python, options.infinity_python))
    scores = {"body": lambda text: {"input": text}, "best": highest, "directory": work}
    lists = {"body": lambda text: {"model": "m", "input": [text]}, "best": first, "directory": model}
    openvino, common = "openvino, int8", ("torch", "transformers", "openvino", "nncf")
    return [
        Peer("LitServe", openvino, lit, ("litserve", *common), lambda: quantized(lit),
             script(lit, "peer_litserve.py"), "/predict", **scores),
        Peer("Ray Serve", openvino, ray, ("ray", *common), lambda: quantized(ray),
             script(ray, "peer_ray.py"), "/", **scores),
        Peer("infinity-emb", "pytorch, fp32", inf, ("infinity-emb", "torch", "transformers"), lambda: None,
             infinity(inf, "--engine", "torch", "--no-bettertransformer"), "/classify", **lists),
        Peer("infinity-emb", "onnxruntime, int8", inf, ("infinity-emb", "optimum-onnx", "onnxruntime"),
             lambda: exported(inf), infinity(inf, "--engine", "optimum"), "/classify", **lists),
    ]  # fmt: skip


def measure(setup: Setup, peer: Peer, work: Path) -> Iterator[dict[str, Any]]:
    """A row for each size of batches, or one that says why there is none."""
    about = {"system": peer.name, "framework": peer.backend}
    if not peer.python:
        yield {**about, "missing": "no environment was named for it"}
        return
    try:
        peer.prepare()
        for batch in BATCHES:
            with _server(peer, batch, work) as port:
                bodies = [json.dumps(peer.body(text)).encode() for text in setup.texts]
                plan = Plan("127.0.0.1", port, bodies, setup.seconds, setup.connections, path=peer.path)
                run(plan)
                (found,) = run(plan)
            names = setup.predictor.label_names
            right = setup.right[:, 1:].argmax(axis=1)
            labels = [
                peer.best(json.loads(found.answers[place]), names) == names[right[found.body[place]]]
                for place in np.flatnonzero(found.status == 200)
            ]
            yield {
                **about,
                "largest_batch": batch,
                "questions_per_s": found.rate(setup.seconds, _SETTLE * setup.seconds),
                **percentiles(found.latencies_ms()),
                "statuses": found.statuses(),
                "agreement": float(np.mean(labels)) if labels else None,
                "versions": _versions(peer.python, peer.libraries),
            }
    except OSError as error:
        yield {**about, "missing": str(error)}


def ours(setup: Setup) -> dict[str, Any]:
    """The service, as serve.py measures it."""
    with setup.serve() as served:
        setup.saturated(served)
        rate, found = setup.saturated(served)
    row = {"system": "bertforge", "framework": f"{setup.predictor.engine.name}, {setup.predictor.precision}"}
    row |= {"questions_per_s": rate, **percentiles(found.latencies_ms()), "statuses": found.statuses()}
    return row | {"wrong": setup.wrong(found)}


@contextmanager
def _server(peer: Peer, batch: int, work: Path) -> Iterator[int]:
    """Its port; all of its processes end with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = work / "log"
    environment = {**os.environ, **_OFFLINE, "OMP_NUM_THREADS": str(usable_cores())}
    environment.pop("PYTHONPATH", None)
    with log.open("w") as file:
        process = subprocess.Popen(
            peer.command(port, batch), stdout=file, stderr=file, env=environment, cwd=peer.directory,
            start_new_session=True,
        )  # fmt: skip
    try:
        until, body = time.monotonic() + _PATIENCE, peer.body("How do I sort a list?")
        while not _answers(f"http://127.0.0.1:{port}{peer.path}", body):
            if process.poll() is not None or time.monotonic() > until:
                lines = log.read_text(errors="replace").strip().splitlines()
                told = next((line for line in lines[::-1] if "Error" in line), "it said nothing of an error")
                raise OSError(f"it did not answer: {told[:300]}")
            time.sleep(0.5)
        yield port
    finally:
        process.send_signal(signal.SIGINT)  # Ray ends its own processes then
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _answers(address: str, body: object) -> bool:
    try:
        return httpx.post(address, json=body, timeout=30).status_code == 200
    except httpx.TransportError:
        return False


def _call(command: Sequence[str], directory: Path) -> str:
    environment = {**os.environ, **_OFFLINE}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command[:3])} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def _versions(python: str, libraries: Sequence[str]) -> dict[str, str]:
    code = (
        f"import json; from importlib.metadata import version as v; print(json.dumps({{n: v(n) for n in {libraries}}}))"
    )
    found: dict[str, str] = json.loads(_call([python, "-c", code], _HERE))
    return found


def main() -> None:
    """Measures, prints and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("prepared", type=Path)
    for name in ("litserve", "ray", "infinity"):
        parser.add_argument(f"--{name}-python", metavar="P", help=f"interpreter of the environment with {name}")
    parser.add_argument("--texts", type=int, default=4000)
    parser.add_argument("--seconds", type=float, default=20, help="of a measure, after as many to warm up")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(usable_cores())  # of our engine; the tests' service takes one
    setup = Setup.make(options.engine, options.prepared, options.texts, options.seconds, options.connections, 1, None)
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "model").mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(options.model / name, work / "model")
        data = PreparedData.open(options.prepared)
        calibration = data.texts(data.rows("random", "train")[:CALIBRATION_ROWS])
        (work / "calibration.json").write_text(json.dumps(calibration))
        add(ours(setup))
        for peer in peers(options, work):
            for row in measure(setup, peer, work):
                add(row)
        add(ours(setup))
    own = min(row["questions_per_s"] for row in rows if row["system"] == "bertforge")
    best = max(
        (row["questions_per_s"] for row in rows if row["system"] != "bertforge" and "missing" not in row), default=0
    )
    if best:
        print(f"{own / best:.2f} times the best peer")
    if options.json:
        print(f"wrote {write_json(options.json, record('serve_peers', rows, 0, 'fastapi', 'uvicorn', 'openvino'))}")


if __name__ == "__main__":
    main()

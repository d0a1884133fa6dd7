"""An engine -> a model repository for NVIDIA's Triton Inference Server.

    OUT/NAME             the ensemble: what clients ask. A text, or the columns of a row -> label and probabilities
    OUT/NAME_reader      text or columns -> token ids and arrays; Python
    OUT/NAME_engine      -> logits; the engine's own files, byte for byte those that were proved
    OUT/NAME_decision    -> label and calibrated probabilities; Python
    OUT/golden.json      the golden rows as requests, with the engine's answers; `check.py` asks a server for them

Triton's own batch axis is used inside alone. A request has `[rows]` cells for each input instead, since OpenVINO's
backend takes no other size of batch than the largest (`engines.openvino`); so one ensemble serves for both.

The configurations are written as text: protobuf, which could write them, is no library of bertforge's. The tests parse
them with Triton's published schema and run them in a Triton server.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd

from bertforge import triton_server
from bertforge.artifact import fresh_directory, hash_file, write_atomic, write_json
from bertforge.columns.kind import VALUES
from bertforge.columns.registry import KINDS
from bertforge.engines.base import TritonBackend
from bertforge.engines.buckets import TOKENS
from bertforge.engines.registry import TARGETS
from bertforge.errors import ArtifactError, UsageError
from bertforge.hardware import detect
from bertforge.inference.codec import is_blank
from bertforge.inference.predictor import Predictor
from bertforge.jobs.compile import Say, compile_model
from bertforge.locks import locked
from bertforge.manifest import MANIFEST, served, write_manifest
from bertforge.proof.tolerances import WORST_FLOOR

_SHORTEST = 16  # tokens that a row is padded to at least
_MOST_ROWS = 64  # of a request
_PLAIN = ("onnxruntime", "fp32")  # what a model that was not compiled is compiled to
_CODE = Path(triton_server.__file__).parent
_CODEC = ("labels", "schema", "tabular", "temperature", "recipe")  # what `Codec` reads of a manifest


@dataclass(frozen=True)
class Tensor:
    """An input or output in a configuration."""

    name: str
    dtype: str
    """INT64, FP32 or STRING."""
    dims: tuple[int, ...]
    """-1 where any size will do; the batch axis is the first, where it is there."""

    def __str__(self) -> str:
        return f"{{ name: {_quoted(self.name)} data_type: TYPE_{self.dtype} dims: {list(self.dims)} }}"


def export_triton(artifact: Path, out: Path, name: str = "classifier", say: Say = lambda text: None) -> dict[str, Any]:
    """Writes `out` and returns its manifest's fields; `name` is that of the model that clients ask.

    An engine is taken as it is; a model is first compiled for ONNX Runtime in float32, and proved. Raises UsageError
    for a name that is none; ArtifactError for an engine that Triton does not run as it was proved, for a run whose
    adapters are not merged, and as `Predictor.load` does.
    """
    if not name.isascii() or not name.replace("-", "_").isidentifier():
        raise UsageError(f"--name {name!r} cannot name a model; take letters, digits, - and _, a letter first")
    with locked(out), TemporaryDirectory() as scratch:
        folder, manifest = served(artifact)
        if manifest["kind"] == "quantized":
            raise ArtifactError(
                f"{folder} simulates its 8 bits; compile it first: bertforge compile {folder} --data DATA"
            )
        if manifest["kind"] != "engine":
            compile_model(folder, *_PLAIN, None, Path(scratch, "engine"), say)
            folder, manifest = served(Path(scratch, "engine"))
        backend = _backend(folder, manifest)
        say("loading the engine")
        with closing(Predictor.load(folder)) as predictor, fresh_directory(out) as made:
            repository = _Repository(name, predictor, folder, backend)
            if taken := {output.name for output in repository.outputs} & set(repository.cells):
                raise ArtifactError(
                    f"{folder} reads a column named {taken.pop()}, as an output of the ensemble is named; "
                    "rename it in the table and train again"
                )
            fields = _write(made, repository)
        if predictor.codec.policy is not None:
            say(
                f"the thresholds of {artifact} stay behind: Triton answers with label and probabilities, and sends no "
                "row to a person"
            )
        return fields


def _backend(engine: Path, manifest: dict[str, Any]) -> TritonBackend:
    target, precision = manifest["target"], manifest["precision"]
    backend = TARGETS[target].triton if target in TARGETS else None
    if backend is None or precision not in backend.precisions:
        raise ArtifactError(
            f"{engine} is of {target} in {precision}, which Triton does not run as it was proved; export the model "
            "that it was compiled from, and ONNX Runtime will run it: bertforge export-triton MODEL --out OUT"
        )
    return backend


@dataclass(frozen=True)
class _Repository:
    """What the configurations are made of."""

    name: str
    predictor: Predictor
    engine: Path
    backend: TritonBackend

    @property
    def lengths(self) -> list[int]:
        """That rows are padded to: few where requests of one length become a batch, else all multiples of _SHORTEST."""
        longest, lengths = self.predictor.max_length, [_SHORTEST]
        while lengths[-1] < longest:
            lengths.append(lengths[-1] * 2 if self.backend.batches else lengths[-1] + _SHORTEST)
        return [*lengths[:-1], longest]

    @property
    def rows(self) -> int:
        """The most that one request may have: so many of the largest length fit into the memory of a batch."""
        return max(1, min(_MOST_ROWS, TOKENS // self.predictor.max_length))

    @property
    def cells(self) -> list[str]:
        """Names of the ensemble's inputs."""
        return ["text"] if self.predictor.codec.transform is None else list(self.predictor.manifest["inputs"])

    @property
    def tensors(self) -> list[Tensor]:
        """The engine's inputs."""
        transform = self.predictor.codec.transform
        found = [Tensor(name, "INT64", (-1, -1)) for name in ("input_ids", "attention_mask")]
        for name, shape in ({} if transform is None else transform.config.kinds).items():
            if width := KINDS[name].width(shape):
                dtype = "INT64" if issubclass(KINDS[name].dtype, np.integer) else "FP32"
                found.append(Tensor(name, dtype, (-1, -1 if width == VALUES else int(width))))
        return found

    @property
    def outputs(self) -> list[Tensor]:
        """The ensemble's."""
        return [
            Tensor("label", "STRING", (-1,)),
            Tensor("probabilities", "FP32", (-1, len(self.predictor.label_names))),
        ]

    @property
    def texts(self) -> list[Tensor]:
        """The ensemble's inputs."""
        return [Tensor(name, "STRING", (-1,)) for name in self.cells]


def _write(folder: Path, of: _Repository) -> dict[str, Any]:
    predictor, logits = of.predictor, Tensor("logits", "FP32", (-1, len(of.predictor.label_names)))
    reader, engine, decision = (f"{of.name}_{part}" for part in ("reader", "engine", "decision"))
    columns = predictor.codec.transform is not None

    place = _model(folder, reader, _python(reader, of.texts, of.tensors))
    shutil.copyfile(_CODE / ("columns.py" if columns else "text.py"), place / "model.py")
    predictor.tokenizer.save(place, predictor.max_length)
    write_json(place / "settings.json", {"rows": of.rows, "lengths": of.lengths})
    if columns:
        write_json(
            place / "codec.json", {name: predictor.manifest[name] for name in _CODEC if name in predictor.manifest}
        )

    place = _model(folder, engine, _engine(engine, of, logits))
    for name in of.backend.files:
        shutil.copyfile(of.engine / name, place / name)

    place = _model(folder, decision, _python(decision, [logits], of.outputs))
    shutil.copyfile(_CODE / "decision.py", place / "model.py")
    write_json(
        place / "settings.json",
        {
            "temperature": predictor.codec.temperature,
            "shifts": predictor.codec.shifts.tolist(),
            "labels": list(predictor.label_names),
        },
    )

    steps = [
        _step(reader, of.texts, of.tensors, ("", "reader/")),
        _step(engine, of.tensors, [logits], ("reader/", "engine/")),
        _step(decision, [logits], of.outputs, ("engine/", "")),
    ]
    head = _head(of.name, of.texts, of.outputs, platform="ensemble")
    place = _model(folder, of.name, f"{head}ensemble_scheduling {{ step [\n  " + ",\n  ".join(steps) + "\n] }\n")
    write_atomic(place / ".keep", b"")  # Triton wants the folder, and git and object stores lose an empty one

    shutil.copyfile(_CODE / "check.py", folder / "check.py")
    write_json(folder / "golden.json", _golden(of))
    fields = {
        "model": of.name,
        "backend": of.backend.name,
        "precision": predictor.manifest["precision"],
        "inputs": of.cells,
        "rows": of.rows,
        "parent": hash_file(of.engine / MANIFEST),
    }
    write_manifest(folder, "triton", **fields)
    return fields


def _model(folder: Path, name: str, config: str) -> Path:
    """Writes a model's configuration, and returns the folder of its version."""
    place = folder / name / "1"
    place.mkdir(parents=True)
    write_atomic(folder / name / "config.pbtxt", config)
    return place


def _engine(name: str, of: _Repository, logits: Tensor) -> str:
    kind = "KIND_GPU" if detect().device.type == "cuda" else "KIND_CPU"
    streams, batches = of.predictor.engine.streams, of.backend.batches
    inputs, outputs = of.tensors, [logits]
    if batches:  # Triton adds the axis
        inputs, outputs = ([Tensor(one.name, one.dtype, one.dims[1:]) for one in them] for them in (inputs, outputs))
    config = _head(name, inputs, outputs, rows=of.rows if batches else 0, backend=of.backend.name)
    config += f"instance_group [ {{ count: {streams} kind: {kind} }} ]\n"
    if batches:
        config += "dynamic_batching { }  # what waits goes together; nothing waits for more\n"
    if of.backend.streams:
        value = f'{{ string_value: "{streams}" }}'
        config += f"parameters {{ key: {_quoted(of.backend.streams)} value: {value} }}\n"
    return config


def _python(name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> str:
    return _head(name, inputs, outputs, backend="python") + "instance_group [ { count: 1 kind: KIND_CPU } ]\n"


def _head(name: str, inputs: Iterable[Tensor], outputs: Iterable[Tensor], *, rows: int = 0, **runs: str) -> str:
    """What every configuration begins with; `runs` is its backend or platform."""
    ((key, value),) = runs.items()
    tensors = (
        f"{side} [\n  " + ",\n  ".join(map(str, them)) + "\n]\n"
        for side, them in (("input", inputs), ("output", outputs))
    )
    return f"name: {_quoted(name)}\n{key}: {_quoted(value)}\nmax_batch_size: {rows}\n" + "".join(tensors)


def _step(model: str, inputs: Iterable[Tensor], outputs: Iterable[Tensor], scopes: tuple[str, str]) -> str:
    """Of the ensemble, where tensors between the models have a scope before their names, for a column may have any."""
    maps = (
        f"{side}_map {{ key: {_quoted(tensor.name)} value: {_quoted(scope + tensor.name)} }}"
        for side, tensors, scope in (("input", inputs, scopes[0]), ("output", outputs, scopes[1]))
        for tensor in tensors
    )
    return f"{{ model_name: {_quoted(model)} model_version: -1 {' '.join(maps)} }}"


def _quoted(text: str) -> str:
    """As protobuf's text format has strings, which takes JSON's escapes too."""
    return json.dumps(text, ensure_ascii=False)


def _golden(of: _Repository) -> dict[str, Any]:
    """A request for each golden row that has a text, and the probabilities that `Predictor` gives it."""
    frame = pd.DataFrame(of.predictor.manifest["inputs"])
    chances = of.predictor.predict_proba(frame).to_numpy(np.float64)
    texts = of.predictor.codec.read(frame).texts
    rows = []
    for place, row in enumerate(frame.to_dict("records")):
        if not is_blank(texts[place]):
            cells = {"text": texts[place]} if of.predictor.codec.transform is None else row
            inputs = [{"name": key, "shape": [1], "datatype": "BYTES", "data": [cells[key]]} for key in of.cells]
            rows.append({"request": {"inputs": inputs}, "probabilities": chances[place].tolist()})
    labels = list(of.predictor.label_names)
    return {"model": of.name, "labels": labels, "tolerance": WORST_FLOOR, "rows": rows}

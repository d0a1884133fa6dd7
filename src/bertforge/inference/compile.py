"""A merged or quantized model -> an engine in a folder that proves itself before it counts as built.

The engine is written, loaded again from what was written, and run on the model's golden rows and, where prepared data
is given, on validation rows of mixed length. It is kept when its logits are those of the model up to what its precision
allows; otherwise nothing is left behind. Calibration reads train rows, the judgement validation rows, the test rows
nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bertforge.artifact import (
    MANIFEST,
    compile_command,
    fresh_directory,
    hash_file,
    read_manifest,
    versions,
    write_json,
    write_manifest,
)
from bertforge.backends.base import Backend, BatchShape
from bertforge.backends.feeds import feeds
from bertforge.backends.registry import TARGETS, check_target, open_engine
from bertforge.backends.run import batch_of
from bertforge.data.prepared import PreparedData
from bertforge.data.streaming import in_a_thread
from bertforge.errors import ArtifactError, UsageError
from bertforge.hardware import detect
from bertforge.inference.compile_tensorrt import Order, build_engine
from bertforge.inference.predictor import Predictor, check_merged, plain_model
from bertforge.inference.proof import MAX_DROP, Rows, check_classes, prove, some_rows
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.scales import Scales
from bertforge.tensorrt_library import MODULES, RUNTIME_CACHE, unfit

_KEPT = ("recipe", "labels", "schema", "tabular", "data", "base", "temperature", "golden")


@dataclass(frozen=True)
class _Source:
    """What an engine is built from."""

    predictor: Predictor
    model: Path
    scales: Scales | None
    """Of a quantized model: its ranges stand in the graph."""
    prepared: PreparedData | None
    say: Callable[[str], object]
    """Told what is being done."""

    def network(self) -> BertForSequenceClassification:
        """The plain model, without simulated quantization."""
        if self.scales is None:
            return plain_model(self.predictor)
        return BertForSequenceClassification.from_pretrained(self.model)

    def rows(self, part: str) -> Rows:
        """See `proof.some_rows`."""
        assert self.prepared is not None
        return some_rows(self.predictor, self.prepared, part)


def compile_model(
    model: Path,
    target: str,
    precision: str,
    data: Path | None,
    out: Path,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Builds an engine in `out` and returns its receipt; `say` is told each stage as it begins.

    Where no GPU here runs what TensorRT built, `verified` is false in the receipt, `not_verified` says why, and nothing
    serves the engine until `verify_engine` has proved it. Raises ArtifactError for a run with adapters and for an
    engine that does not compute what the model does, UsageError for INT8 without data.
    """
    hardware = detect()
    check_target(target, precision, hardware)
    scales = _scales(model, target, precision, data)
    say("loading the model")
    predictor = Predictor.load(model, "fp32")
    prepared = None if data is None else PreparedData.open(data)
    source = _Source(predictor, model, scales, prepared, say)
    start = time.monotonic()
    with fresh_directory(out, replace=_renewable(out, target)) as folder:
        built: dict[str, Any] = {}
        if target in MODULES:
            lengths = None if prepared is None else _lengths(predictor, prepared)
            say("building")
            order = Order(target, precision, predictor.max_length, lengths, scales)
            built = build_engine(folder, source.network(), order, hardware, out)
        else:
            _build(folder, source, target, precision)
        receipt = {
            "target": target,
            "precision": precision,
            "device": hardware.name,
            "build_seconds": round(time.monotonic() - start, 1),
            "bytes": sum(path.stat().st_size for path in folder.iterdir()),
            "versions": versions(*TARGETS[target].libraries),
            # The runtime's cache grows as the engine is used.
            "hashes": {path.name: hash_file(path) for path in sorted(folder.iterdir()) if path.name != RUNTIME_CACHE},
            **built,
        }
        if target in MODULES and (reason := unfit(target, hardware)):
            receipt |= {"verified": False, "not_verified": reason}
        else:
            say("proving that it computes what the model does")
            with closing(open_engine(folder, target, precision, hardware)) as backend:
                receipt |= {"verified": True, **_proved(predictor, backend, prepared)}
        kept = {name: predictor.manifest[name] for name in _KEPT if name in predictor.manifest}
        predictor.tokenizer.save(folder, predictor.max_length)
        write_manifest(folder, "engine", **receipt, parent=hash_file(model / MANIFEST), **kept)
    return receipt


def verify_engine(model: Path, engine: Path, data: Path | None) -> dict[str, Any]:
    """Proves an engine that was built where nothing could run it, and returns its receipt, which now says so.

    Raises ArtifactError for an engine of another model and for one that does not compute what the model does, which is
    not served from then on, whatever was shown before; MachineError where it cannot run.
    """
    manifest = read_manifest(engine, "engine")
    if manifest["parent"] != hash_file(model / MANIFEST):
        again = compile_command(engine, manifest["target"], manifest["precision"])
        raise ArtifactError(
            f"{engine} was compiled from other weights than those of {model}; compile it again: {again}"
        )
    predictor = Predictor.load(model, "fp32")
    prepared = None if data is None else PreparedData.open(data)
    hardware = detect()
    with closing(open_engine(engine, manifest["target"], manifest["precision"], hardware)) as backend:
        try:
            proof = prove(predictor, backend, prepared)
        except ArtifactError as error:
            write_json(engine / MANIFEST, manifest | {"verified": False, "not_verified": str(error)})
            raise
    manifest.pop("not_verified", None)
    manifest |= {"verified": True, "device": hardware.name, **proof}
    write_json(engine / MANIFEST, manifest)
    return manifest


def default_folder(model: Path, target: str, precision: str) -> Path:
    """Where an engine of `model` lies unless told otherwise."""
    return model / "engines" / f"{target}-{precision}"


def _scales(model: Path, target: str, precision: str, data: Path | None) -> Scales | None:
    """The ranges of a quantized model, None for one that is not; raises when `precision` is not to be had from it."""
    manifest = read_manifest(model, "run", "model", "quantized")
    check_merged(model)
    if manifest["kind"] == "quantized":
        scales = Scales.load(model)
        if precision != scales.format:
            raise UsageError(
                f"{model} was quantized to {scales.format}, not to {precision}; --precision {scales.format}"
            )
        return scales
    if precision == "fp8" or (target in MODULES and precision == "int8"):
        raise UsageError(
            f"{target} takes {precision} from a quantized model: "
            f"bertforge quantize {model} --precision {precision} --data DIR --out Q, then compile Q"
        )
    if precision == "int8" and data is None:
        raise UsageError("int8 is calibrated on train rows; say where they are: --data DIR")
    return None


def _proved(predictor: Predictor, backend: Backend, prepared: PreparedData | None) -> dict[str, Any]:
    """`prove` of an engine that is kept only with its proof."""
    try:
        return prove(predictor, backend, prepared)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; nothing was written") from error


def _renewable(out: Path, target: str) -> bool:
    """Whether `out` holds an engine that a newer one may replace: TensorRT's, which a new version makes useless."""
    return target in MODULES and (out / MANIFEST).is_file() and read_manifest(out, "engine")["target"] == target


def _lengths(predictor: Predictor, prepared: PreparedData) -> np.ndarray:
    """Tokens of every train row, as the model reads it."""
    rows = prepared.rows(predictor.manifest["recipe"]["split"], "train")
    return predictor.examples(prepared, rows[:0]).lengths(rows)


def _build(folder: Path, source: _Source, target: str, precision: str) -> None:
    """Writes what `target` loads."""
    from bertforge.export.bert_onnx import export_onnx

    source.say("writing the ONNX graph")
    # OpenVINO lowers a float32 graph by itself; ONNX Runtime computes in the types it finds.
    half = precision == "fp16"  # ONNX Runtime on CUDA, which has a kernel for attention as one node
    graph = export_onnx(
        source.network(),
        folder / "graph.onnx",
        precision="fp16" if half else "fp32",
        scales=source.scales,
        fused=half,
    )
    calibrate = precision == "int8" and source.scales is None
    wanted = folder / TARGETS[target].file
    if target == "onnxruntime" and not calibrate:
        graph.rename(wanted)
        return
    if target == "onnxruntime":
        from bertforge.export.onnx_int8 import quantize_dynamically

        quantize_dynamically(graph, wanted)
    elif calibrate:
        _calibrate_openvino(graph, wanted, source)
    else:
        from bertforge.export.openvino_convert import convert

        convert(graph, wanted)
    graph.unlink()


def _calibrate_openvino(graph: Path, wanted: Path, source: _Source) -> None:
    """INT8 by NNCF, with accuracy control on validation rows."""
    from bertforge.export.graph import input_names
    from bertforge.export.openvino_convert import Calibration, convert

    train, validation = source.rows("train"), source.rows("validation")
    check_classes(train.labels)
    names = input_names(graph)

    def one_by_one(rows: Rows) -> list[dict[str, np.ndarray]]:
        shape = BatchShape(tokens=1)
        return [
            feeds(batch_of(rows.examples, rows.rows[i : i + 1], False, shape), names) for i in range(len(rows.rows))
        ]

    rows = Calibration(
        train=one_by_one(train),
        validation=list(zip(one_by_one(validation), validation.labels.tolist(), strict=True)),
        max_drop=MAX_DROP,
        say=source.say,
    )
    source.say(f"calibrating on {len(train.rows)} train rows, with accuracy control")
    in_a_thread(lambda: convert(graph, wanted, rows))

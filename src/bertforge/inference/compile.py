"""A merged model -> an engine in a folder that proves itself before it counts as built.

The engine is written, loaded again from what was written, and run on the model's golden rows and, where prepared data
is given, on validation rows of mixed length. It is kept when its logits are those of the model up to what its precision
allows; otherwise nothing is left behind. Calibration reads train rows, the judgement validation rows, the test rows
nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bertforge.artifact import (
    MANIFEST,
    fresh_directory,
    hash_file,
    read_manifest,
    versions,
    write_manifest,
)
from bertforge.backends.base import Backend, BatchShape
from bertforge.backends.feeds import feeds
from bertforge.backends.receipt import describe
from bertforge.backends.registry import TARGETS, check_target, open_engine
from bertforge.backends.run import batch_of, padding_waste, run
from bertforge.data.loader import Examples
from bertforge.data.prepared import PreparedData
from bertforge.data.streaming import in_a_thread
from bertforge.errors import ArtifactError, DataError, UsageError
from bertforge.evaluation.agreement import Agreement
from bertforge.evaluation.golden import GoldenRows
from bertforge.hardware import detect
from bertforge.inference.predictor import Predictor, plain_model
from bertforge.lora.adapter_io import ADAPTER_CONFIG
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.scales import Scales

CALIBRATION_ROWS = 300
VALIDATION_ROWS = 1000
MAX_DROP = 0.003  # accuracy on validation rows an engine may cost, a fraction
# What a logit may differ on golden rows, whose logits are float32's.
_TOLERANCE = {"fp32": 2e-3, "bf16": 0.25, "int8": 1.0, "fp8": 1.0}
_KEPT = ("recipe", "labels", "schema", "tabular", "data", "base", "golden")


@dataclass(frozen=True)
class _Rows:
    """Rows of prepared data for one purpose."""

    examples: Examples
    rows: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        return np.asarray(self.examples.labels[self.rows])

    def one_by_one(self, names: Container[str]) -> list[dict[str, np.ndarray]]:
        """Each row as the inputs `names` of a graph, without padding."""
        shape = BatchShape(tokens=1)
        return [
            feeds(batch_of(self.examples, self.rows[i : i + 1], False, shape), names) for i in range(len(self.rows))
        ]


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

    def rows(self, part: str) -> _Rows:
        """See `_rows`."""
        assert self.prepared is not None
        return _rows(self.predictor, self.prepared, part)


def compile_model(
    model: Path,
    target: str,
    precision: str,
    data: Path | None,
    out: Path,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Builds an engine in `out` and returns its receipt; `say` is told each stage as it begins.

    Raises ArtifactError for a run with adapters and for an engine that does not compute what the model does,
    UsageError for INT8 without data.
    """
    check_target(target, precision)
    manifest = read_manifest(model, "run", "model", "quantized")
    if (model / ADAPTER_CONFIG).is_file():
        raise ArtifactError(
            f"{model} still has its adapter beside the base; merge first: bertforge merge {model} --out DIR"
        )
    scales = Scales.load(model) if manifest["kind"] == "quantized" else None
    if scales is not None and precision != scales.format:
        raise UsageError(f"{model} was quantized to {scales.format}, not to {precision}; --precision {scales.format}")
    if precision == "int8" and scales is None and data is None:
        raise UsageError("int8 is calibrated on train rows; say where they are: --data DIR")
    hardware = detect()
    say("loading the model")
    predictor = Predictor.load(model, "fp32")
    prepared = None if data is None else PreparedData.open(data)
    start = time.monotonic()
    with fresh_directory(out) as folder:
        _build(folder, _Source(predictor, model, scales, prepared, say), target, precision)
        say("proving that it computes what the model does")
        seconds = time.monotonic() - start
        backend = open_engine(folder, target, precision, hardware)
        files = sorted(path for path in folder.iterdir())
        receipt = {
            "target": target,
            "precision": precision,
            "device": hardware.name,
            "build_seconds": round(seconds, 1),
            "bytes": sum(path.stat().st_size for path in files),
            **_proof(predictor, backend, prepared),
            "versions": versions(*TARGETS[target].libraries),
            "hashes": {path.name: hash_file(path) for path in files},
        }
        backend.close()
        kept = {name: predictor.manifest[name] for name in _KEPT}
        predictor.tokenizer.save(folder)
        write_manifest(folder, "engine", **receipt, parent=hash_file(model / MANIFEST), **kept)
    return receipt


def default_folder(model: Path, target: str, precision: str) -> Path:
    """Where an engine of `model` lies unless told otherwise."""
    return model / "engines" / f"{target}-{precision}"


def _build(folder: Path, source: _Source, target: str, precision: str) -> None:
    from bertforge.export.bert_onnx import export_onnx
    from bertforge.export.graph import input_names

    source.say("writing the ONNX graph")
    graph = export_onnx(source.network(), folder / "graph.onnx", scales=source.scales)
    calibrate = precision == "int8" and source.scales is None
    wanted = folder / TARGETS[target].file
    if target == "openvino":
        from bertforge.export.openvino_convert import convert

        if calibrate:
            train, validation = source.rows("train"), source.rows("validation")
            if len(np.unique(train.labels)) < 2:
                raise DataError("the calibration rows hold one class only; prepare a table with rows of every class")
            names = input_names(graph)

            def accuracy(logits: np.ndarray) -> float:
                found = float((logits.argmax(1) == validation.labels).mean())
                if len(logits) == len(validation.rows):  # NNCF also asks row by row
                    source.say(f"accuracy on {len(logits):,} validation rows: {found:.2%}")
                return found

            source.say(f"calibrating on {len(train.rows)} train rows, with accuracy control")
            in_a_thread(
                lambda: convert(
                    graph,
                    wanted,
                    calibration=train.one_by_one(names),
                    validation=validation.one_by_one(names),
                    accuracy=accuracy,
                    max_drop=MAX_DROP,
                )
            )
        else:
            convert(graph, wanted)
        graph.unlink()
    elif calibrate:
        from bertforge.export.onnx_int8 import quantize_dynamically

        quantize_dynamically(graph, wanted)
        graph.unlink()
    else:
        graph.rename(wanted)


def _proof(predictor: Predictor, backend: Backend, prepared: PreparedData | None) -> dict[str, Any]:
    """Agreement with the model on golden rows and, with data, on validation rows; raises ArtifactError without it."""
    golden = GoldenRows.from_dict(predictor.manifest["golden"])
    agreement = Agreement.of(golden.logits, run(backend, golden.examples, np.arange(len(golden.logits))))
    if not agreement.max_logit_difference <= _TOLERANCE[backend.precision]:
        raise ArtifactError(
            f"the {backend.name} engine differs from the model by {agreement.max_logit_difference:.3g} in a logit of "
            f"its golden rows, more than {_TOLERANCE[backend.precision]} for {backend.precision}; nothing was written"
        )
    proof: dict[str, Any] = {"products": _products(backend, golden), "golden_agreement": agreement.to_dict()}
    if prepared is not None:
        rows = _rows(predictor, prepared, "validation")
        reference = run(predictor.backend, rows.examples, rows.rows)
        found = run(backend, rows.examples, rows.rows)
        before, after = ((logits.argmax(1) == rows.labels).mean() for logits in (reference, found))
        proof["padding_waste"] = padding_waste(rows.examples.lengths(rows.rows), backend.packed, backend.shape)
        proof["validation_agreement"] = Agreement.of(reference, found).to_dict()
        proof |= {"validation_accuracy": float(after), "validation_accuracy_fp32": float(before)}
        if not before - after <= MAX_DROP:
            raise ArtifactError(
                f"the {backend.name} engine in {backend.precision} loses {before - after:.2%} accuracy on "
                f"{len(rows.rows):,} validation rows, more than {MAX_DROP:.1%}; nothing was written"
            )
    return proof


def _products(backend: Backend, golden: GoldenRows) -> dict[str, Any] | None:
    """The receipt's part on matrix products, of the golden row of median length; None where the engine tells none."""
    places = np.arange(len(golden.logits))
    lengths = golden.examples.lengths(places)
    middle = np.argsort(lengths, kind="stable")[[len(lengths) // 2]]
    products = backend.products(batch_of(golden.examples, middle, backend.packed, BatchShape(tokens=1)))
    return describe(products, backend.precision, int(lengths[middle[0]])) if products else None


def _rows(predictor: Predictor, prepared: PreparedData, part: str) -> _Rows:
    """Rows spread over a part of the data: for calibration from train, for judgement from validation."""
    rows = prepared.rows(predictor.manifest["recipe"]["split"], part)
    wanted = CALIBRATION_ROWS if part == "train" else VALIDATION_ROWS
    rows = rows[np.linspace(0, len(rows) - 1, min(wanted, len(rows))).astype(int)]
    return _Rows(predictor.examples(prepared, rows), rows)

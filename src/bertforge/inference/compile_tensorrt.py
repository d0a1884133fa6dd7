"""A plain model -> a TensorRT engine in a folder, with the record of what it was built for.

The folder holds `model.engine`, `model.onnx` (what it was built from), `engine.json` (`tensorrt_library.BuiltFor`, and
what the layers say) and the caches. An older engine of the same folder is taken over when nothing it depends on has
changed; otherwise its timing cache shortens the build.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bertforge.artifact import hash_file, write_atomic, write_json
from bertforge.backends.buckets import buckets_of, choose_edges, usual_edges, waste
from bertforge.errors import ArtifactError, MachineError
from bertforge.hardware import Hardware
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.scales import Scales
from bertforge.tensorrt_library import BUILT_FOR, ENGINE, GRAPH, RUNTIME_CACHE, TIMING_CACHE, BuiltFor, unfit


@dataclass(frozen=True)
class Order:
    """What engine is wanted."""

    target: str
    precision: str
    """Of the products: fp32, fp16, bf16, or int8 and fp8, whose `scales` say which products."""
    longest: int
    """Tokens of the longest text."""
    lengths: np.ndarray | None = None
    """Tokens of real rows, from which the edges are chosen."""
    scales: Scales | None = None


def build_engine(
    folder: Path, model: BertForSequenceClassification, order: Order, hardware: Hardware, older: Path
) -> dict[str, Any]:
    """Builds into `folder`, or takes over the engine of `older` (a folder that need not exist); returns its receipt.

    Raises MachineError for TensorRT where there is no GPU, ArtifactError for a graph it cannot build.
    """
    from bertforge.export.bert_onnx import export_onnx
    from bertforge.export.tensorrt_build import build
    from bertforge.export.tensorrt_layers import product_work, summary

    if order.target == "tensorrt" and (reason := unfit(order.target, hardware)):
        raise MachineError(
            f"tensorrt builds an engine on the GPU it will run on, but {reason}; run this command where it will run, "
            "or take --target tensorrt-rtx, which builds anywhere"
        )
    products = order.precision if order.scales is None else "fp16"
    graph = export_onnx(model, folder / GRAPH, precision=products, ids="int32", scales=order.scales)
    edges = _edges(order, model.config.hidden_size)
    shapes = tuple((bucket.rows, bucket.length) for bucket in buckets_of(edges))
    wanted = BuiltFor.here(order.target, hardware, hash_file(graph), shapes)
    receipt: dict[str, Any] = {"edges": list(edges)}
    if order.lengths is not None:
        receipt["padding_waste"] = waste(order.lengths, edges)
    record = _same(older, wanted)
    receipt["reused"] = record is not None
    if record is not None:
        for name in (ENGINE, TIMING_CACHE, RUNTIME_CACHE):
            if (older / name).is_file():
                shutil.copy2(older / name, folder / name)
    else:
        timings = older / TIMING_CACHE
        built = build(order.target, graph, shapes, timings.read_bytes() if timings.is_file() else b"")
        write_atomic(folder / ENGINE, built.engine)
        if built.timings:
            write_atomic(folder / TIMING_CACHE, built.timings)
        layers = summary(built.layers, product_work(graph, *shapes[0]))
        record = {"built_for": wanted.to_dict(), "engine": hash_file(folder / ENGINE), "layers": layers}
    write_json(folder / BUILT_FOR, record)
    return {**receipt, **record}


def _edges(order: Order, hidden: int) -> tuple[int, ...]:
    if order.lengths is None:
        return usual_edges(order.longest)
    return choose_edges(order.lengths, order.longest, hidden)


def _same(older: Path, wanted: BuiltFor) -> dict[str, Any] | None:
    """The record of the engine in `older`, if it is whole and was built for what is wanted."""
    try:
        if BuiltFor.read(older) != wanted:
            return None
        record: dict[str, Any] = json.loads((older / BUILT_FOR).read_text())
        return record if hash_file(older / ENGINE) == record["engine"] else None
    except (ArtifactError, OSError, KeyError):
        return None

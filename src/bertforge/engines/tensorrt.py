"""TensorRT and TensorRT-RTX: two targets with one way to be built, run (`tensorrt_run`) and read (`tensorrt_layers`).

The folder holds `model.engine`, `model.onnx` (what it was built from), `engine.json` (`tensorrt_library.BuiltFor`, and
what the layers say) and the caches. An older engine of the same folder is taken over when nothing it depends on has
changed; otherwise its timing cache shortens the build.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from bertforge.artifact import hash_file, write_atomic, write_json
from bertforge.engines.base import Order, Target
from bertforge.engines.buckets import buckets_of, choose_edges, usual_edges, waste
from bertforge.engines.tensorrt_build import build
from bertforge.engines.tensorrt_layers import product_work, summary
from bertforge.engines.tensorrt_library import (
    BUILT_FOR,
    ENGINE,
    GRAPH,
    MODULES,
    RUNTIME_CACHE,
    TIMING_CACHE,
    BuiltFor,
    unfit,
)
from bertforge.engines.tensorrt_run import TensorRtEngine
from bertforge.errors import ArtifactError
from bertforge.hardware import Hardware


def _build(target: str, folder: Path, order: Order, hardware: Hardware) -> dict[str, Any]:
    """Builds into `folder`, or takes over the engine of `order.older`.

    Raises ArtifactError for a graph it cannot build.
    """
    from bertforge.export.bert_onnx import export_onnx

    order.say("building")
    products = order.precision if order.scales is None else "fp16"
    graph = export_onnx(order.model, folder / GRAPH, precision=products, ids="int32", scales=order.scales)
    edges = _edges(order, order.model.config.hidden_size)
    shapes = tuple((bucket.rows, bucket.length) for bucket in buckets_of(edges))
    wanted = BuiltFor.here(target, hardware, hash_file(graph), shapes)
    receipt: dict[str, Any] = {"edges": list(edges)}
    if order.lengths is not None:
        receipt["padding_waste"] = waste(order.lengths, edges)
    older = order.older or folder
    record = _same(older, wanted)
    receipt["reused"] = record is not None
    if record is not None:
        for name in (ENGINE, TIMING_CACHE, RUNTIME_CACHE):
            if (older / name).is_file():
                shutil.copy2(older / name, folder / name)
    else:
        timings = older / TIMING_CACHE
        built = build(target, graph, shapes, timings.read_bytes() if timings.is_file() else b"")
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


def _target(name: str, about: str, *, compiles_at_load: bool) -> Target:
    return Target(
        name=name,
        precisions=("fp32", "fp16", "bf16", "int8", "fp8"),
        libraries=("onnx", MODULES[name]),
        extra=name,
        about=about,
        build=partial(_build, name),
        open=partial(TensorRtEngine, name),
        exact=lambda folder, precision, hardware: None,  # its files are compiled
        rest=lambda hardware: "fp16",
        unfit=partial(unfit, name),
        calibrates=(),
        renewable=True,
        changing=(RUNTIME_CACHE,),
        builds_where_it_runs=not compiles_at_load,
        compiles_at_load=compiles_at_load,
    )


TARGET = _target("tensorrt", "engines for the NVIDIA GPU here", compiles_at_load=False)
RTX_TARGET = _target(
    "tensorrt-rtx", "engines for GPUs of compute capability 8.0, 8.6, 8.9 and 12.x, not 9.0", compiles_at_load=True
)

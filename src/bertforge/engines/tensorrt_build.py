"""ONNX -> a TensorRT engine, strongly typed: every type is the graph's, and the builder chooses kernels only.

Each shape becomes an optimisation profile of its own whose minimum, optimum and maximum are that shape, so kernels are
chosen for it. The layers are read back for the receipt. TensorRT-RTX lists them in the builder's log, also where there
is no GPU (1.7); otherwise the engine is loaded and its inspector asked, which prints the same lines.

https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/python-api-docs.html
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertforge.engines.tensorrt_library import load_library, new_log, sizes_of
from bertforge.errors import ArtifactError

if TYPE_CHECKING:
    import tensorrt

VALUES = 32  # of a row in a column of several, at most (`columns.kind.VALUES`): every shape is fixed


@dataclass(frozen=True)
class Built:
    """What a build gives."""

    engine: bytes
    layers: str
    """One line a layer, empty if the library told nothing."""
    timings: bytes
    """The timing cache, for the next build; empty for TensorRT-RTX, which keeps none."""


def build(target: str, graph: Path, shapes: Sequence[tuple[int, int]], timings: bytes = b"") -> Built:
    """Builds `graph` for each (rows, tokens) of `shapes`; `timings` is the cache of an earlier build.

    Raises ArtifactError, naming the node, for a graph the parser refuses, and for one that cannot be built.
    """
    if TYPE_CHECKING:
        trt = tensorrt
    else:
        trt = load_library(target)
    log = new_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph.read_bytes()):
        raise ArtifactError(f"{target} cannot read {graph}: {_first_error(parser)}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default; it rounds float32 products to 10 bits
    for shape in shapes:
        profile = builder.create_optimization_profile()
        for name, sizes in _inputs(network, shape).items():
            profile.set_shape(name, *[trt.Dims(sizes)] * 3)  # smallest, usual, largest
        config.add_optimization_profile(profile)
    # TensorRT-RTX times nothing while it builds, and a timing cache would make it look for a GPU.
    if keeps_timings := target == "tensorrt":
        _use_timings(config, timings)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise ArtifactError(f"{target} {trt.__version__} cannot build {graph}: {log.reason}")
    return Built(
        engine=bytes(serialized),
        layers=log.layers or _inspect(trt, bytes(serialized)),
        timings=bytes(config.get_timing_cache().serialize()) if keeps_timings else b"",
    )


def _first_error(parser: tensorrt.OnnxParser) -> str:
    error = parser.get_error(0)
    said = " ".join(error.desc().split())
    if not error.node_name():
        return f"it is no ONNX model, or a damaged one ({said}); compile again"
    return f"node {error.node_name()} ({error.node_operator()}): {said}"


def _inputs(network: tensorrt.INetworkDefinition, shape: tuple[int, int]) -> dict[str, list[int]]:
    """The sizes of every input at `shape`; the names of the axes are those `export.bert_onnx` gave."""
    named = {"batch": shape[0], "seq": shape[1], "values": VALUES}
    return {
        value.name: [
            size if size >= 0 else named[value.get_dimension_name(axis)]
            for axis, size in enumerate(sizes_of(value.shape))
        ]
        for value in (network.get_input(i) for i in range(network.num_inputs))
    }


def _use_timings(config: tensorrt.IBuilderConfig, timings: bytes) -> None:
    """Times measured on another GPU or by another version are refused by TensorRT, and then measured anew."""
    if not config.set_timing_cache(config.create_timing_cache(timings), ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _inspect(trt: Any, engine: bytes) -> str:
    loaded = trt.Runtime(new_log(trt)).deserialize_cuda_engine(engine)
    if loaded is None:
        return ""
    return str(loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE))

"""ONNX -> ONNX with INT8 weights and activations quantized as they come: ONNX Runtime's own way on a CPU."""

from __future__ import annotations

from pathlib import Path

from bertforge.export.graph import FULL_PRECISION


def quantize_dynamically(graph: Path, out: Path) -> Path:
    """Writes `out`: linear layers of the encoder in INT8, one scale a channel; head and columns as they were."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kept = [
        node.name
        for node in onnx.load(str(graph), load_external_data=False).graph.node
        if node.name.startswith(FULL_PRECISION)
    ]
    quantize_dynamic(
        str(graph), str(out), weight_type=QuantType.QInt8, per_channel=True, reduce_range=False, nodes_to_exclude=kept
    )
    return out

"""ONNX Runtime's own INT8 keeps a scale for every output channel, and leaves the head as it was."""

import numpy as np
import onnx
import torch

from tests.engines.building import built
from tests.export.test_bert_onnx import SMALL
from tests.model.tiny import tiny_bert

NAME = "bert.encoder.layer.0.intermediate.dense"


def test_every_output_channel_of_a_weight_has_a_scale_of_its_own(tmp_path):
    """A channel a thousand times smaller than its neighbours is rounded as finely for its size as they are."""
    model = tiny_bert(**SMALL)
    weight = model.get_submodule(NAME).weight.detach()  # [out, in]
    with torch.no_grad():
        weight[3] *= 1e-3
    built("onnxruntime", model, tmp_path, "int8")
    graph = onnx.load(str(tmp_path / "model.onnx")).graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    stored, scale = tensors[f"{NAME}.weight_quantized"], tensors[f"{NAME}.weight_scale"]  # [in, out], [out]
    assert stored.dtype == np.int8
    largest = weight.abs().amax(1).numpy()
    error = np.abs(stored * scale - weight.T.numpy())  # [in, out]
    assert (error <= 1.001 * largest / 254).all(), "half a step of 127 on each side of 0"
    assert tensors["classifier.weight"].dtype == np.float32
    assert tensors["word_embeddings"].dtype == np.float32

"""An exported graph computes what the model computes, in the types that were asked for."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from bertforge.batch import PaddedBatch
from bertforge.errors import ArtifactError, UsageError
from bertforge.export.bert_onnx import export_onnx
from bertforge.lora.config import LoraConfig
from bertforge.lora.inject import inject_lora
from bertforge.scales import Scales
from tests.model.tiny import tiny_bert

LENGTHS = (1, 2, 17, 40)
SMALL = {"vocab_size": 100, "max_position_embeddings": 64, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(0)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return PaddedBatch(torch.randint(5, 90, mask.shape) * mask, mask.long())


def logits_of(path, batch, dtype=np.int64):
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {name: getattr(batch, name).numpy().astype(dtype) for name in ("input_ids", "attention_mask")}
    return session.run(None, feeds)[0]


@torch.no_grad()
def expected(model, batch):
    return model(batch).numpy()


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_float32_logits_are_the_models(tmp_path, batch, activation):
    model = tiny_bert(hidden_act=activation, **SMALL)
    path = export_onnx(model, tmp_path / "m.onnx")
    np.testing.assert_allclose(logits_of(path, batch), expected(model, batch), atol=1e-5)
    other = tiny_bert(seed=1, hidden_act=activation, **SMALL)
    assert np.abs(logits_of(path, batch) - expected(other, batch)).max() > 1e-2


def test_both_types_of_ids_and_any_shape(tmp_path, batch):
    model = tiny_bert(**SMALL)
    path = export_onnx(model, tmp_path / "m.onnx", ids="int32")
    np.testing.assert_allclose(logits_of(path, batch, np.int32), expected(model, batch), atol=1e-5)
    one = PaddedBatch(batch.input_ids[:1, :1], batch.attention_mask[:1, :1])
    np.testing.assert_allclose(logits_of(path, one, np.int32), expected(model, one), atol=1e-5)


def test_padding_changes_nothing_and_a_token_does(tmp_path, batch):
    path = export_onnx(tiny_bert(**SMALL), tmp_path / "m.onnx")
    before = logits_of(path, batch)
    for places, changes in ((batch.attention_mask == 0, False), (batch.attention_mask == 1, True)):
        ids = torch.where(places, 7, batch.input_ids)
        after = logits_of(path, PaddedBatch(ids, batch.attention_mask))
        assert (np.abs(after - before).max() > 1e-3) == changes


def test_half_precision_stands_in_the_graph(tmp_path, batch):
    model = tiny_bert(**SMALL)
    path = export_onnx(model, tmp_path / "m.onnx", precision="fp16")
    np.testing.assert_allclose(logits_of(path, batch), expected(model, batch), atol=2e-2)  # fp16 holds 3 digits
    types = inferred_types(path)
    assert set(types["MatMul"]) == {"FLOAT16", "FLOAT"}
    assert types["MatMul"]["FLOAT"] == 2, "the head's two layers"
    assert set(types["LayerNormalization"]) == set(types["Softmax"]) == {"FLOAT"}
    types = inferred_types(export_onnx(model, tmp_path / "b.onnx", precision="bf16"))
    assert set(types["MatMul"]) == {"BFLOAT16", "FLOAT"}
    assert set(types["LayerNormalization"]) == set(types["Softmax"]) == {"FLOAT"}


def test_fused_operators_compute_the_same_and_stand_in_the_graph(tmp_path, batch):
    model = tiny_bert(**SMALL)
    path = export_onnx(model, tmp_path / "m.onnx", fused=True)
    np.testing.assert_allclose(logits_of(path, batch), expected(model, batch), atol=1e-5)
    ids = torch.where(batch.attention_mask == 0, 7, batch.input_ids)
    padded_otherwise = PaddedBatch(ids, batch.attention_mask)
    np.testing.assert_allclose(logits_of(path, padded_otherwise), expected(model, batch), atol=1e-5)
    half = onnx.load(export_onnx(model, tmp_path / "h.onnx", precision="fp16", fused=True)).graph
    layers, operators = model.config.num_hidden_layers, Counter(node.op_type for node in half.node)
    assert operators["MultiHeadAttention"] == layers
    assert "Softmax" not in operators
    assert operators["Cast"] == 4, "two around the embeddings' sum, the mask's, the head's, and none in a layer"


def inferred_types(path):
    """Operator -> how many of its outputs have each type."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True).graph
    types = {value.name: onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type) for value in graph.value_info}
    found = {}
    for node in graph.node:
        if node.output[0] in types:
            found.setdefault(node.op_type, Counter())[types[node.output[0]]] += 1
    return found


def calibrated(model, batch, form):
    """Scales of every linear layer of the encoder, from this batch."""
    amax = {}

    def watch(name):
        def hook(module, inputs):
            amax[name] = float(inputs[0].abs().max())

        return hook

    hooks = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layer." in name
    ]
    with torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    return Scales(form, amax)


def test_eight_bits_come_close_and_stand_in_the_graph(tmp_path, batch):
    model = tiny_bert(**SMALL)
    scales = calibrated(model, batch, "int8")
    path = export_onnx(model, tmp_path / "m.onnx", scales=scales)
    difference = np.abs(logits_of(path, batch) - expected(model, batch)).max()
    assert 1e-6 < difference < 5e-2  # seven bits of the largest value, through two layers
    graph = onnx.load(path).graph
    layers = model.config.num_hidden_layers
    # A layer has 6 weights and 4 inputs: query, key and value share one, but in the last the query reads one token.
    assert Counter(node.op_type for node in graph.node)["DequantizeLinear"] == 10 * layers + 1
    weights = [tensor for tensor in graph.initializer if tensor.name.endswith("weight_int8")]
    assert len(weights) == 6 * layers
    assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.INT8}


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_every_output_channel_of_a_weight_has_a_scale_of_its_own(tmp_path, batch, form):
    """Each channel's largest weight is the format's largest number, the one of a channel of small weights too."""
    model = tiny_bert(**SMALL)
    name = "bert.encoder.layer.0.intermediate.dense"
    weight = model.get_submodule(name).weight.detach()
    weight[3] *= 1e-3
    graph = onnx.load(export_onnx(model, tmp_path / "m.onnx", scales=calibrated(model, batch, form))).graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor).astype(np.float32) for tensor in graph.initializer}
    stored, scale = tensors[f"{name}.weight_{form}"], tensors[f"{name}.weight_scale"]  # [in, out], [out]
    assert np.abs(stored).max(0).tolist() == [Scales(form, {}).largest] * len(weight)
    np.testing.assert_allclose(scale * Scales(form, {}).largest, weight.abs().amax(1), rtol=1e-6)


def test_fp8_stands_in_the_graph(tmp_path, batch):
    model = tiny_bert(**SMALL)
    path = export_onnx(model, tmp_path / "m.onnx", precision="fp16", scales=calibrated(model, batch, "fp8"))
    weights = [tensor for tensor in onnx.load(path).graph.initializer if tensor.name.endswith("weight_fp8")]
    assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.FLOAT8E4M3FN}


def test_smoothing_is_undone_by_the_weights(tmp_path, batch):
    model = tiny_bert(**SMALL)
    scales = calibrated(model, batch, "int8")
    name = "bert.encoder.layer.0.intermediate.dense"
    smooth = np.linspace(0.5, 2, model.config.hidden_size).astype(np.float32)
    smoothed = Scales("int8", scales.activations, smooth={name: smooth})
    path = export_onnx(model, tmp_path / "m.onnx", scales=smoothed)
    assert np.abs(logits_of(path, batch) - expected(model, batch)).max() < 5e-2


def test_what_cannot_be_exported_is_said(tmp_path):
    model = tiny_bert(**SMALL)
    with pytest.raises(UsageError, match="fp32, fp16 or bf16"):
        export_onnx(model, tmp_path / "m.onnx", precision="fp64")
    inject_lora(model, LoraConfig(r=2, target_modules=("query",)))
    with pytest.raises(ArtifactError, match="bertforge merge RUN"):
        export_onnx(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_weights_past_their_range_are_clipped_and_a_dead_channel_stays_dead(tmp_path, batch, form):
    """Fine-tuning moves weights and leaves their ranges; E4M3 has no infinity, so what lies past it would be NaN."""
    model = tiny_bert(**SMALL)
    linear = model.bert.encoder.layer[0].intermediate.dense
    with torch.no_grad():
        linear.weight[0] = 0
    scales = calibrated(model, batch, form)
    name = "bert.encoder.layer.0.intermediate.dense"
    scales.weights[name] = linear.weight.detach().abs().amax(1).numpy() / 1.1
    graph = onnx.load(export_onnx(model, tmp_path / "m.onnx", precision="fp16", scales=scales)).graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor).astype(np.float32) for tensor in graph.initializer}
    stored, scale = tensors[f"{name}.weight_{form}"], tensors[f"{name}.weight_scale"]
    assert np.isfinite(stored).all()
    assert (scale > 0).all()
    assert np.abs(stored[:, 1:]).max(0) == pytest.approx(scales.largest)
    assert (stored[:, 0] == 0).all()

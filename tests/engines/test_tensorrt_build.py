"""Real engines of TensorRT-RTX, built on the CPU, and what their layers say: types are kept, attention is fused."""

import importlib.util
import sys

import onnx
import pytest
import torch

from bertforge.batch import PaddedBatch
from bertforge.columns.encoder import TabularConfig
from bertforge.engines.tensorrt_build import build
from bertforge.engines.tensorrt_layers import parse, product_work, summary
from bertforge.engines.tensorrt_library import load_library
from bertforge.errors import ArtifactError, MachineError
from bertforge.export.bert_onnx import export_onnx
from bertforge.scales import Scales
from tests.export.test_bert_onnx import calibrated
from tests.model.tiny import tiny_bert

SHAPES = ((4, 32), (1, 16))
needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")


@pytest.fixture(scope="module")
def model():
    """Wide enough for tensor cores: 2 heads of 64."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 100, "max_position_embeddings": 64}
    return tiny_bert(**sizes, initializer_range=0.2)


def scales_of(model, form, *, attention=False):
    """From one made-up batch; with `attention`, its two products as well."""
    torch.manual_seed(0)
    ids = torch.randint(5, 90, (4, 32))
    scales = calibrated(model, PaddedBatch(ids, torch.ones_like(ids)), form)
    if not attention:
        return scales
    points = {"query_out": 8.0, "key_out": 8.0, "value_out": 8.0, "shares": 1.0}
    layers = range(model.config.num_hidden_layers)
    amax = {f"bert.encoder.layer.{i}.attention.self.{name}": value for i in layers for name, value in points.items()}
    return Scales(form, scales.activations | amax)


def told(model, tmp_path, precision, scales=None):
    graph = export_onnx(model, tmp_path / "m.onnx", precision=precision, ids="int32", scales=scales)
    built = build("tensorrt-rtx", graph, SHAPES)
    assert len(built.engine) > 100_000
    assert not built.timings
    return summary(built.layers, product_work(graph, *SHAPES[0]))


@needs_rtx
@pytest.mark.parametrize(("precision", "fused"), [("fp32", 1), ("fp16", 2), ("bf16", 2)])
def test_products_run_in_the_graphs_type(model, tmp_path, precision, fused):
    found = told(model, tmp_path, precision)
    assert found["gemm_share"][precision] > 0.95, "all but the head"
    assert found["gemm_share"].keys() <= {precision, "fp32"}
    assert (found["fused_attention"], found["softmaxes"]) == (fused, 2)
    assert found["layers"] > 20


@needs_rtx
@pytest.mark.parametrize("rest", ["fp16", "bf16"])
@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_linear_layers_run_in_eight_bits(model, tmp_path, form, rest):
    found = told(model, tmp_path, rest, scales_of(model, form))
    assert found["gemm_share"][form] > 0.85
    assert found["gemm_share"][rest] > 0.01, "attention"
    assert found["fused_attention"] == 2


@needs_rtx
def test_attention_runs_in_fp8_too(model, tmp_path):
    plain = told(model, tmp_path, "fp16", scales_of(model, "fp8"))
    found = told(model, tmp_path, "fp16", scales_of(model, "fp8", attention=True))
    assert found["gemm_share"]["fp8"] > plain["gemm_share"]["fp8"]
    assert found["fused_attention"] == 2


@needs_rtx
def test_a_node_that_cannot_be_parsed_is_named(model, tmp_path):
    graph = export_onnx(model, tmp_path / "m.onnx", precision="fp16")
    broken = onnx.load(graph)
    node = next(node for node in broken.graph.node if node.op_type == "Gelu")
    node.op_type = "Gelo"
    onnx.save(broken, graph)
    with pytest.raises(ArtifactError, match=rf"node {node.name} \(Gelo\)") as error:
        build("tensorrt-rtx", graph, SHAPES)
    assert "\n" not in str(error.value)


@needs_rtx
@pytest.mark.parametrize("keep", [0, 5000])
def test_a_damaged_graph_is_one_line(model, tmp_path, keep):
    graph = export_onnx(model, tmp_path / "m.onnx")
    graph.write_bytes(graph.read_bytes()[:keep] or b"no graph")
    with pytest.raises(ArtifactError, match="no ONNX model, or a damaged one") as error:
        build("tensorrt-rtx", graph, SHAPES)
    assert "\n" not in str(error.value)


@needs_rtx
def test_a_shape_the_model_has_no_positions_for_is_one_line(model, tmp_path):
    graph = export_onnx(model, tmp_path / "m.onnx")
    with pytest.raises(ArtifactError, match=r"cannot build .*embeddings/Add") as error:
        build("tensorrt-rtx", graph, [(1, 65)])
    assert "\n" not in str(error.value)


@needs_rtx
@pytest.mark.filterwarnings("ignore:.*Timing cache.*:DeprecationWarning")
def test_timings_are_kept_for_the_next_build(model, tmp_path, monkeypatch):
    """TensorRT's own path, run by its sibling of the same API, whose timing cache is an empty one."""
    monkeypatch.setitem(sys.modules, "tensorrt", importlib.import_module("tensorrt_rtx"))
    graph = export_onnx(model, tmp_path / "m.onnx")
    first = build("tensorrt", graph, SHAPES[:1])
    assert first.timings
    assert build("tensorrt", graph, SHAPES[:1], first.timings).timings == first.timings
    assert build("tensorrt", graph, SHAPES[:1], b"of another kind").timings, "refused and begun anew"


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MachineError, match=r"pip install 'bertforge\[tensorrt\]'"):
        load_library("tensorrt")


def line(name, types, nodes, kind="gemm"):
    """One layer as TensorRT prints it."""
    reads = ", ".join(f"{{ Name: t, Dimensions: [2,2], Strides: [2,1], Datatype: {kind} }}" for kind in types)
    known = "".join(f"[ONNX Layer: {node}]" for node in nodes)
    writes = "{ Name: o, Dimensions: [2,2], Datatype: Float }"
    return f"Name: {name}, LayerType: {kind}, Inputs: [ {reads}], Outputs: [ {writes}], Metadata: {known}"


def test_the_first_layer_that_names_a_product_computes_it():
    listing = "\n".join(
        [
            "Layers:",
            line("g0", ["Int8", "Int8"], ["a/MatMul_1"]),
            line("scale", ["Half"], ["a/MatMul_1", "a/Add_2"], "kgen"),
            line("mha", ["Half", "Float"], ["a/MatMul_3", "a/Softmax_4", "a/MatMul_5"], "kgen"),
            line("g1 [profile 1]", ["Float"], ["a/MatMul_1"]),
            "I/O Tensors:",
        ]
    )
    assert [layer.precision for layer in parse(listing)] == ["int8", "fp16", "fp16", "fp32"]
    found = summary(listing, {"a/MatMul_1": 60, "a/MatMul_3": 20, "a/MatMul_5": 20})
    assert found == {"layers": 4, "gemm_share": {"fp16": 0.4, "int8": 0.6}, "softmaxes": 1, "fused_attention": 1}


def test_a_softmax_of_its_own_is_no_fused_attention():
    layers = [
        line("g0", ["BFloat16"], ["a/MatMul_3"]),
        line("soft", ["Float"], ["a/MatMul_3", "a/Softmax_4"], "kgen"),
        line("g1", ["BFloat16"], ["a/MatMul_5"]),
    ]
    found = summary("\n".join(layers), {"a/MatMul_3": 1, "a/MatMul_5": 1})
    assert found == {"layers": 3, "gemm_share": {"bf16": 1.0}, "softmaxes": 1, "fused_attention": 0}


def test_nothing_told_is_nothing_claimed():
    assert summary("", {"a/MatMul_1": 1}) == {"layers": 0, "gemm_share": {}, "softmaxes": 0, "fused_attention": 0}


@pytest.mark.parametrize(
    ("said", "precision"),
    [
        ("Format/Datatype: Row major linear FP16 format", "fp16"),
        ("Datatype: FP8", "fp8"),
        ("Datatype: E4M3", "fp8"),
        ("Format/Datatype: BFloat16", "bf16"),
        ("Datatype: Int32", "unknown"),
    ],
)
def test_types_as_versions_spell_them(said, precision):
    text = f"Name: x, LayerType: gemm, Inputs: [ {{ Name: t, Dimensions: [2, 2], {said} }}], Outputs: []"
    assert parse(text)[0].precision == precision


def test_work_of_a_product_by_hand(model, tmp_path):
    work = product_work(export_onnx(model, tmp_path / "m.onnx"), 4, 32)
    by_layer = {name: value for name, value in work.items() if name.startswith("layer0/")}
    tokens, hidden, wide = 4 * 32, 128, 256
    expected = [tokens * hidden * hidden] * 4 + [tokens * hidden * wide] * 2 + [tokens * 32 * hidden] * 2
    assert sorted(by_layer.values()) == sorted(expected)
    last = [value for name, value in work.items() if name.startswith("layer1/")]
    assert sum(last) < sum(expected), "the last layer computes the first token only"
    assert list(work.values())[-2:] == [4 * hidden * hidden, 4 * hidden * 2], "the head"


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_columns_are_built_in(tmp_path, precision):
    columns = TabularConfig.of(
        numeric=3, log=(2,), indicators=(0,), categorical=(4, 6), multi=7, bins=5, embedding_size=4, hidden_size=8
    )
    graph = export_onnx(tiny_bert(tabular=columns), tmp_path / "m.onnx", precision=precision, ids="int32")
    built = build("tensorrt-rtx", graph, SHAPES)
    assert len(built.engine) > 100_000
    assert "columns" in built.layers

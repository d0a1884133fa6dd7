"""The TensorRT engine against a fake of its library: no GPU runs it here, so what it asks for is what is tested."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bertforge.artifact import hash_file, write_json
from bertforge.batch import PaddedBatch
from bertforge.columns.encoder import TabularConfig
from bertforge.data.loader import Examples
from bertforge.data.tokens import TokenStore
from bertforge.engines.buckets import Bucket
from bertforge.engines.registry import open_engine
from bertforge.engines.run import run
from bertforge.engines.tensorrt_build import VALUES
from bertforge.engines.tensorrt_library import BuiltFor, unfit
from bertforge.engines.tensorrt_run import TensorRtEngine
from bertforge.errors import ArtifactError, MachineError, UsageError
from bertforge.export.bert_onnx import export_onnx
from bertforge.hardware import detect
from tests.engines.fake_tensorrt import GPU, MAGIC, FakeContext, install
from tests.model.tiny import tiny_bert

SHAPES = ((4, 48), (1, 48), (12, 16), (1, 16))
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
H100 = replace(GPU, name="NVIDIA H100", capability=(9, 0))


@pytest.fixture(scope="module")
def model():
    return tiny_bert(vocab_size=100, max_position_embeddings=48, initializer_range=0.2)


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def target(request):
    return request.param


@pytest.fixture
def folder(tmp_path, model, target, monkeypatch):
    """An engine's folder, as compile leaves it, with the library of `target` replaced by a fake."""
    folder = tmp_path / "model" / "engines" / "x"
    graph = export_onnx(model, folder / "model.onnx", ids="int32")
    install(monkeypatch, MODULES[target], graph, SHAPES)
    (folder / "model.engine").write_bytes(MAGIC)
    built = BuiltFor.here(target, GPU, hash_file(graph), SHAPES)
    write_json(folder / "engine.json", {"built_for": built.to_dict()})
    return folder


def opened(folder, target, hardware=GPU):
    engine = open_engine(folder, target, "fp32", hardware)
    assert isinstance(engine, TensorRtEngine)
    return engine


def padded(rows, width, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(width) < rng.integers(1, width + 1, size=rows)[:, None]
    return PaddedBatch(torch.from_numpy(rng.integers(5, 90, size=mask.shape) * mask), torch.from_numpy(mask).long())


@pytest.fixture(autouse=True)
def found_by_registry(monkeypatch):
    """onnx and the fake are there; the registry asks importlib, which knows nothing of an absent real library."""
    monkeypatch.setattr("bertforge.engines.base.util.find_spec", lambda name: True)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 48), (3, 16), (12, 9), (13, 16), (30, 20)])
@torch.no_grad()
def test_batches_of_any_shape_give_the_models_logits(folder, target, model, rows, width):
    engine = opened(folder, target)
    for earlier in (16, 48):  # what it leaves in the buffers changes nothing
        full = torch.ones(13, earlier, dtype=torch.long)
        engine.logits(PaddedBatch(full, full))
    batch = padded(rows, width)
    np.testing.assert_allclose(engine.logits(batch), model(batch).numpy(), atol=1e-5)


def test_rows_go_to_the_smallest_bucket_that_holds_them(folder, target):
    engine = opened(folder, target)
    ran = []
    for bucket, profile in engine.profiles.items():
        profile.run = lambda arrays, bucket=bucket: ran.append(bucket) or np.zeros((len(arrays["input_ids"]), 2))
    for rows, width in ((1, 16), (2, 16), (14, 10), (1, 17), (5, 48)):
        ran.clear()
        assert len(engine.logits(padded(rows, width))) == rows
        expected = {
            (1, 16): [Bucket(1, 16)],
            (2, 16): [Bucket(12, 16)],
            (14, 10): [Bucket(12, 16), Bucket(12, 16)],
            (1, 17): [Bucket(1, 48)],
            (5, 48): [Bucket(4, 48), Bucket(1, 48)],
        }
        assert ran == expected[rows, width]


def test_batches_are_cut_to_fill_the_buckets(folder, target, model):
    engine = opened(folder, target)
    assert engine.shape.edges == (16, 48)
    assert [max(1, engine.shape.tokens // edge) for edge in engine.shape.edges] == [12, 4]
    assert [engine.shape.computed(rows, 20) for rows in (1, 2, 4)] == [48, 4 * 48, 4 * 48], "as its buckets are"
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 60, size=50)
    store = TokenStore(rng.integers(5, 90, size=lengths.sum()), np.concatenate([[0], np.cumsum(lengths)]))
    examples = Examples(store, np.zeros(50, np.int64), 3, 48)
    found = run(engine, examples, np.arange(50))
    with torch.no_grad():
        one_by_one = np.concatenate([model(examples.pack(np.array([row]))[0]).numpy() for row in range(50)])
    np.testing.assert_allclose(found, one_by_one, atol=1e-5)


def test_loading_sets_everything_up_and_a_call_builds_nothing(folder, target, monkeypatch):
    cuda = install(monkeypatch, MODULES[target], folder / "model.onnx", SHAPES)
    engine = opened(folder, target)
    contexts = cuda.engine.contexts
    assert [context.profile for context in contexts] == [0, 1, 2, 3], "one context a profile"
    addresses = [address for context in contexts for address in context.addresses.values()]
    assert len(set(addresses)) == len(addresses), "no two share a buffer"
    warm_up = [["execute", "synchronize", "capture"], ["execute", "synchronize"]][target == "tensorrt-rtx"]
    assert [event[0] if isinstance(event, tuple) else event for event in cuda.events] == warm_up * 4
    cuda.events.clear()
    engine.logits(padded(5, 20))
    engine.logits(padded(1, 3))
    calls = {"tensorrt": ["replay"] * 3, "tensorrt-rtx": [("execute", 0), ("execute", 1), ("execute", 3)]}
    assert cuda.events == calls[target]
    assert len(cuda.engine.contexts) == 4
    engine.close()
    assert not engine.profiles


def test_rtx_compiles_at_once_and_remembers(folder, target, monkeypatch):
    cuda = install(monkeypatch, MODULES[target], folder / "model.onnx", SHAPES)
    opened(folder, target)
    kept = folder / "runtime.cache"
    if target == "tensorrt":
        assert not kept.exists()
        assert all(context.config is None for context in cuda.engine.contexts)
        return
    assert kept.read_bytes() == b"compiled kernels"
    config = cuda.engine.contexts[0].config
    assert config.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE"
    assert config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
    kept.write_bytes(b"of before")
    cuda.events.clear()
    opened(folder, target)
    assert cuda.events[0] == b"of before"
    assert kept.read_bytes() == b"of before"


def test_a_text_past_the_longest_profile_is_one_line(folder, target):
    with pytest.raises(UsageError, match="49 tokens is longer than the engine's longest profile, 48") as error:
        opened(folder, target).logits(padded(1, 49))
    assert "\n" not in str(error.value)


def with_columns(rows, values, seed=0):
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=(rows, 2)).astype(np.float32)
    numbers[::3, 0] = np.nan
    columns = {
        "numeric": numbers,
        "categorical": rng.integers(0, 4, (rows, 1)),
        "multi": rng.integers(0, 7, (rows, values)),
    }
    tensors = {name: torch.from_numpy(array) for name, array in columns.items()}
    return replace(padded(rows, 16, seed), tabular=tensors)


@torch.no_grad()
def test_columns_go_in_beside_the_text_and_too_many_values_are_one_line(folder, target, monkeypatch):
    columns = TabularConfig.of(numeric=2, indicators=(0,), categorical=(4,), multi=7, bins=3, hidden_size=4)
    model = tiny_bert(vocab_size=100, max_position_embeddings=48, initializer_range=0.2, tabular=columns)
    export_onnx(model, folder / "model.onnx", ids="int32")
    install(monkeypatch, MODULES[target], folder / "model.onnx", SHAPES)
    write_json(
        folder / "engine.json",
        {"built_for": BuiltFor.here(target, GPU, hash_file(folder / "model.onnx"), SHAPES).to_dict()},
    )
    engine = opened(folder, target)
    for rows, values in ((13, VALUES), (3, 2), (20, 5)):  # fewer after more: what is left in the buffers is cleared
        batch = with_columns(rows, values, seed=rows)
        np.testing.assert_allclose(engine.logits(batch), model(batch).numpy(), atol=1e-5)
    with pytest.raises(UsageError, match="a row has 33 values under 'multi' and the engine takes 32"):
        engine.logits(with_columns(2, 33))


def test_another_version_or_gpu_is_named_with_the_command(folder, target, monkeypatch):
    again = f"bertforge compile {folder.parent.parent} --target {target} --precision fp32"
    install(monkeypatch, MODULES[target], folder / "model.onnx", SHAPES, version="9.9")
    with pytest.raises(ArtifactError, match=r"built by \S+ 1.7.1, and 9.9 is installed") as error:
        opened(folder, target)
    assert again in str(error.value)
    install(monkeypatch, MODULES[target], folder / "model.onnx", SHAPES)
    other = replace(GPU, name="NVIDIA A10", capability=(8, 6))
    if target == "tensorrt-rtx":
        opened(folder, target, other)  # one engine for all GPUs it supports
        return
    with pytest.raises(ArtifactError, match=r"built for Fake RTX 4090 .*8.9.*, and this is NVIDIA A10 .*8.6") as error:
        opened(folder, target, other)
    assert again in str(error.value)


def test_damaged_files_are_one_line(folder, target):
    (folder / "model.engine").write_bytes(b"no engine")
    with pytest.raises(ArtifactError, match=r"damaged \(Magic tag does not match and more\); build it again") as error:
        opened(folder, target)
    assert "\n" not in str(error.value)
    for broken in ("{", "{}", json.dumps({"built_for": {"target": "x"}})):
        (folder / "engine.json").write_text(broken)
        with pytest.raises(ArtifactError, match=r"engine\.json is missing or damaged"):
            opened(folder, target)


def test_gpus_that_cannot_run_it_are_named(folder, target):
    with pytest.raises(MachineError, match="has no NVIDIA GPU"):
        opened(folder, target, replace(GPU, capability=None))
    if target == "tensorrt-rtx":
        with pytest.raises(MachineError, match=r"8.0, 8.6, 8.9 and 12.x, not on NVIDIA H100 .*9.0.*--target tensorrt"):
            opened(folder, target, H100)
    supported = {
        capability: unfit("tensorrt-rtx", replace(GPU, capability=capability)) is None
        for capability in ((7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1))
    }
    assert [capability for capability, runs in supported.items() if runs] == [(8, 0), (8, 6), (8, 9), (12, 0), (12, 1)]
    assert unfit("tensorrt", H100) is None


def test_what_the_library_refuses_is_said(folder, target, monkeypatch):
    install(monkeypatch, MODULES[target], folder / "model.onnx", SHAPES)
    monkeypatch.setattr("tests.engines.fake_tensorrt.FakeContext.set_input_shape", lambda *arguments: False)
    with pytest.raises(ArtifactError, match="would not take input_ids of shape"):
        opened(folder, target)


class SummingContext(FakeContext):
    """On a real GPU: sums what stands in the buffers, on the stream it is told, so that graphs can record it."""

    def set_optimization_profile_async(self, index, stream):
        self.profile = index
        return True

    def execute_async_v3(self, stream):
        def tensor(name, shape, kind):
            memory = {"shape": tuple(shape), "typestr": kind, "data": (self.addresses[name], False), "version": 3}
            return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=memory), device="cuda")

        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            ids, mask = (tensor(name, self.shapes[name], "<i4") for name in ("input_ids", "attention_mask"))
            logits = tensor("logits", self.get_tensor_shape("logits"), "<f4")
            logits[:, 0] = (ids * mask).sum(1)
            logits[:, 1] = mask.sum(1)
        return True


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_buffers_streams_and_graphs_on_a_real_gpu(tmp_path, model, monkeypatch):
    graph = export_onnx(model, tmp_path / "model.onnx", ids="int32")
    real = replace(detect(), capability=(8, 9))
    install(monkeypatch, "tensorrt", graph, SHAPES)
    monkeypatch.setattr("bertforge.engines.tensorrt_run.cuda", torch.cuda)
    monkeypatch.setattr("tests.engines.fake_tensorrt.FakeContext", SummingContext)
    (tmp_path / "model.engine").write_bytes(MAGIC)
    built = BuiltFor.here("tensorrt", real, hash_file(graph), SHAPES)
    write_json(tmp_path / "engine.json", {"built_for": built.to_dict()})
    engine = opened(tmp_path, "tensorrt", real)
    for rows, width in ((1, 3), (13, 16), (30, 20), (2, 48), (30, 20)):
        batch = padded(rows, width, seed=rows)
        expected = torch.stack([batch.input_ids.sum(1), batch.attention_mask.sum(1)], 1).float()
        np.testing.assert_array_equal(engine.logits(batch), expected.numpy())
    engine.close()

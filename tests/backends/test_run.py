"""Rows go through any backend once, grouped as it likes, and come back in the caller's order."""

import ctypes
import dataclasses

import numpy as np
import pytest
import torch

from bertforge.backends.base import BatchShape
from bertforge.backends.onnxruntime import OnnxRuntimeBackend
from bertforge.backends.openvino import OpenVinoBackend
from bertforge.backends.pytorch import PyTorchBackend
from bertforge.backends.run import batch_of, group, run
from bertforge.data.loader import Examples
from bertforge.data.tokens import TokenStore
from bertforge.errors import ArtifactError
from bertforge.export.bert_onnx import export_onnx
from bertforge.hardware import detect
from tests.model.tiny import tiny_bert


@pytest.fixture(scope="module")
def model():
    return tiny_bert(vocab_size=100, max_position_embeddings=64, initializer_range=0.2)


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 60, size=80)
    ids = rng.integers(5, 90, size=lengths.sum()).astype(np.uint16)
    return Examples(TokenStore(ids, np.concatenate([[0], np.cumsum(lengths)])), np.zeros(80, np.int64), 3, 48)


@pytest.fixture(scope="module", params=["pytorch", "onnxruntime", "openvino"])
def backend(request, model, tmp_path_factory):
    if request.param == "pytorch":
        return PyTorchBackend(model, detect(), "fp32")
    path = export_onnx(model, tmp_path_factory.mktemp("graph") / "m.onnx")
    return {"onnxruntime": OnnxRuntimeBackend, "openvino": OpenVinoBackend}[request.param](path, detect(), "fp32")


@pytest.mark.parametrize("shape", [None, BatchShape(tokens=1, rows=1), BatchShape(tokens=300, multiple=16)], ids=str)
def test_every_backend_gives_the_models_logits_in_the_callers_order(backend, model, examples, shape):
    rows = np.random.default_rng(1).permutation(80)[:50]
    told = []
    found = run(backend, examples, rows, shape=shape, advance=told.append)
    with torch.no_grad():
        one_by_one = np.concatenate([model(examples.pack(rows[i : i + 1])[0]).numpy() for i in range(len(rows))])
    np.testing.assert_allclose(found, one_by_one, atol=2e-5)
    assert sum(told) == len(rows)
    assert np.abs(found - found[::-1]).max() > 1e-3, "rows differ, so their order is seen"


def test_groups_hold_every_place_once_and_keep_to_the_shape():
    lengths = np.random.default_rng(0).integers(1, 100, size=200)
    for shape in (BatchShape(256), BatchShape(256, rows=3), BatchShape(256, multiple=16), BatchShape(1)):
        groups = group(lengths, shape)
        assert sorted(np.concatenate(groups).tolist()) == list(range(200))
        for places in groups:
            width = -(-lengths[places].max() // shape.multiple) * shape.multiple
            assert len(places) == 1 or width * len(places) <= shape.tokens
            assert len(places) <= (shape.rows or 200)


def test_padding_goes_to_a_multiple_but_not_past_the_longest_text(examples):
    longest = int(np.argmax(examples.lengths(np.arange(80))))
    shortest = int(np.argmin(examples.lengths(np.arange(80))))
    shape = BatchShape(tokens=1, multiple=32)
    assert batch_of(examples, np.array([shortest]), False, shape).input_ids.shape == (1, 32)
    assert batch_of(examples, np.array([longest]), False, shape).input_ids.shape == (1, 48)


def test_a_question_alone_has_every_core_in_openvino_and_a_batch_a_core_each(model, examples, tmp_path):
    machine = dataclasses.replace(detect(), cores=2)
    backend = OpenVinoBackend(export_onnx(model, tmp_path / "m.onnx"), machine, "fp32")
    assert [compiled.get_property("NUM_STREAMS") for compiled in (backend.compiled, backend.alone)] == [2, 1]
    assert backend.alone.get_property("INFERENCE_NUM_THREADS") == 2
    both = batch_of(examples, np.array([0, 1]), False, backend.shape)
    one = batch_of(examples, np.array([0]), False, backend.shape)
    np.testing.assert_allclose(backend.logits(one)[0], backend.logits(both)[0], atol=2e-5)
    assert set(vars(backend.requests)) == {"alone", "compiled"}, "each was used"


def test_signals_of_the_main_thread_keep_their_stack(model, tmp_path):
    class Stack(ctypes.Structure):
        _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

    def size():
        stack = Stack()
        ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
        return stack.size

    before = size()
    OpenVinoBackend(export_onnx(model, tmp_path / "m.onnx"), detect(), "fp32")
    assert size() == before, "see data.streaming.in_a_thread"


@pytest.mark.parametrize("kind", [OnnxRuntimeBackend, OpenVinoBackend])
def test_a_damaged_file_is_one_line(tmp_path, kind):
    path = tmp_path / ("model.onnx" if kind is OnnxRuntimeBackend else "model.xml")
    path.write_bytes(b"not a model")
    with pytest.raises(ArtifactError, match="compile it again: bertforge compile") as error:
        kind(path, detect(), "fp32")
    assert "\n" not in str(error.value)

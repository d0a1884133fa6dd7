"""Rows go through any engine once, grouped as it likes, and come back in the caller's order."""

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch

from bertforge.columns.encoder import TabularConfig
from bertforge.data.loader import Examples
from bertforge.data.tokens import TokenStore
from bertforge.engines.base import BatchShape
from bertforge.engines.pytorch import PyTorchEngine, bfloat16_copy
from bertforge.engines.registry import check_target, open_engine
from bertforge.engines.run import batch_of, group, padding_waste, run, run_each
from bertforge.errors import ArtifactError, MachineError
from bertforge.hardware import detect
from tests.engines.building import built
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
def engine(request, model, tmp_path_factory):
    if request.param == "pytorch":
        return PyTorchEngine(model, detect(), "fp32")
    return built(request.param, model, tmp_path_factory.mktemp("engine"))


@pytest.mark.parametrize("shape", [None, BatchShape(tokens=1, rows=1), BatchShape(tokens=300, multiple=16)], ids=str)
def test_every_engine_gives_the_models_logits_in_the_callers_order(engine, model, examples, shape):
    rows = np.random.default_rng(1).permutation(80)[:50]
    told = []
    found = run(engine, examples, rows, shape=shape, advance=told.append)
    with torch.no_grad():
        one_by_one = np.concatenate([model(examples.pack(rows[i : i + 1])[0]).numpy() for i in range(len(rows))])
    np.testing.assert_allclose(found, one_by_one, atol=2e-5)
    assert sum(told) == len(rows)
    assert np.abs(found - found[::-1]).max() > 1e-3, "rows differ, so their order is seen"


@pytest.mark.parametrize("kind", ["pytorch", "onnxruntime", "openvino"])
def test_columns_go_with_their_rows(examples, kind, tmp_path):
    model = tiny_bert(
        vocab_size=100,
        max_position_embeddings=64,
        tabular=TabularConfig.of(numeric=1, indicators=(0,), categorical=(4,), hidden_size=4),
    )
    rng = np.random.default_rng(0)
    numeric = rng.normal(size=(80, 1)).astype(np.float32)
    numeric[::7] = np.nan
    columns = {"numeric": numeric, "categorical": rng.integers(0, 4, (80, 1))}
    given = replace(examples, tabular=columns)
    engine = PyTorchEngine(model, detect(), "fp32")
    if kind != "pytorch":
        engine = built(kind, model, tmp_path)
    rows = rng.permutation(80)[:50]
    found = run(engine, given, rows, shape=BatchShape(tokens=300, multiple=16))
    with torch.no_grad():
        one_by_one = np.concatenate([model(given.pack(rows[i : i + 1])[0]).numpy() for i in range(len(rows))])
    np.testing.assert_allclose(found, one_by_one, atol=2e-5)
    shifted = {name: np.roll(array, 1, axis=0) for name, array in columns.items()}
    shifted = run(engine, replace(examples, tabular=shifted), rows)
    assert np.abs(found - shifted).max() > 1e-2


def test_lots_come_back_in_turn_and_the_next_one_is_under_way(model, examples):
    engine, drawn = PyTorchEngine(model, detect(), "fp32"), []
    lots = [np.arange(start, start + 8) for start in range(0, 80, 8)]

    def given():
        for key, rows in enumerate(lots):
            drawn.append(key)
            yield key, examples, rows

    with closing(run_each(engine, given(), shape=BatchShape(tokens=100))) as results:
        found = [next(results)]
        assert drawn == [0, 1]
        found += results
    assert [key for key, _ in found] == list(range(10))
    together = run(engine, examples, np.arange(80))
    np.testing.assert_allclose(np.concatenate([logits for _, logits in found]), together, atol=2e-5)


def test_what_is_left_after_an_error_is_not_computed(model, examples):
    begun = []

    class Failing(PyTorchEngine):
        def logits(self, batch):
            begun.append(len(batch))
            if len(begun) == 1:
                raise MachineError("the device is gone")
            time.sleep(0.05)  # all 80 would take 4 s
            return super().logits(batch)

    with pytest.raises(MachineError, match="the device is gone"):
        run(Failing(model, detect(), "fp32"), examples, np.arange(80), shape=BatchShape(tokens=1))
    assert len(begun) < 80


def test_groups_hold_every_place_once_and_keep_to_the_shape():
    lengths = np.random.default_rng(0).integers(1, 100, size=200)
    for shape in (BatchShape(256), BatchShape(256, rows=3), BatchShape(256, multiple=16), BatchShape(1)):
        groups = group(lengths, shape, packed=False)
        assert sorted(np.concatenate(groups).tolist()) == list(range(200))
        for places in groups:
            width = -(-lengths[places].max() // shape.multiple) * shape.multiple
            assert len(places) == 1 or width * len(places) <= shape.tokens
            assert len(places) <= (shape.rows or 200)


def test_packed_groups_are_as_full_as_their_rows_allow():
    lengths = np.random.default_rng(0).integers(1, 100, size=200)
    for shape in (BatchShape(256), BatchShape(256, rows=3), BatchShape(1)):
        groups = group(lengths, shape, packed=True)
        assert sorted(np.concatenate(groups).tolist()) == list(range(200))
        for places, after in zip(groups, [*groups[1:], None], strict=True):
            tokens = lengths[places].sum()
            assert len(places) == 1 or tokens <= shape.tokens
            full = after is None or tokens + lengths[after[0]] > shape.tokens
            assert full or len(places) == shape.rows


def test_padding_waste_by_hand():
    lengths = np.array([3, 1, 2, 10])
    assert padding_waste(lengths, True, BatchShape(8)) == 0
    # (10), (3, 2, 1) in packs of 8 tokens, filled up to 12 and 8
    assert padding_waste(lengths, True, BatchShape(8, edges=(4, 8, 12))) == pytest.approx(20 / 16 - 1)
    assert padding_waste(lengths, False, BatchShape(1)) == 0
    # (10), (3, 2), (1) in batches of 8 tokens: 10 + 6 + 1 computed for 16
    assert padding_waste(lengths, False, BatchShape(8, rows=2)) == pytest.approx(17 / 16 - 1)


def test_rows_that_a_fixed_shape_adds_are_padding_too():
    lengths = np.array([3, 4, 10, 7, 2])
    shape = BatchShape(30, edges=(4, 10))
    # (10, 7, 4) at 10 tokens, (3, 2) at 4 tokens: 30 + 8 computed for 26
    assert padding_waste(lengths, False, shape) == pytest.approx(38 / 26 - 1)
    # seven rows of 4 tokens fit into 30
    assert padding_waste(lengths, False, replace(shape, filled=True)) == pytest.approx(58 / 26 - 1)
    assert padding_waste(lengths[:1], False, replace(shape, filled=True)) == pytest.approx(4 / 3 - 1), "a row alone"


def test_padding_goes_to_a_multiple_but_not_past_the_longest_text(examples):
    longest = int(np.argmax(examples.lengths(np.arange(80))))
    shortest = int(np.argmin(examples.lengths(np.arange(80))))
    shape = BatchShape(tokens=1, multiple=32)
    assert batch_of(examples, np.array([shortest]), False, shape).input_ids.shape == (1, 32)
    assert batch_of(examples, np.array([longest]), False, shape).input_ids.shape == (1, 48)


def test_a_question_alone_has_every_core_in_openvino_and_a_batch_a_core_each(model, examples, tmp_path):
    engine = built("openvino", model, tmp_path, hardware=replace(detect(), cores=2))

    def streams(requests):
        request = requests.get()
        requests.put(request)
        return request.get_compiled_model().get_property("NUM_STREAMS")

    assert (streams(engine.requests), streams(engine.alone)) == (2, 1)
    assert (engine.requests.qsize(), engine.alone.qsize()) == (2, 1)
    both = batch_of(examples, np.array([0, 1]), False, engine.shape)
    one = batch_of(examples, np.array([0]), False, engine.shape)
    expected = engine.logits(both)[0]
    engine.requests = None  # so that a question alone cannot have used it
    np.testing.assert_allclose(engine.logits(one)[0], expected, atol=2e-5)


class Watched:
    """A request that says how many streams its model has, and waits until another call is under way."""

    def __init__(self, request, used, together):
        self.request, self.used, self.together = request, used, together

    def infer(self, arrays):
        self.used.append(self.request.get_compiled_model().get_property("NUM_STREAMS"))
        self.together.wait(timeout=20)  # raises when the other call waits for this one's request
        return self.request.infer(arrays)


def test_single_rows_that_come_together_do_not_wait_for_one_request(model, examples, tmp_path):
    engine = built("openvino", model, tmp_path, hardware=replace(detect(), cores=2))
    used, together = [], Barrier(3)
    for requests in (engine.requests, engine.alone):
        for _ in range(requests.qsize()):
            requests.put(Watched(requests.get(), used, together))
    batches = [batch_of(examples, np.array([row]), False, engine.shape) for row in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = np.concatenate(list(pool.map(engine.logits, batches)))
    assert sorted(used) == [1, 2, 2], "the first came alone"
    engine.alone.get()
    engine.alone.put(Watched(engine.single.create_infer_request(), used, Barrier(1)))
    np.testing.assert_allclose(engine.logits(batches[0])[0], found[0], atol=2e-5)
    assert used[3:] == [1], "alone again"


def test_signals_of_the_main_thread_keep_their_stack(model, tmp_path):
    class Stack(ctypes.Structure):
        _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

    def size():
        stack = Stack()
        ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
        return stack.size

    before = size()
    built("openvino", model, tmp_path)
    assert size() == before, "see data.streaming.in_a_thread"


@pytest.mark.parametrize(("kind", "file"), [("onnxruntime", "model.onnx"), ("openvino", "model.xml")])
def test_a_damaged_file_is_one_line(tmp_path, kind, file):
    (tmp_path / file).write_bytes(b"not a model")
    with pytest.raises(ArtifactError, match="compile it again: bertforge compile") as error:
        open_engine(tmp_path, kind, "fp32", replace(detect(), device=torch.device("cpu")))
    assert "\n" not in str(error.value)


def test_tensors_bound_by_address_give_what_arrays_give(model, examples, tmp_path):
    engine = built("onnxruntime", model, tmp_path)
    batch = batch_of(examples, np.arange(7), False, engine.shape)
    bound = engine.bound({"input_ids": batch.input_ids, "attention_mask": batch.attention_mask})
    np.testing.assert_array_equal(bound.numpy(), engine.logits(batch))
    assert len(np.unique(bound.numpy())) > 7


def test_a_bfloat16_copy_computes_what_the_model_does_and_leaves_it_alone(model, examples):
    batch, _ = examples.pack(np.arange(20))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        exact, found = model(batch), bfloat16_copy(model)(batch)
    assert found.dtype == torch.float32, "the head is in float32"
    difference = (found - exact).abs().max()
    assert 1e-5 < difference < 0.05, "rounded to bfloat16, and no more"
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name]), name


def test_calls_of_many_sizes_give_a_cpu_few_shapes_to_prepare_kernels_for():
    """A kernel is kept for every shape, so they are what memory grows by."""
    model = tiny_bert(vocab_size=100, max_position_embeddings=512, initializer_range=0.2)
    shapes = set()
    for linear in (module for module in model.modules() if isinstance(module, torch.nn.Linear)):
        linear.register_forward_pre_hook(lambda linear, inputs: shapes.add(inputs[0].shape))
    engine = PyTorchEngine(model, replace(detect(), device=torch.device("cpu")), "fp32")
    rng = np.random.default_rng(0)
    found = {}
    for filled in (True, False):
        shapes.clear()
        for length in range(2, 502, 2):
            lengths = np.full(length if length < 80 else 1 + length % 5, length)
            store = TokenStore(rng.integers(5, 90, size=lengths.sum()).astype(np.uint16), np.r_[0, np.cumsum(lengths)])
            batch, _ = Examples(store, np.zeros(len(lengths), np.int64), 3, 512).pack(np.arange(len(lengths)))
            if filled:
                assert engine.logits(batch).shape == (len(lengths), 2)
            else:
                with torch.inference_mode():
                    model(batch)
        found[filled] = len({shape for shape in shapes if len(shape) == 2})
    assert found[False] > 400, "without filling there are as many as calls"
    assert found[True] < 150


def test_a_precision_of_other_devices_is_refused_with_the_command_to_use():
    cpu = detect()
    gpu = replace(cpu, device=torch.device("cuda", 0), name="NVIDIA H100")
    with pytest.raises(
        MachineError, match="not in fp16; bertforge compile MODEL --target onnxruntime --precision int8"
    ):
        check_target("onnxruntime", "fp16", replace(cpu, device=torch.device("cpu")))
    with pytest.raises(MachineError, match=r"fp32 or fp16 on NVIDIA H100, not in int8; .* --precision fp16") as error:
        open_engine(Path("engine"), "onnxruntime", "int8", gpu)
    assert "\n" not in str(error.value)
    assert check_target("onnxruntime", "fp16", gpu).name == "onnxruntime"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_openvino_is_refused_where_the_device_is_a_gpu(precision):
    gpu = replace(detect(), device=torch.device("cuda", 0), name="NVIDIA H100")
    with pytest.raises(MachineError, match=r"openvino cannot .* it runs on a CPU, and the device here is NVI") as error:
        check_target("openvino", precision, gpu)
    assert "\n" not in str(error.value)
    assert check_target("openvino", precision, replace(gpu, device=torch.device("cpu"))).name == "openvino"

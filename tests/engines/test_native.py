"""The native engine: what it refuses, what is built without a GPU, and on a GPU the whole way."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from bertforge.data.prepared import PreparedData
from bertforge.engines import native
from bertforge.engines.base import BatchShape
from bertforge.engines.native import ExactEngine, _Watched, run_once
from bertforge.engines.receipt import describe
from bertforge.engines.registry import check_target
from bertforge.engines.run import run
from bertforge.errors import ArtifactError, MachineError, UsageError
from bertforge.hardware import detect
from bertforge.inference.predictor import Predictor
from bertforge.jobs.compile import compile_model, verify_engine
from bertforge.manifest import read_manifest
from bertforge.native.network import Network
from bertforge.native.plain import PlainOperations
from bertforge.native.weights import NativeWeights
from bertforge.proof import structure
from bertforge.proof.gate import Reference
from bertforge.proof.golden import GoldenRows
from bertforge.proof.simulation import layers_of
from bertforge.proof.tolerances import STRUCTURE
from bertforge.quantize.ranges import find_ranges
from bertforge.training.finetune import finetune
from tests.engines.building import CPU, built
from tests.native.models import adapted, model, pack, ranges
from tests.runs import made_up, make_base, prepare_frame, quick_recipe

GPU = replace(detect(), device=torch.device("cuda"), name="Some GPU", bf16=True, capability=(8, 6))
needs_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with all types"
)
TEXTS = ["How do I sort a list?", "Which laptop is best?", "why " * 300, "x"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Runs whose heads the kernels compute, one of text alone and one with columns, and their data."""
    folder = tmp_path_factory.mktemp("wide")
    base = make_base(folder / "base", hidden_size=64, intermediate_size=96)
    data = prepare_frame(made_up(160), folder / "data", base)
    for kind in ("full", "columns"):
        finetune(data, folder / kind, quick_recipe(base, kind, epochs=1))
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def test_a_gpu_that_lacks_the_type_is_told_which_it_has():
    with pytest.raises(MachineError, match="native computes in bf16 or int8 on Some GPU, not in fp8"):
        check_target("native", "fp8", GPU)
    assert native.TARGET.unfit(GPU) is None
    why = native.TARGET.unfit(replace(GPU, capability=(7, 5)))
    assert why == "it needs a GPU of compute capability 8.0 (Ampere) or later, and Some GPU has 7.5"
    assert f"the device here is {CPU.name}" in native.TARGET.unfit(replace(CPU, capability=None))


def test_a_driver_that_is_too_old_is_the_reason(monkeypatch):
    def refuse():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update it. More.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", refuse)
    assert "(The NVIDIA driver on your system is too old (found version 11040))" in native.TARGET.unfit(
        replace(CPU, capability=None)
    )


def test_a_model_that_the_kernels_do_not_compute_is_refused(tmp_path, runs, data):
    with pytest.raises(UsageError, match=r"heads of 32 or 64 .* this model has heads of 8, .*another --target"):
        compile_model(runs["full"], "native", "bf16", data, tmp_path / "engine")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("kind", ["full", "columns"])
def test_what_is_built_without_a_gpu_is_the_model_and_waits_for_its_proof(wide, tmp_path, kind, precision):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    engine = tmp_path / "engine"
    receipt = compile_model(wide / kind, "native", precision, wide / "data", engine)
    assert not receipt["verified"]
    assert "it runs on an NVIDIA GPU" in receipt["not_verified"]
    manifest = read_manifest(engine, "engine")
    golden, predictor = GoldenRows.from_dict(manifest["golden"]), Predictor.load(wide / kind, "fp32")
    network = predictor.engine.model
    found = run(ExactEngine(engine, precision, CPU), golden.examples, np.arange(len(golden.logits)))
    # The weights are rounded: so far off are logits of a tiny model by that alone.
    assert np.abs(found - golden.logits).max() < 0.2 * golden.logits.std() + 0.02
    assert network.config.tabular == NativeWeights.load(engine, torch.device("cpu")).config.tabular
    with pytest.raises(ArtifactError, match="is not verified"):
        Predictor.load(engine)
    with pytest.raises(MachineError, match="cannot run here: it runs on an NVIDIA GPU"):
        verify_engine(wide / kind, engine, wide / "data")


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_probes_with_nothing_rounded_see_every_part(tmp_path, form):
    """A head that is lost, a scale, a position: each is more than what is allowed."""
    bert = model()
    scales = ranges(bert, form)
    engine = built("native", bert, tmp_path, form, scales=scales, exact=True)
    healthy = engine.logits(pack())
    spread = float(healthy.std())

    def moved(change):
        engine.network = Network(NativeWeights.load(tmp_path, torch.device("cpu")), PlainOperations(rounding=False))
        change(engine.network.weights)
        engine.network = Network(engine.network.weights, engine.network.operations)
        return float(np.abs(engine.logits(pack()) - healthy).max()) / spread

    assert moved(lambda weights: None) == 0
    assert moved(lambda weights: weights.layers[1].attended.multiplier[:32].zero_()) > STRUCTURE, "a head"
    assert moved(lambda weights: weights.layers[0].up.scale[3].mul_(1.05)) > STRUCTURE, "a channel's scale"
    assert moved(lambda weights: weights.layers[1].qkv.scale[:64].mul_(1.05)) > STRUCTURE, "the queries' scale"
    assert moved(lambda weights: weights.places.copy_(weights.places.roll(1, 0))) > STRUCTURE, "positions"


def test_the_receipt_tells_what_is_launched(tmp_path):
    bert = model()
    spared = ["bert.encoder.layer.0.intermediate.dense"]
    weights = NativeWeights.of(bert, ranges(bert, "int8", but=spared))
    watched = _Watched(PlainOperations(rounding=True))
    run_once(Network(weights, watched), pack((32, 20)))
    found = describe(watched.products, "int8", 52)
    linear = [product for product in watched.products if not product.attention]
    assert len(linear) == 4 + 4 + 5 + 1, "the last layer has queries apart, and a pooler follows"
    up = 52 * 64 * 96
    whole = sum(product.multiply_adds for product in linear)
    wide = up + 2 * 64 * 64
    assert found["linear_shares"] == pytest.approx({"int8": 1 - wide / whole, "bf16": wide / whole})
    assert found["attention_shares"] == {"bf16": 1}
    assert found["attention_fused"]


def test_columns_must_be_there(wide, tmp_path):
    predictor = Predictor.load(wide / "columns", "fp32")
    engine = built("native", predictor.engine.model, tmp_path, "bf16", exact=True)
    with pytest.raises(UsageError, match=r"reads columns beside the text.*batch\.tabular"):
        engine.logits(pack((3,)))


@needs_a_gpu
@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("kind", ["full", "columns"])
def test_on_a_gpu_it_proves_itself_and_answers(wide, tmp_path, kind, precision):
    engine = tmp_path / "engine"
    receipt = compile_model(wide / kind, "native", precision, wide / "data", engine)
    assert receipt["verified"]
    assert receipt["structure"]["largest_difference"] < receipt["structure"]["limit"]
    assert receipt["products"]["linear_shares"][precision] > 0.9 or receipt["spared"]
    assert receipt["products"]["attention_fused"]
    predictor, plain = Predictor.load(engine), Predictor.load(wide / kind, "fp32")
    prepared = PreparedData.open(wide / "data")
    rows = np.arange(len(prepared))
    found, wanted = (run(each.engine, each.examples(prepared, rows), rows) for each in (predictor, plain))
    assert np.abs(found - wanted).max() < 0.5 * wanted.std() + 0.05
    one = run(predictor.engine, predictor.examples(prepared, rows), rows, shape=BatchShape(tokens=1))
    assert np.abs(found - one).max() < 0.1 * wanted.std() + 0.02, "alone as in a pack"
    predictor.close()
    predictor.close()
    with pytest.raises(UsageError, match="this engine was closed; load it again"):
        run(predictor.engine, predictor.examples(prepared, rows), rows)


@needs_a_gpu
def test_on_a_gpu_many_threads_get_their_own_answers(wide, tmp_path):
    compile_model(wide / "full", "native", "bf16", wide / "data", tmp_path / "engine")
    predictor = Predictor.load(tmp_path / "engine")
    alone = [predictor.logits([text]) for text in TEXTS]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda place: predictor.logits([TEXTS[place % 4]]), range(400)))
    for place, logits in enumerate(found):
        assert np.array_equal(logits, alone[place % 4])


@needs_a_gpu
def test_on_a_gpu_models_of_one_base_take_turns_in_one_engine(tmp_path):
    models = [adapted(1), adapted(2, ("query", "value", "dense")), model()]
    engines = [built("native", bert, tmp_path / str(i), "bf16", hardware=detect()) for i, bert in enumerate(models)]
    wanted = [engine.logits(pack()) for engine in engines]
    assert np.abs(wanted[0] - wanted[1]).max() > 0.1
    together = [*(engines[2].beside(bert) for bert in models[:2]), engines[2]]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda place: together[place % 3].logits(pack()), range(300)))
    for place, logits in enumerate(found):
        assert np.array_equal(logits, wanted[place % 3])


@needs_a_gpu
def test_without_memory_the_error_says_so(wide, tmp_path):
    compile_model(wide / "full", "native", "bf16", wide / "data", tmp_path / "engine")
    torch.cuda.empty_cache()
    free, whole = torch.cuda.mem_get_info()
    taken = torch.empty(free - 2**25, dtype=torch.uint8, device="cuda")  # this small model's engine takes 100 MB
    with pytest.raises(MachineError, match=r"does not fit into the memory of .* GB are free"):
        Predictor.load(tmp_path / "engine")
    assert len(taken) < whole


def test_a_text_may_be_empty(wide, tmp_path):
    """[CLS] and [SEP] alone."""
    engine = built("native", model(), tmp_path, "bf16", exact=True)
    assert np.isfinite(engine.logits(pack((2, 1)))).all()


def test_golden_probes_hold(wide, tmp_path):
    """The structural proof itself, as `compile` runs it on a GPU."""
    predictor = Predictor.load(wide / "full", "fp32")
    bert, golden = predictor.engine.model, GoldenRows.from_dict(predictor.manifest["golden"])
    for precision in ("bf16", "int8"):
        folder = tmp_path / precision
        folder.mkdir()
        rows = np.arange(len(golden.logits))
        scales = find_ranges(bert, "int8", golden.examples, rows, rows) if precision == "int8" else None
        engine = built("native", bert, folder, precision, scales=scales, exact=True)
        layers = tuple(layers_of(bert, scales)) if scales else ()
        reference = Reference(bert, golden, precision, "bf16", layers, scales, stores="bf16")
        asked = structure.probes(golden, bert.config)
        found = structure.compare(engine, asked, reference.stored(asked, np.arange(len(asked.labels))))
        assert found.holds, found
        plain = Reference(bert, golden, precision, "bf16", layers, scales)  # as if its files held float32
        assert not structure.compare(engine, asked, plain.stored(asked, np.arange(len(asked.labels)))).holds

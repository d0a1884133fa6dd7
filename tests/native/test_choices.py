"""How products are computed: what is known of a GPU, what is measured on another, and where it is kept."""

import json
import math

import pytest

from bertforge.errors import MachineError
from bertforge.native import choices as module
from bertforge.native.choices import MEASURED, SIZES, Choices, products
from bertforge.native.weights import Linear, NativeWeights
from tests.native.models import model, ranges


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "bertforge" / "Some-GPU.json"


def copied(form):
    bert = model()
    return NativeWeights.of(bert, form and ranges(bert, form))


@pytest.fixture(scope="module", params=[None, "int8", "fp8"])
def weights(request):
    return copied(request.param)


def measured(choices, weights, seconds=lambda *of: 1.0):
    return choices.with_measured(choices.unmeasured(weights), seconds)


def test_every_product_of_a_model_is_among_them(weights):
    named = [linear for _, linear in products(weights)]
    held = [value for layer in weights.layers for value in vars(layer).values() if isinstance(value, Linear)]
    assert sorted(map(id, named)) == sorted(map(id, [*held, weights.pooler]))


@pytest.mark.parametrize("device", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
def test_hopper_is_known_for_every_type(device, weights):
    assert not Choices.known(device).unmeasured(weights)


def test_an_unknown_gpu_has_a_choice_for_everything_all_the_same(weights):
    unknown = Choices.known("Some GPU")
    assert unknown.unmeasured(weights) == list(products(weights))
    for kind, linear in products(weights):
        assert all(unknown.of(kind, linear, tokens) or kind == "product" for tokens in MEASURED)


def test_what_was_measured_is_kept_beside_what_was_before(weights, cache):
    before = measured(Choices.known("Some GPU"), copied(None))
    before.keep()
    asked = []
    after = measured(Choices.known("Some GPU"), weights, lambda *of: asked.append(of) or 1.0)
    after.keep()
    assert {linear.form for _, linear, *_ in asked} <= {"int8", "fp8"}, "nothing is measured again"
    assert Choices.known("Some GPU") == after
    assert before.found.items() <= after.found.items()
    assert not after.unmeasured(weights)


@pytest.mark.parametrize("damage", ["{", "[]", '{"product bf16": [1]}', '{"product bf16": [[1], [2], [3]]}'])
def test_a_cache_that_cannot_be_read_is_none(cache, damage):
    cache.parent.mkdir(parents=True)
    cache.write_text(damage)
    assert Choices.known("Some GPU").found == {}
    cache.write_text(json.dumps({"product bf16": [None] * 3}))
    assert Choices.known("Some GPU").found == {"product bf16": [None] * 3}


def test_the_fastest_is_taken_at_each_size(weights):
    ways = module._NARROW

    def seconds(kind, linear, tokens, choice):
        return 0.5 if choice == ways[MEASURED.index(tokens)] else 1.0

    found = measured(Choices.known("Some GPU"), weights, seconds)
    for kind, linear in products(weights):
        assert [found.of(kind, linear, size) for size in (1, SIZES[0] + 1, 10**6)] == list(ways[:3])
        assert found.of(kind, linear, SIZES[0]) == ways[0]


def test_what_runs_in_no_way_is_an_error(weights):
    with pytest.raises(MachineError, match=r"Some GPU computes no product .* --precision"):
        measured(Choices.known("Some GPU"), weights, lambda *of: math.inf)


def test_integers_and_activations_are_never_left_to_cublas():
    """It leaves 32-bit numbers in memory, and knows no activation."""
    asked = []
    measured(Choices.known("Some GPU"), copied("int8"), lambda *of: asked.append(of) or 1.0)
    assert asked
    assert all(choice is not None for *_, choice in asked)

"""How products are computed: what is known of a GPU, what is measured on another, and where it is kept."""

import math

import pytest

from bertforge.errors import MachineError
from bertforge.native import choices as module
from bertforge.native.choices import MEASURED, SIZES, Choices, measure, products
from bertforge.native.weights import NativeWeights
from tests.native.models import model, ranges


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module", params=[None, "int8", "fp8"])
def weights(request):
    bert = model()
    return NativeWeights.of(bert, request.param and ranges(bert, request.param))


@pytest.mark.parametrize("device", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
def test_hopper_is_known_for_every_type(device, weights):
    assert Choices.known(device).covers(weights)


def test_an_unknown_gpu_gets_what_runs_everywhere(weights):
    assert Choices.known("Some GPU") is None
    assert Choices.best_known("Some GPU").covers(weights)


def test_what_was_measured_is_found_again(weights):
    found = measure(weights, "Some GPU", lambda kind, linear, tokens, choice: 1.0)
    found.keep()
    assert Choices.known("Some GPU") == found


def test_the_fastest_is_taken_at_each_size(weights):
    ways = module._CANDIDATES["few"]

    def seconds(kind, linear, tokens, choice):
        return 0.5 if choice == ways[MEASURED.index(tokens)] else 1.0

    found = measure(weights, "Some GPU", seconds)
    for kind, linear in products(weights):
        assert [found.of(kind, linear, size) for size in (1, SIZES[0] + 1, 10**6)] == list(ways[:3])
        assert found.of(kind, linear, SIZES[0]) == ways[0]


def test_what_runs_in_no_way_is_an_error(weights):
    with pytest.raises(MachineError, match=r"Some GPU computes no product .* --precision"):
        measure(weights, "Some GPU", lambda kind, linear, tokens, choice: math.inf)


def test_integers_are_never_left_to_cublas():
    """It leaves 32-bit numbers in memory."""
    bert = model()
    asked = []
    measure(NativeWeights.of(bert, ranges(bert, "int8")), "", lambda *of: asked.append(of) or 1.0)
    assert asked
    assert all(choice is not None for *_, choice in asked)

"""Sizes of packs, how a pack is laid out in one, and on a GPU, that graphs answer as the operations do."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from bertforge.engines.native import run_once
from bertforge.errors import UsageError
from bertforge.native.choices import Choices
from bertforge.native.ladder import TOKENS, Ladder, Size, _lay_out, sizes
from bertforge.native.network import Network
from bertforge.native.weights import NativeWeights
from tests.native.models import model, pack

needs_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs a GPU with bfloat16"
)


@pytest.mark.parametrize("usual", [1, 16, 64, 500])
def test_sizes_ascend_and_hold_texts_that_are_shorter_than_usual(usual):
    found = sizes(usual)
    assert [size.tokens for size in found] == list(TOKENS)
    assert all(a.sequences <= b.sequences for a, b in pairwise(found))
    for size in found:
        assert size.sequences >= min(size.tokens // 4, 512)
        assert size.sequences >= size.tokens // max(usual, 4)
        assert size.sequences % 16 == 0


def test_no_more_than_half_is_filled_up():
    for small, large in pairwise(TOKENS):
        assert large - small <= (32 if large <= 96 else large / 3)


def test_a_pack_is_laid_out_with_zeros_and_empty_sequences_behind_it():
    batch, size = pack((3, 2)), Size(8, 4)
    numbers = np.full(30, -7, np.int32)
    _lay_out(batch, size, numbers)
    ids, positions, bounds, rest = np.split(numbers, [8, 16, 21])
    assert ids.tolist() == [*batch.input_ids.tolist(), 0, 0, 0]
    assert positions.tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert bounds.tolist() == [0, 3, 5, 5, 5]
    assert (rest == -7).all()


@pytest.fixture(scope="module")
def network():
    from bertforge.native.operations_triton import TritonOperations

    device = torch.device("cuda", 0)
    weights = NativeWeights.of(model().to(device), None)
    choices = Choices.known(torch.cuda.get_device_name())
    return Network(weights, TritonOperations.on(device, choices))


@pytest.fixture(scope="module")
def ladder(network):
    with torch.inference_mode():
        return Ladder(network, [Size(32, 16), Size(64, 16), Size(256, 64)], calls=2)


@needs_a_gpu
def test_a_graph_answers_as_the_operations_do_whatever_ran_before(network, ladder):
    with torch.inference_mode():
        for lengths in ((7, 30, 31, 9), (5,), (32, 31), (1,) * 16, (5,), (20,) * 12):
            wanted, other = (run_once(network, pack(lengths, seed=seed)).cpu().numpy() for seed in (len(lengths), 99))
            found = ladder(pack(lengths, seed=len(lengths)))
            assert np.allclose(found, wanted, atol=2e-2)  # products of another shape sum differently
            assert not np.allclose(found, other, atol=0.2), "other tokens have other logits"


@needs_a_gpu
def test_what_does_not_fit_is_refused_with_the_limits(ladder):
    with pytest.raises(UsageError, match=r"257 tokens in 16 sequences.*256 in 64.*engine\.shape"):
        ladder(pack((17,) + (16,) * 15))
    with pytest.raises(UsageError, match="in 65 sequences"):
        ladder(pack((1,) * 65))
    with pytest.raises(UsageError, match=r"has 33 tokens, but this model holds 32; truncate"):
        ladder(pack((33,)))

"""One seed settles every source of chance, and a named generator depends on its name alone."""

import random

import numpy as np
import pytest
import torch

from bertforge.determinism import branch, generator, seed_everything


@pytest.fixture(autouse=True)
def _torch_as_it_was():
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item(), torch.nn.Linear(2, 1).weight[0, 0].item()


def test_one_seed_settles_every_source_of_chance():
    seed_everything(1)
    first = draws()
    unseeded = draws()
    seed_everything(1)
    assert draws() == first
    assert all(a != b for a, b in zip(first, unseeded, strict=True))
    seed_everything(2)
    assert all(a != b for a, b in zip(first, draws(), strict=True))


def test_algorithms_that_differ_between_runs_are_refused_from_then_on():
    torch.use_deterministic_algorithms(False)
    seed_everything(1)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory, "a debugging aid that costs time"


def test_a_generator_depends_on_its_names_alone():
    first = generator(42, "shuffle", 3).permutation(100)
    seed_everything(7)
    random.random()
    assert np.array_equal(generator(42, "shuffle", 3).permutation(100), first)


@pytest.mark.parametrize(
    "names", [(43, "shuffle", 3), (42, "split", 3), (42, "shuffle", 4), (42, "shuffle"), (4, 2, "shuffle", 3)]
)
def test_other_names_give_other_draws(names):
    assert not np.array_equal(generator(*names).permutation(100), generator(42, "shuffle", 3).permutation(100))


def test_a_generator_is_the_same_on_every_machine():
    # Shuffles and splits hang on these numbers, so a run can be repeated elsewhere.
    assert generator(42, "shuffle", 0).integers(1000, size=4).tolist() == [921, 423, 439, 468]


def test_each_process_has_a_stream_of_its_own_and_the_first_goes_on_as_if_alone():
    def stream(rank, seed=1):
        seed_everything(seed)
        branch(rank)
        return tuple(torch.rand(4).tolist())

    alone = (seed_everything(1), tuple(torch.rand(4).tolist()))[1]
    assert stream(0) == alone
    assert len({alone, stream(1), stream(2), stream(1, seed=2)}) == 4
    assert stream(1) == stream(1)

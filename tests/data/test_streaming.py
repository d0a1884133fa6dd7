"""Work ahead of the caller gives what work in turn would: the same results, the same order, the same errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from threading import Barrier, Event

import pytest

from bertforge.data.streaming import ahead, in_order


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())  # other tests' libraries may have some
    yield
    assert set(threading.enumerate()) <= before


def test_results_come_in_the_order_of_the_items() -> None:
    second = Event()

    def work(item: int) -> int:
        if item == 0:
            assert second.wait(10), "the first ends after the second"
        if item == 1:
            second.set()
        return item * item

    assert list(in_order(work, range(7), 2)) == [item * item for item in range(7)]


def test_as_many_run_at_once_as_there_are_threads() -> None:
    together = Barrier(3, timeout=10)
    assert len(list(in_order(lambda _: together.wait(), range(6), 3))) == 6


def test_no_more_is_made_than_is_asked_for() -> None:
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            drawn.append(item)
            yield item

    with closing(in_order(lambda item: item, items(), 2)) as results:
        assert next(results) == 0
        assert drawn == [0, 1, 2]
        assert next(results) == 1
        assert drawn == [0, 1, 2, 3]


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_is_raised_in_its_place_and_nothing_more_is_begun(threads: int) -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 4:
            raise ValueError("the fifth")
        return item

    found: list[int] = []
    with pytest.raises(ValueError, match="the fifth"):
        found.extend(in_order(work, range(100), threads))
    assert found == [0, 1, 2, 3]
    assert len(begun) <= 5 + threads


def test_a_generator_is_closed_with_what_reads_it_ahead() -> None:
    closed: list[str] = []

    def items() -> Iterator[int]:
        try:
            yield from range(10)
        finally:
            closed.append(threading.current_thread().name)

    held = items()  # so that nobody else closes it
    results = ahead(held)
    assert [next(results), next(results)] == [0, 1]
    results.close()
    assert closed == ["MainThread"], "the thread has ended by then"
    assert list(held) == []


def test_an_error_of_the_items_is_raised_too() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        list(in_order(lambda item: item, items(), 2))
    with pytest.raises(OSError, match="the disk"):
        list(ahead(items()))

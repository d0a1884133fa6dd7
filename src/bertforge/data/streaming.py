"""What long work needs: a step ahead in a thread, a thread of its own, and a progress bar."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bertforge.terminal import Terminal, visible

S = TypeVar("S")
T = TypeVar("T")
_END = object()


def ahead(items: Iterable[T]) -> Generator[T, None, None]:
    """The same items in the same order, the next one made in a thread while the caller works on the last.

    An exception of the producer is raised here. `close()` waits for the item under way and closes a generator among
    `items`, so what the producer writes to can be closed after it: `with closing(ahead(...)) as items`.
    """
    iterator = iter(items)
    try:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead") as pool:
            coming = pool.submit(next, iterator, _END)
            while (item := coming.result()) is not _END:
                coming = pool.submit(next, iterator, _END)
                yield item  # type: ignore[misc]  # not the sentinel
    finally:
        if isinstance(iterator, Generator):
            iterator.close()


def in_order(work: Callable[[S], T], items: Iterable[S], threads: int) -> Generator[T, None, None]:
    """`work(item)` for each of `items`, in their order, so many at once while the caller works on the last.

    At most `threads` results and one more are made before they are asked for. An exception of `work` is raised here,
    and `close()` waits for what is under way.
    """
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="in order") as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def in_a_thread(work: Callable[[], T]) -> T:
    """The result of `work`, done in a thread of its own while the caller waits.

    OpenVINO gives the thread that compiles a model a stack for signals (on CPUs with AMX), too small for Python's
    handler: there Ctrl-C would end in a segmentation fault. Signals are the main thread's, so it must be another.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(work).result()


Report = Callable[[int, float], None]
"""`report(rows_so_far, share_done)`."""


@contextmanager
def progress(doing: str) -> Iterator[Report]:
    """A bar on stderr with rows/s and the time left; yields what moves it.

    It draws on a terminal only, so a log file is not filled with it.
    """
    console = Terminal(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rows]:,} rows, {task.fields[rate]:,.0f} rows/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(visible(doing), total=1.0, rows=0, rate=0.0)

        def report(rows: int, share_done: float) -> None:
            elapsed = bar.tasks[0].elapsed or 0.0
            bar.update(task, completed=share_done, rows=rows, rate=rows / elapsed if elapsed else 0.0)

        yield report

"""Processes that die at a chosen moment of their writing: before a change to the file system, or inside a write.

`Before(n)` kills a process right before its n-th change: a file opened for writing, a rename, a removal, a folder made.
`After(n)` lets the kernel kill it in the write that makes a file longer than n bytes, whoever writes: Python, Arrow or
another library. `died` runs a function in a process of its own and says whether it died so; counting up until it does
not meets every point. The functions it runs must be importable, for they are called in a process that is forked from
one which has imported what takes seconds.
"""

import multiprocessing
import os
import resource
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

FORKED = multiprocessing.get_context("forkserver")
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


@dataclass(frozen=True)
class Before:
    """The moment before the `number`-th change, from 0."""

    number: int

    def arm(self) -> None:
        left = self.number

        def count() -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        _before_each_change(count)


@dataclass(frozen=True)
class After:
    """The moment when a file has `size` bytes and would get more."""

    size: int

    def arm(self) -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and gets an error instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


def died(point, work, *arguments) -> bool:
    """Whether `work(*arguments)` met the point; anything else that goes wrong fails."""
    process = FORKED.Process(target=_work, args=(point, work, arguments))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL, -signal.SIGXFSZ), process.exitcode
    return process.exitcode != 0


def changes(work, *arguments) -> int:
    """How many changes `work(*arguments)` makes when nothing stops it."""
    ours, theirs = FORKED.Pipe(duplex=False)
    process = FORKED.Process(target=_count, args=(theirs, work, arguments))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


def _work(point, work, arguments) -> None:
    point.arm()
    work(*arguments)


def _count(told, work, arguments) -> None:
    found = 0

    def count() -> None:
        nonlocal found
        found += 1

    _before_each_change(count)
    work(*arguments)
    told.send(found)


def _before_each_change(call) -> None:
    def hook(event: str, arguments: tuple) -> None:
        if event in _CHANGES or (event == "open" and _writes(*arguments)):
            call()

    sys.addaudithook(hook)


def _writes(path, mode, flags) -> bool:
    return isinstance(path, str | bytes | os.PathLike) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def replace_folder(path: Path) -> None:
    """Puts two new files, one of them in a folder, in the place of an older folder."""
    from bertforge.artifact import fresh_directory, write_atomic

    with fresh_directory(path, replace=True) as folder:
        write_atomic(folder / "first", "new" * 100)
        (folder / "more").mkdir()
        (folder / "more" / "second").write_text("new" * 100)


def replace_file(path: Path) -> None:
    """Writes a new file over an older one."""
    from bertforge.artifact import output_files, write_atomic

    with output_files(path):
        write_atomic(path, "new" * 100)


def end_a_run(path: Path) -> None:
    """What is left of training goes once the manifest is written."""
    from bertforge.locks import locked
    from bertforge.manifest import WHILE_TRAINING, write_manifest

    with locked(path):
        write_manifest(path, "fit", leave_out=WHILE_TRAINING, serves="run")
        for name in WHILE_TRAINING:
            (path / name).unlink(missing_ok=True)


def hold(path: Path, told: Path) -> None:
    """Holds the lock of `path` until it is killed, and makes the file `told` when it does."""
    import time

    from bertforge.locks import locked

    with locked(path):
        told.touch()
        time.sleep(600)


def hold_and_fork(path: Path, told: Path) -> None:
    """The same, with a child that lives on; its number stands in `told`."""
    import time

    from bertforge.locks import locked

    with locked(path):
        if (child := os.fork()) == 0:
            time.sleep(600)
        told.write_text(str(child))
        time.sleep(600)


def count_up(path: Path, times: int) -> None:
    """Adds `times` to the number in a file, by ones, each time under its lock."""
    import math

    from bertforge.locks import locked

    for _ in range(times):
        with locked(path, patience=math.inf):
            path.write_text(str(int(path.read_text()) + 1))

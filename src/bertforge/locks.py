"""One writer for each output, and what a killed writer left is put right by whoever comes next.

A command locks its output, a folder or a file, before its work starts. Without a lock, two commands that write to one
place would both run, and the one that ends last would win without a word.

The lock is the kernel's (`flock`), on the file `.NAME.lock` beside the output. A live process holds it or nobody does:
a kill or a reboot frees it. The file says who holds it, for the message to others. The holder removes the file at the
end; whoever locks the file then checks that it still has its name. A forked process closes its copy of the lock: it may
outlive the process that works. The file lies beside the output and not in it, because a folder is replaced whole. The
package `filelock` leaves its files behind and does not say who holds them. NFS keeps such locks on the server. On a
file system without locks the work goes on, with a warning.

Everything is written under another name until it is complete: a folder as `.NAME.partial`, a file as
`.NAME.RANDOM.partial`, which its writer locks. A folder that is being replaced has another name for a moment. The
holder of the lock therefore knows what a dead process left: it puts the old folder back if the new one is missing, and
removes the rest. So a kill loses nothing, at any moment. After a power cut the file system decides.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import logging
import os
import secrets
import shlex
import shutil
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from bertforge.errors import ArtifactError, UsageError, removal

log = logging.getLogger(__name__)
PATIENCE = 0.5  # seconds that a reader waits: a command that is ending, or another that tidies, holds a lock so long
LOCK = ".lock"  # within a folder whose parent is not to be written
OLD = "bertforge-old"  # nobody's own folder is called so
_LOOK = 0.02  # seconds between two tries
_MOST_GONE = 1000  # times that a folder may go before its lock is made
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # what a file system without locks answers
_COMMAND = 200  # characters of a command that are told

_held: dict[Path, tuple[int, int]] = {}
"""What this process holds: the output -> the descriptor of its lock, and the thread that may write."""


class BusyError(ArtifactError):
    """Another command is writing the output."""


@contextmanager
def locked(path: Path, *, patience: float = 0) -> Iterator[None]:
    """Keeps other commands from writing `path`, a folder or a file, and puts it right first (see `tidy`).

    A thread that holds the lock may ask for it again. While another process writes `path`, waits for `patience` seconds
    (`math.inf` for as long as it takes), then raises BusyError, which names that process.
    """
    path, me = _place(path), threading.get_ident()
    if path in _held and _held[path][1] == me:
        yield
        return
    missing = [folder for folder in path.parents if not folder.exists()]  # innermost first
    lock, told, began = _lock(path), False, time.monotonic()
    while (taken := _take(lock)) is None:
        waited = time.monotonic() - began
        if waited > patience:
            raise BusyError(f"{_busy(path, lock)}; wait until it ends or stop it, or name another place")
        if waited > PATIENCE and not told:
            log.warning(f"{_busy(path, lock)}; waiting for it to end")
            told = True
        time.sleep(_LOOK)
    fd, kept = taken
    _held[path] = fd, me
    try:
        _sign(fd)
        if kept:
            tidy(path)
        else:
            log.warning(f"the file system of {path} knows no locks: start no other command that writes there")
        yield
    finally:
        if _held.pop(path, None):  # not in a forked process
            with suppress(OSError):
                if os.path.samestat(os.fstat(fd), os.lstat(lock)):
                    lock.unlink()
            os.close(fd)
            with suppress(OSError):  # something stands there, as it should
                for folder in missing:
                    folder.rmdir()


def holds_something(path: Path) -> bool:
    """Whether `path` is a file, or a folder with anything but a lock in it."""
    return path.is_file() or (path.is_dir() and any(entry.name != LOCK for entry in path.iterdir()))


def leftovers(path: Path) -> bool:
    """Whether a command is writing the folder `path`, or was killed when it did."""
    return any(os.path.lexists(beside(_place(path), what)) for what in ("partial", OLD)) or os.path.lexists(
        _lock(_place(path))
    )


def tidy(path: Path) -> None:
    """Puts the older folder back where a killed command had just moved it away, and removes what is half-written.

    Only the holder of the lock may call it.
    """
    partial, old = beside(path, "partial"), beside(path, OLD)
    if os.path.lexists(old):
        if os.path.lexists(path) or old.is_symlink():
            _remove(partial)
            os.replace(old, partial)  # half removed it must not be taken for the older folder
        else:
            os.replace(old, path)
    _remove(partial)
    inside = path.glob(".*.partial") if path.is_dir() else ()
    for file in (*path.parent.glob(f".{glob.escape(path.name)}.*.partial"), *inside):
        _remove_abandoned(file)


def tidy_inside(folder: Path) -> None:
    """Puts right every output in `folder` whose writer was killed, and leaves alone what is being written."""
    for lock in folder.glob(".*.lock"):
        with suppress(BusyError, OSError), locked(folder / lock.name[1:].removesuffix(".lock")):
            pass


def _lock(path: Path) -> Path:
    """Beside the output; in a folder that is all one may write, such as one mounted from elsewhere, within it."""
    within = path.is_dir() and not os.access(path.parent, os.W_OK)
    return path / LOCK if within else beside(path, "lock")


def beside(path: Path, what: str) -> Path:
    """The hidden name of `path`'s lock, of its half-written form or of its older one."""
    return path.parent / f".{path.name}.{what}"


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that becomes `path` when the block ends well, and vanishes when it does not.

    It is created under a name that nobody can guess, and no link of that name is followed.
    """
    partial = beside(path, f"{secrets.token_hex(4)}.partial")
    fd = _create(partial)
    held = os.dup(fd)  # the file is closed first, for a disk may be found full only then, and locked until it is named
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(held)


def _place(path: Path) -> Path:
    """One name for one place. A link to a folder is the folder; a link to a file is replaced, not followed."""
    return path.resolve() if path.is_dir() else path.parent.resolve() / path.name


def _create(partial: Path) -> int:
    """A descriptor of a new file, locked where the file system can."""
    while True:
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # taken for abandoned between the two calls


def _take(lock: Path) -> tuple[int, bool] | None:
    """A descriptor of `lock`, and whether it holds it: not on a file system without locks. None while another does."""
    gone = 0
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError as error:  # the folder went with its last lock
            gone += 1
            if gone > _MOST_GONE:
                raise UsageError(f"no file can be made in {lock.parent}; name another place") from error
            continue
        except OSError as error:
            if error.errno in (errno.EISDIR, errno.ELOOP):
                raise ArtifactError(f"{lock} is no lock of bertforge; remove it: {removal(lock)}") from error
            raise
        found = os.fstat(fd)
        try:
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:  # planted: it would be written to
                raise ArtifactError(f"{lock} is no lock of bertforge; remove it: rm {lock}")
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(fd)
                raise
            return fd, False
        except BaseException:
            os.close(fd)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(found, os.lstat(lock)):
                return fd, True
        os.close(fd)  # its holder had removed it; another one may bear the name by now


def _sign(fd: int) -> None:
    """Writes into a lock who holds it."""
    program = Path(sys.argv[0]).name
    command = shlex.join(["bertforge" if program == "__main__.py" else program, *sys.argv[1:]])
    since = datetime.now().isoformat(" ", "seconds")
    os.ftruncate(fd, 0)
    with suppress(OSError):  # a full disk: what cannot be written is told by whoever has more to write
        os.write(fd, json.dumps([os.getpid(), socket.gethostname(), command, since]).encode())


def _busy(path: Path, lock: Path) -> str:
    try:
        pid, host, command, since = json.loads(lock.read_text())
        where = "" if host == socket.gethostname() else f" on {host}"
        told = f"process {pid}{where}, since {since}: {command if len(command) < _COMMAND else command[:_COMMAND]}"
    except (OSError, ValueError, TypeError):  # it has just begun, or just ended
        told = "another process"
    return f"{path} is being written by {''.join(letter for letter in told if letter.isprintable())}"


def _remove(path: Path) -> None:
    """Removes a folder, or a file or link of its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # what is open over NFS stays; whoever needs the name tells
    else:
        path.unlink(missing_ok=True)


def _remove_abandoned(file: Path) -> None:
    """Removes a half-written file unless its writer lives."""
    if file.is_dir() or file.is_symlink():
        return
    with suppress(OSError):
        fd = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()
        finally:
            os.close(fd)


def _let_go() -> None:
    """In a forked process: closes its copies, whose locks it would hold when its parent is gone."""
    for fd, _ in _held.values():
        os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)

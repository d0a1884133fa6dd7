"""What a process and its children ask the kernel for: each connection, and each file they make or open for writing.

It is what `strace` would tell, from any library and thread, without a tool to install and without root: the kernel
stops a filtered call and tells us (seccomp's user notification, man 2 seccomp_unotify), we note it and let it go on.
The filter is made with libseccomp, which Debian's and Ubuntu's apt itself needs. Python's audit hooks would not do: the
libraries that call home do it in C++.

Run as a program, this file puts the filter over itself, hands its descriptor over, and becomes the command.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NoReturn

# Call -> where its arguments hold the folder's descriptor, if they do, the path and, if it has them, the flags.
_FILES: dict[str, tuple[int | None, int, int | None]] = {
    "open": (None, 0, 1),
    "openat": (0, 1, 2),
    "creat": (None, 0, None),
    "mknod": (None, 0, None),
    "mknodat": (0, 1, None),
    "mkdir": (None, 0, None),
    "mkdirat": (0, 1, None),
    "rename": (None, 1, None),
    "renameat": (2, 3, None),
    "renameat2": (2, 3, None),
    "link": (None, 1, None),
    "linkat": (2, 3, None),
    "symlink": (None, 1, None),
    "symlinkat": (1, 2, None),
}
# Call -> which argument points at an address, and whether it does so by way of a message.
_CALLS = {"connect": (1, False), "sendto": (4, False), "sendmsg": (1, True), "sendmmsg": (1, True)}
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000  # what libseccomp calls SCMP_ACT_ALLOW and SCMP_ACT_NOTIFY
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # ioctls SECCOMP_IOCTL_NOTIF_RECV and _SEND
_NOTICE = struct.Struct("QIIiIQ6Q")  # id, process, flags, call, architecture, instruction, arguments
_ANSWER = struct.Struct("QqiI")  # id, value, error, flags; the flag 1 lets the call go on
_PIDFD_GETFD = 438  # on every architecture
_GONE = (FileNotFoundError, ProcessLookupError)  # what is read of a process that has just ended


@dataclass
class Seen:
    """What a command did."""

    code: int
    """Its exit code."""
    said: str
    """What it printed."""
    calls: list[str] = field(default_factory=list)
    """Connections and datagrams to another machine or a name server."""
    written: set[Path] = field(default_factory=set)
    """Every path made or opened for writing, whether or not that worked."""

    def left_outside(self, named: Path) -> list[str]:
        """Paths written outside the folder `named` that are still there."""
        paths = {path.resolve() for path in self.written}
        return sorted(str(path) for path in paths if path.exists() and not path.is_relative_to(named.resolve()))


def watch(command: Sequence[object], environment: Mapping[str, str], folder: Path, limit_s: float = 600) -> Seen:
    """Runs `command` in `folder` with nothing but `environment`; skips the test where the kernel forbids to watch."""
    ours, theirs = socket.socketpair()
    launcher = [sys.executable, __file__, str(theirs.fileno()), *map(str, command)]
    with open(folder / ".said", "w+") as said, ours, theirs:
        process = subprocess.Popen(
            launcher, env=dict(environment), cwd=folder, pass_fds=[theirs.fileno()], stdout=said, stderr=said,
            start_new_session=True,
        )  # fmt: skip
        theirs.close()
        try:
            seen = _follow(process, ours, time.monotonic() + limit_s)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        said.seek(0)
        seen.code, seen.said = code, said.read()
    (folder / ".said").unlink()
    return seen


def _follow(process: subprocess.Popen[bytes], ours: socket.socket, until: float) -> Seen:
    """Notes what the process and its children do, until it has ended."""
    told = os.read(ours.fileno(), 100).decode()
    if not told.isdigit():
        _skip(told or "no answer")
    handle = os.pidfd_open(process.pid)
    listener = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, handle, int(told), 0)
    os.close(handle)
    if listener < 0:
        _skip(os.strerror(ctypes.get_errno()))
    seen, names = Seen(0, ""), {_number(name): name for name in (*_FILES, *_CALLS)}
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    os.write(ours.fileno(), b"!")
    try:
        while time.monotonic() < until:
            if dict(poller.poll(300)).get(listener, 0) & select.POLLIN:
                _notice(listener, seen, names)
            elif process.poll() is not None:  # and no child has asked for anything meanwhile
                return seen
    finally:
        os.close(listener)
    raise TimeoutError("the command takes too long")


def _skip(why: str) -> NoReturn:
    import pytest  # here, for the program below needs none

    pytest.skip(f"this machine does not let a process be watched: {why}")


def _notice(listener: int, seen: Seen, names: Mapping[int, str]) -> None:
    """Takes one call down and lets it go on."""
    notice = bytearray(_NOTICE.size)
    try:
        fcntl.ioctl(listener, _RECEIVE, notice)
    except _GONE:
        return
    number, process, _, call, _, _, *arguments = _NOTICE.unpack(notice)
    name = names[call]
    with suppress(*_GONE):
        if name in _CALLS:
            if address := _address(process, arguments, *_CALLS[name]):
                seen.calls.append(f"{name} {address}")
        elif path := _path(process, arguments, *_FILES[name]):
            seen.written.add(path)
    with suppress(*_GONE):
        fcntl.ioctl(listener, _SEND, bytearray(_ANSWER.pack(number, 0, 0, 1)))


def _address(process: int, arguments: Sequence[int], index: int, is_message: bool) -> str | None:
    """The address of another machine or of a service that looks names up; None of any other."""
    place = arguments[index]
    if is_message and place:
        place = int.from_bytes(_memory(process, place, 8), sys.byteorder)
    if not place:
        return None
    raw = _memory(process, place, 110)
    family = int.from_bytes(raw[:2], sys.byteorder)
    if family == socket.AF_UNIX:
        path = raw[2:].split(b"\0")[0].decode(errors="replace")
        return path if "resolve" in path else None  # systemd-resolved; /var/run/nscd/socket is asked for users too
    if family == socket.AF_INET:
        return f"{socket.inet_ntop(family, raw[4:8])}:{int.from_bytes(raw[2:4])}"
    if family == socket.AF_INET6:
        return f"[{socket.inet_ntop(family, raw[8:24])}]:{int.from_bytes(raw[2:4])}"
    return None


def _path(process: int, arguments: Sequence[int], folder: int | None, index: int, flags: int | None) -> Path | None:
    """The file that a call makes or opens for writing; None where it only reads, and for devices."""
    if flags is not None:
        asked = arguments[flags]
        no_name = asked & os.O_TMPFILE == os.O_TMPFILE
        if no_name or not asked & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return None
    path = os.fsdecode(_memory(process, arguments[index], 4096).split(b"\0")[0])
    descriptor = ctypes.c_int(arguments[folder] & 0xFFFFFFFF).value if folder is not None else -100  # AT_FDCWD
    start = f"/proc/{process}/cwd" if descriptor == -100 else f"/proc/{process}/fd/{descriptor}"
    found = Path(os.readlink(start) if not path.startswith("/") else "/", path)
    is_device = found.is_relative_to("/proc") or (found.is_relative_to("/dev") and not found.is_relative_to("/dev/shm"))
    return None if is_device else found


def _memory(process: int, place: int, size: int) -> bytes:
    """Up to `size` bytes: fewer where the memory ends."""
    memory = os.open(f"/proc/{process}/mem", os.O_RDONLY)
    try:
        return os.pread(memory, size, place)
    finally:
        os.close(memory)


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p,
    ]  # fmt: skip
    library.seccomp_load.argtypes = library.seccomp_notify_fd.argtypes = [ctypes.c_void_p]
    return library


def _number(name: str) -> int:
    """Of a call here; below zero where this architecture lacks it."""
    return int(_library().seccomp_syscall_resolve_name(name.encode()))


def _put_filter_over_this_process() -> str:
    """The descriptor on which its calls are told, or why there is none."""
    try:
        library = _library()
    except OSError as error:
        return f"{error}: apt-get install libseccomp2"
    rules = library.seccomp_init(_ALLOW)
    for name in (*_FILES, *_CALLS):
        if (number := _number(name)) >= 0:
            library.seccomp_rule_add_array(rules, _NOTIFY, number, 0, None)
    if (failed := library.seccomp_load(rules)) < 0:
        return os.strerror(-failed)
    return str(library.seccomp_notify_fd(rules))


if __name__ == "__main__":
    connection, *rest = sys.argv[1:]
    os.write(int(connection), _put_filter_over_this_process().encode())
    os.read(int(connection), 1)
    os.close(int(connection))
    os.execv(rest[0], rest)

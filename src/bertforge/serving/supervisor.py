"""`bertforge serve`: one engine process and some fronts, kept alive until the service is told to end.

                         +--- front ---+
    clients --- socket --+             +--- engine process
                         +--- front ---+

The supervisor itself computes nothing and reads no request. It makes the socket that all fronts accept from, so that a
front that died leaves no connection behind that nobody would accept. What dies is started again: at once the first
time, then after a pause that grows, for what dies at its start would otherwise do nothing else. A process that cannot
start at all ends the service, with its own message and exit code.

SIGTERM and Ctrl-C end it in order: the socket takes no new connections, the fronts answer what they have, and then the
engine process ends. A second signal, or the time limit, ends it at once. SIGHUP has the engine process load the folders
again, and the fronts their keys. They are told by a line on their standard input, which waits until they can read it,
where a signal would end a process that has no handler yet. Every process ends with its standard input, so none outlives
a supervisor that was killed.

The engine process tells which folders it serves. One that is started again begins with these, and not with what a link
has pointed to since: that may be a folder that was refused. It also tells that it is alive, and is killed where it does
not, for a call that never returns may hold all of it.
"""

from __future__ import annotations

import asyncio
import ctypes
import ipaddress
import json
import os
import signal
import socket
import struct
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from tempfile import TemporaryDirectory

from bertforge.errors import MachineError, UsageError, reason
from bertforge.serving.settings import ALIVE, OURS, READY, RELOAD, EngineOrder, FrontOrder, Service

_LONGEST = 103  # bytes of a socket's path: 107 on Linux, and 103 on macOS
_BACKLOG = 2048  # connections that wait to be accepted
_PAUSES = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)  # seconds before a process is started again, the first to the sixth time
_STEADY = 60.0  # seconds after which a process counts as one that lives
_ATTACH_FILTER, _RETURN = 26, 0x06  # SO_ATTACH_FILTER of Linux, and BPF_RET | BPF_K
_ENGINE_END = 10.0  # seconds for the engine process to end
_ENGINE = "the engine process"
_SILENT = 60.0  # seconds without a word after which it counts as hung; it says one each second
_LINE = 1 << 20  # bytes of a line that it may say
# A front computes in one thread; those of its libraries would only take the cores from the engine.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections; raises UsageError where there can be none."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"--host {host} --port {port}: {why.lower()}; name another") from error
    return listening


def is_local(listening: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def deafen(listening: socket.socket) -> None:
    """Nobody connects from now on, and who is connected can still be accepted.

    To close the socket would reset connections that wait to be accepted, with requests in them. A filter that drops
    every packet stops new ones alone: who tries to connect tries again a second later, and is refused then. Systems
    other than Linux have no such filter, and go on to take connections until the fronts end.
    """
    program = ctypes.create_string_buffer(struct.pack("HBBI", _RETURN, 0, 0, 0))  # of BPF: keep 0 bytes of it
    with suppress(OSError):
        listening.setsockopt(
            socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(program))
        )  # https://docs.kernel.org/networking/filter.html


def _socket_in(folder: str) -> str:
    """The engine process's, within the service's folder."""
    return f"{folder}/engine"


class Supervisor:
    """The processes of one service."""

    def __init__(self, service: Service, listening: socket.socket, say: Callable[[str, str], object]) -> None:
        """`say` is told what becomes of the processes: an event's name, and the same in words."""
        self._service, self._listening, self._say = service, listening, say
        self._running: dict[str, Process] = {}
        self._fronts = [f"front {number}" for number in range(1, service.fronts + 1)]
        self._starting = {*self._fronts}  # until each can answer
        self._serving: dict[str, str] | None = None  # the folders that the engine process loaded last
        self._ready, self._ending = asyncio.Event(), asyncio.Event()
        self._code = 0

    async def run(self, ready: Callable[[], object]) -> int:
        """Until the service has ended; `ready` is called when it answers. Returns the exit code.

        Raises MachineError where the folder of temporary files has too long a name for a socket in it.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        loop.add_signal_handler(signal.SIGHUP, self._swap)
        with TemporaryDirectory(prefix=OURS) as folder:
            if len(os.fsencode(_socket_in(folder))) > _LONGEST:
                raise MachineError(
                    f"{os.path.dirname(folder)}, the folder of temporary files, has too long a name for a socket in "
                    "it; name another: TMPDIR=/tmp bertforge serve ..."
                )
            counts = {"PROMETHEUS_MULTIPROC_DIR": folder}
            engine = asyncio.create_task(self._keep(_ENGINE, lambda: self._engine_command(folder), counts))
            shown = {**_ONE_THREAD, **counts}
            fronts = [
                asyncio.create_task(
                    self._keep(name, partial(self._front_command, folder, number), shown, [self._listening.fileno()])
                )
                for number, name in enumerate(self._fronts, 1)
            ]
            first = asyncio.create_task(self._ready.wait())
            # A process is kept until the service ends: one that is kept no longer is a defect, which is raised below.
            over = [asyncio.create_task(self._ending.wait()), engine, *fronts]
            await asyncio.wait([first, *over], return_when=asyncio.FIRST_COMPLETED)
            if self._ready.is_set():
                ready()
            await asyncio.wait(over, return_when=asyncio.FIRST_COMPLETED)
            self._ending.set()
            first.cancel()
            deafen(self._listening)
            await self._ended(fronts, self._service.drain, self._fronts)
            self._listening.close()
            await self._ended([engine], _ENGINE_END, [_ENGINE])
            for task in over:
                await task
        if not self._code:
            self._say("ended", "ended")
        return self._code

    def _engine_command(self, folder: str) -> list[str]:
        service = self._service
        models = {name: str(path) for name, path in service.models.items()}
        adapters = {name: str(path) for name, path in service.adapters.items()}
        prior = None if service.prior is None else dict(service.prior)
        order = EngineOrder(_socket_in(folder), models, adapters, service.precision, service.pace, prior, self._serving)
        return order.command()

    def _front_command(self, folder: str, number: int) -> list[str]:
        service, keys = self._service, self._service.api_keys
        return FrontOrder(
            listening=self._listening.fileno(),
            engine=_socket_in(folder),
            limits=service.limits,
            counters=f"{folder}/served-{number}.json",
            api_keys=None if keys is None else str(keys.absolute()),
            prior=service.prior,
            again=self._ready.is_set(),
        ).command()

    async def _keep(
        self, name: str, command: Callable[[], list[str]], own: dict[str, str] | None = None, files: Sequence[int] = ()
    ) -> None:
        """Runs a process again and again until the service ends; `own` is of its environment, `files` are passed on."""
        deaths = 0
        while not self._ending.is_set():
            began, code = time.monotonic(), 1
            try:
                process = await asyncio.create_subprocess_exec(
                    *command(), stdin=PIPE, stdout=PIPE, limit=_LINE, env={**os.environ, **(own or {})},
                    start_new_session=True, pass_fds=files,
                )  # fmt: skip
                code = await self._attend(name, process)
                how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
            except OSError as error:  # too little memory, too many files: it may be better in a while
                how = f"cannot be started ({reason(error)})"
            if self._ending.is_set():
                return
            if not self._ready.is_set():
                if code <= 1:  # with another it has said why
                    self._say("process_ended", f"{name} {how}")
                self._code = code if code > 0 else 1
                self._ending.set()
                return
            deaths = 0 if time.monotonic() - began > _STEADY else deaths + 1
            pause = _PAUSES[min(deaths, len(_PAUSES)) - 1] if deaths else 0.0
            self._say("process_restarted", f"{name} {how}; it is started again" + (f" in {pause:g} s" if pause else ""))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), pause)

    async def _attend(self, name: str, process: Process) -> int:
        """Listens to a process until it ends; returns its exit code."""
        self._running[name] = process
        if self._ending.is_set():
            self._to_all(Process.terminate, [name])
        assert process.stdout is not None
        patience = None  # loading may take any time
        try:
            while line := await asyncio.wait_for(process.stdout.readline(), patience):
                if line == READY:
                    self._starting.discard(name)
                    if not self._starting:
                        self._ready.set()
                elif line == ALIVE:
                    patience = _SILENT
                elif name == _ENGINE and line.startswith(b"{"):
                    self._serving = json.loads(line)
        except TimeoutError:
            self._say("process_hung", f"{name} has not answered for {_SILENT:g} s and is killed")
            self._to_all(Process.kill, [name])
        code = await process.wait()
        del self._running[name]
        return code

    async def _ended(self, kept: list[asyncio.Task[None]], seconds: float, names: list[str]) -> None:
        """Tells processes to end, and kills them after so many seconds."""
        self._to_all(Process.terminate, names)
        _, late = await asyncio.wait(kept, timeout=seconds)
        if late:
            those = " and ".join(name for name in names if name in self._running)
            self._say("process_killed", f"{those} did not end in {seconds:g} s")
            self._kill()
            await asyncio.wait(late)

    def _end(self) -> None:
        if self._ending.is_set():
            self._say("ended_at_once", "ended at once: what was not answered is cut")
            self._kill()
        else:
            self._say("ending", "ending once accepted requests are answered; a second signal ends at once")
        self._ending.set()

    def _kill(self) -> None:
        self._to_all(Process.kill, self._running)

    def _to_all(self, act: Callable[[Process], None], names: Iterable[str]) -> None:
        """To those of the processes that run."""
        for name in names:
            if (process := self._running.get(name)) is not None:
                with suppress(ProcessLookupError):  # it has just ended
                    act(process)

    def _swap(self) -> None:
        for process in self._running.values():
            assert process.stdin is not None
            process.stdin.write(RELOAD)

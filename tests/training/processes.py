"""Processes that train: alone, two under torchrun, or two forked from one that has imported what takes seconds.

A process can be told to hold in the middle of an epoch until it is interrupted or killed, so that a test's signal comes
neither before training nor after it, however busy the machine. This file is also the program that does so: it is
`bertforge`, whose process of rank HOLD holds.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from torch.distributed import TCPStore

from bertforge.cli.main import main

HELD = "held until a signal comes"
HANGS = 300  # seconds: only what hangs takes so long
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["bertforge.cli.main", "bertforge.training.finetune", "torch._inductor.config"])


class Alone:
    """`bertforge` with these arguments; what it says goes to files in `folder`, which is made here.

    The process of rank `hold` holds.
    """

    launcher = (sys.executable,)

    def __init__(self, folder, *arguments, hold=None):
        self.out, self.err = _files(folder)
        program = ["-m", "bertforge"] if hold is None else [__file__]
        command, environment = [*self.launcher, *program, *map(str, arguments)], os.environ | {"HOLD": str(hold)}
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        self.pid = self.process.pid

    def poll(self):
        """The exit code, None while it runs."""
        return self.process.poll()


class UnderTorchrun(Alone):
    """Two such processes, which torchrun starts."""

    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

    def worker(self, rank):
        """The process id of a rank."""
        for child in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
        raise AssertionError(f"no process of rank {rank}")


class Forked:
    """The same without torchrun, whose part of the environment is set here; or `target` in both processes."""

    def __init__(self, folder, *arguments, target=main, hold=None):
        self.out, self.err = _files(folder)
        for path in (self.out, self.err):
            path.touch()  # it may be read before a process has opened it
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # outlives them, as torchrun's
        given = (self.store.port, self.out, self.err, target, hold, [str(argument) for argument in arguments])
        self.processes = [_FORKED.Process(target=_work, args=(rank, *given)) for rank in range(2)]
        for process in self.processes:
            process.start()

    def worker(self, rank):
        return self.processes[rank].pid

    def poll(self):
        """The larger exit code, or None."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else max(map(abs, codes))


def ended(started):
    """The exit code, and what was said on stdout and on stderr."""
    _wait(started, lambda: started.poll() is not None)
    return started.poll(), started.out.read_text(), started.err.read_text()


def held(started):
    """Waits until the process that is to hold does."""
    _wait(started, lambda: HELD in started.err.read_text() or started.poll() is not None)
    assert started.poll() is None, started.err.read_text()


def hold_in_the_middle():
    """Makes training in this process hold after its first epoch, in the middle of another."""
    from bertforge.training.history import History

    add = History.add

    def add_and_hold(history, point):
        add(history, point)
        if "epoch" in point or not any("epoch" in earlier for earlier in history.points):
            return
        print(HELD, file=sys.stderr, flush=True)
        until = time.monotonic() + HANGS
        # An interrupt gives the next one back to Python, see loop.py.
        while signal.getsignal(signal.SIGINT) is not signal.default_int_handler and time.monotonic() < until:
            time.sleep(0.01)

    History.add = add_and_hold


def _wait(started, done):
    until = time.monotonic() + HANGS
    while not done():
        assert time.monotonic() < until, started.err.read_text()
        time.sleep(0.01)


def _files(folder):
    folder.mkdir()
    return folder / "out", folder / "err"


def _work(rank, port, out, err, target, hold, arguments):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    store = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    os.environ.update({name: str(value) for name, value in place.items()}, **store)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    sys.argv[1:] = arguments
    if rank == hold:
        hold_in_the_middle()
    target()


if __name__ == "__main__":
    if os.environ.get("RANK", "0") == os.environ["HOLD"]:
        hold_in_the_middle()
    main()

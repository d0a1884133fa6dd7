"""Two processes that train together: under torchrun, or forked from one that has imported what takes seconds."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

from torch.distributed import TCPStore

from bertforge.cli.main import main

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bertforge"]
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(
    ["bertforge.cli.main", "bertforge.training.finetune", "torch.utils.tensorboard", "torch._inductor.config"]
)


class UnderTorchrun:
    """`bertforge` with these arguments; what it says goes to files in `folder`, which is made here."""

    def __init__(self, folder, *arguments):
        self.out, self.err = _files(folder)
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen([*TORCHRUN, *map(str, arguments)], stdout=out, stderr=err)
        self.pid = self.process.pid

    def worker(self, rank):
        """The process id of a rank."""
        for child in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
        raise AssertionError(f"no process of rank {rank}")

    def poll(self):
        """The exit code, None while it runs."""
        return self.process.poll()


class Forked:
    """The same without torchrun, whose part of the environment is set here; or `target` in both processes."""

    def __init__(self, folder, *arguments, target=main):
        self.out, self.err = _files(folder)
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # outlives them, as torchrun's
        given = (self.store.port, self.out, self.err, target, [str(argument) for argument in arguments])
        self.processes = [_FORKED.Process(target=_work, args=(rank, *given)) for rank in range(2)]
        for process in self.processes:
            process.start()

    def worker(self, rank):
        return self.processes[rank].pid

    def poll(self):
        """The larger exit code, or None."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else max(map(abs, codes))


def ended(pair, timeout=60):
    """The exit code, and what was said on stdout and on stderr."""
    until = time.monotonic() + timeout
    while pair.poll() is None:
        assert time.monotonic() < until, pair.err.read_text()
        time.sleep(0.01)
    return pair.poll(), pair.out.read_text(), pair.err.read_text()


def _files(folder):
    folder.mkdir()
    return folder / "out", folder / "err"


def _work(rank, port, out, err, target, arguments):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    store = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    os.environ.update({name: str(value) for name, value in place.items()}, **store)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    sys.argv[1:] = arguments
    target()

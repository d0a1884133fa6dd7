"""The exceptions a user can meet. Each message is one line: what is wrong, with which value, and what to type instead.

The library raises; what runs a process turns an error into an exit code (`Terminal.tell`). Exit codes: 0 done, 1 a
defect of ours (traceback kept for `--debug`), 2 the command line itself, 3 the user's data, 4 the user's files and
artifacts, 5 something the machine lacks, 130 interrupted.
"""

from __future__ import annotations

import shlex
from pathlib import Path

# In the RuntimeErrors of torch on a CPU, of cuBLAS and of Triton.
_NO_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "[CUDA]: out of memory")


def reason(error: Exception) -> str:
    """One line: what an error of ours says, or the kind of another and the first line of what it says."""
    first = str(error).strip().partition("\n")[0]
    return first if isinstance(error, BertforgeError) else f"{type(error).__name__}: {first}"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a lack of memory is what went wrong at first; while a graph is recorded, another error follows it."""
    while error is not None:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, not imported here
            return True
        if any(said in str(error) for said in _NO_MEMORY):
            return True
        error = error.__context__
    return False


def removal(path: Path) -> str:
    """What to type to remove a folder or file, whatever its name holds."""
    return f"rm -r {shlex.quote(str(path))}"


class BertforgeError(Exception):
    """Base of every expected error; `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(BertforgeError):
    """An option or argument has a value that cannot work."""

    exit_code = 2


class DataError(BertforgeError):
    """A table, a column or a row is not what the command needs."""

    exit_code = 3


class ArtifactError(BertforgeError):
    """A checkpoint, adapter, prepared-data folder or run is missing, damaged or of the wrong kind."""

    exit_code = 4


class MachineError(BertforgeError):
    """This machine lacks a library, a device or a precision; the message names the command that installs it."""

    exit_code = 5

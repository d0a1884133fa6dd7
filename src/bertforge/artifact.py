"""Writes that never leave a half-made file or folder, hashes, and the versions that made something.

Everything is written beside its final name and renamed: a rename within one folder is atomic on POSIX, so a reader sees
the old artifact or the new one. What a folder is and whether it is whole, `manifest.py` knows.
`locks.py` says how two writers are kept apart, and what becomes of what a killed one left.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from bertforge.errors import ArtifactError, UsageError, removal
from bertforge.locks import OLD, beside, holds_something, locked, new_file, tidy

_LIBRARIES = ("bertforge", "torch", "numpy", "pandas", "pyarrow", "tokenizers", "safetensors")


def versions(*more: str) -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result, `more` among them."""
    found = {"python": platform.python_version()}
    for name in (*_LIBRARIES, *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # running from a source tree that was never installed
            continue
    return found


def hash_file(path: Path) -> str:
    """`sha256:<hex>` of a file's content, read in pieces."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def check_output(path: Path) -> None:
    """Raises UsageError when no file can be written at `path`, so that it is known before the work, not after."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file, such as {path / 'NAME'}")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UsageError(f"{path} cannot be written: {above} is a file; name another path")
    if not os.access(above, os.W_OK):
        raise UsageError(f"{path} cannot be written: no write permission for {above}; name another path")


@contextmanager
def output_files(*paths: Path | None) -> Iterator[None]:
    """Checks that each file that is named can be written, and lets no other command write it meanwhile.

    Raises UsageError as `check_output` does, and BusyError as `locked` does.
    """
    with ExitStack() as stack:
        for path in filter(None, paths):
            check_output(path)
            stack.enter_context(locked(path))
        yield


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets an OSError inside name `path`: a write to a full disk does not say which file it was."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.strerror = os.strerror(error.errno) if error.errno else str(error)
            error.errno, error.filename = error.errno or errno.EIO, str(path)
        raise


def write_atomic(path: Path, content: str | bytes) -> Path:
    """Writes `content` beside `path`, then renames it into place."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            file.write(content.encode() if isinstance(content, str) else content)
    return path


def write_json(path: Path, value: Any) -> Path:
    """Atomically writes `value` as indented JSON; NaN and infinities are refused, for they are not JSON."""
    return write_atomic(path, to_json(value))


def to_json(value: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


@contextmanager
def fresh_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    No other command writes `path` meanwhile (see `locked`). An older `path` is moved aside, not
    deleted, until the new one stands in its place. Raises ArtifactError when `path` is a file, or already holds
    something and `replace` is false.
    """
    path = path.resolve()  # `.` has no name to write beside
    with locked(path), naming(path):
        if path.is_file() or (not replace and holds_something(path)):
            raise ArtifactError(f"{path} already exists and is not empty; name another folder")
        partial, old = beside(path, "partial"), beside(path, OLD)
        try:
            partial.mkdir()
        except FileExistsError as error:
            raise ArtifactError(f"{partial} is in the way; remove it: {removal(partial)}") from error
        try:
            yield partial
            if path.exists():
                os.replace(path, old)
            os.replace(partial, path)
        finally:
            tidy(path)

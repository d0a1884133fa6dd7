"""Writes that never leave a half-made file or folder, hashes, and the versions that made something.

Everything is written beside its final name and renamed: a rename within one folder is atomic on POSIX, so a reader sees
the old artifact or the new one. What a folder is and whether it is whole, `manifest.py` knows.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from bertforge.errors import ArtifactError, UsageError

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


def write_atomic(path: Path, content: str | bytes) -> Path:
    """Writes `content` beside `path`, then renames it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def write_json(path: Path, value: Any) -> Path:
    """Atomically writes `value` as indented JSON; NaN and infinities are refused, for they are not JSON."""
    return write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def fresh_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    An older `path` is moved aside, not deleted, until the new one stands in its place. Raises ArtifactError when `path`
    is a file, or already holds something and `replace` is false.
    """
    path = path.resolve()  # `.` has no name to write beside
    if path.is_file() or (path.exists() and not replace and any(path.iterdir())):
        raise ArtifactError(f"{path} already exists and is not empty; name another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    aside = beside.with_suffix(".old")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        if path.exists():
            os.replace(path, aside)
        os.replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)
        elif aside.exists():
            os.replace(aside, path)

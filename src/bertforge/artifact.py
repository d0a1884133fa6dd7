"""Folders that describe themselves: `bertforge.json`, hashes, and writes that never leave a half-made file.

Every folder bertforge writes (prepared data, a run, a merged model, later an engine) holds a `bertforge.json` with
its `kind`, the versions that made it and the hash of its parent. A stage reads its parent's manifest first and
refuses a wrong kind with the command that makes the right one. Everything is written beside its final name and
renamed: a rename within one folder is atomic on POSIX, so a reader sees the old artifact or the new one. locks.py says
how two writers are kept apart, and what becomes of what a killed one left.
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

from bertforge.errors import ArtifactError, UsageError
from bertforge.locks import PATIENCE, BusyError, beside, leftovers, locked, new_file, tidy

MANIFEST = "bertforge.json"
RUNNING = "running.json"  # in its place: the recipe and data of a run that has not ended
WHILE_TRAINING = ("checkpoint.safetensors", "best.safetensors", "start.safetensors", RUNNING)  # RUNNING goes last
_LIBRARIES = ("bertforge", "torch", "numpy", "pandas", "pyarrow", "tokenizers", "safetensors")
# What every reader of a kind relies on.
_FIELDS = {
    "data": ("fingerprint", "source", "schema", "rows", "label_counts", "columns", "splits", "files", "made_up"),
    "run": ("recipe", "labels", "schema", "tabular", "data", "base", "golden"),
    "model": ("recipe", "labels", "schema", "tabular", "data", "base", "golden"),
    "quantized": ("recipe", "labels", "schema", "tabular", "data", "base", "golden", "quantization"),
    "engine": (
        "recipe",
        "labels",
        "schema",
        "tabular",
        "data",
        "base",
        "golden",
        "target",
        "precision",
        "hashes",
        "spared",
    ),
    "fit": ("serves",),
}
_MADE_BY = {
    "data": "bertforge prepare TABLE --out DIR",
    "run": "bertforge train --data DIR --out RUN",
    "model": "bertforge merge RUN --out DIR",
    "quantized": "bertforge quantize MODEL --data DIR --out DIR",
    "engine": "bertforge compile MODEL --target openvino --precision bf16",
    "fit": "bertforge fit TABLE --label-column L",
}


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
    return write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def fresh_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    No other command writes `path` meanwhile (see `locked`). An older `path` is moved aside, not
    deleted, until the new one stands in its place. Raises ArtifactError when `path` is a file, or already holds
    something and `replace` is false.
    """
    path = path.resolve()  # `.` has no name to write beside
    with locked(path), naming(path):
        if path.is_file() or (path.exists() and not replace and any(path.iterdir())):
            raise ArtifactError(f"{path} already exists and is not empty; name another folder")
        partial, old = beside(path, "partial"), beside(path, "old")
        try:
            partial.mkdir()
        except FileExistsError as error:
            raise ArtifactError(f"{partial} is in the way; remove it: rm -r {partial}") from error
        try:
            yield partial
            if path.exists():
                os.replace(path, old)
            os.replace(partial, path)
        finally:
            tidy(path)


def put_right(directory: Path) -> None:
    """What a reader of `directory` does first: what a killed command left there is put back or removed.

    Raises BusyError when a command is writing the folder and nothing can be read there yet.
    """
    finished = (directory / MANIFEST).is_file()
    if not leftovers(directory) and not (finished and (directory / RUNNING).is_file()):
        return
    try:
        with locked(directory, patience=0 if finished else PATIENCE):
            if (directory / MANIFEST).is_file():
                for name in WHILE_TRAINING:
                    (directory / name).unlink(missing_ok=True)
    except BusyError:
        if not finished:
            raise
    except OSError as error:  # a place where only reading is allowed
        old = beside(directory.resolve(), "old")
        if old.is_dir() and not directory.exists():
            raise ArtifactError(
                f"a command that was killed left {directory} under another name; put it back: mv {old} {directory}"
            ) from error


def compile_command(engine: Path, target: str, precision: str) -> str:
    """What builds the engine in the folder `engine` again; its model is known where the folder lies in the model's."""
    in_model = engine.parent.name == "engines"
    command = f"bertforge compile {engine.parent.parent if in_model else 'MODEL'}"
    command += f" --target {target} --precision {precision}"
    return command if in_model and engine.name == f"{target}-{precision}" else f"{command} --out {engine}"


def write_manifest(directory: Path, kind: str, **fields: Any) -> Path:
    """Writes `bertforge.json` into `directory`: its kind, the versions that made it, and `fields`."""
    return write_json(directory / MANIFEST, {"kind": kind, "versions": versions(), **fields})


def read_manifest(directory: Path, *kinds: str) -> dict[str, Any]:
    """Reads `bertforge.json` and checks that its kind is one of `kinds`.

    Raises ArtifactError naming the command that makes the right kind when the folder is missing, is something else,
    or holds a damaged manifest.
    """
    put_right(directory)
    hint = " or ".join(f"`{_MADE_BY[kind]}`" for kind in kinds if kind in _MADE_BY)
    path = directory / MANIFEST
    if not path.is_file():
        if (directory / RUNNING).is_file():
            raise ArtifactError(
                f"{directory} holds a run that has not ended; go on with `bertforge train` and --resume"
            )
        what = "does not exist" if not directory.exists() else f"holds no {MANIFEST}"
        raise ArtifactError(f"{directory} {what}; it should be a folder made by {hint}")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        kind = manifest["kind"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error!r}); make the folder again with {hint}") from error
    if kind not in kinds:
        raise ArtifactError(
            f"{directory} is of kind {kind!r}, but {' or '.join(kinds)} is needed: make one with {hint}"
        )
    if missing := [name for name in _FIELDS.get(kind, ()) if name not in manifest]:
        raise ArtifactError(f"{path} is damaged (it lacks {missing[0]!r}); make the folder again with {hint}")
    return manifest

"""`bertforge.json`: what a folder is, who made it, and the digest of every file in it.

Every folder bertforge writes (prepared data, its tokens, a run, a merged or quantized model, an engine, a fit) holds
one, written last. `read_manifest` is the one door to such a folder: it refuses a wrong kind with the command that makes
the right one, and a folder of which any file is missing or changed with the command that makes it again.

A folder within the folder that has a manifest of its own, such as `engines/` in a model, is checked when it is used.
Hidden files are not part of a folder.

Files are read whole each time a model or engine is loaded, for loading reads them anyway and the digest takes a few
hundredths of that time. Prepared data may be larger than memory, and most of it is read little by little. So a file of
it is read once on each machine, and again when its stamp (inode, size, times) has changed; `.checked.json` keeps the
stamps of those that were whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from bertforge.artifact import to_json, versions
from bertforge.digests import digest_file, read_sealed, sealed, write_sealed
from bertforge.errors import ArtifactError, removal
from bertforge.locks import OLD, PATIENCE, BusyError, beside, leftovers, locked
from bertforge.scales import FORMATS

MANIFEST = "bertforge.json"
RUNNING = "running.json"  # in its place: the recipe and data of a run that has not ended
CHECKPOINT, BEST, START = "checkpoint.safetensors", "best.safetensors", "start.safetensors"
WHILE_TRAINING = (CHECKPOINT, BEST, START, RUNNING)  # RUNNING goes last
_CHECKED = ".checked.json"
_WEIGHTS = "model.safetensors"
_STAMPED = ("data", "tokens")  # kinds that are not read whole each time
_NAMED = 4  # folders in a message
_SETTLED = 1.0  # seconds: a file that changes twice within a tick of the clock keeps its stamp
DECISION = "decision"
_READING = ("recipe", "labels", "schema", "tabular", "data", "base", "inputs")  # how rows are put to a model
_ANSWERING = ("temperature", "label_shares", DECISION, "reference")  # what is made of its logits
_MODEL = (*_READING, "golden")
# What every reader of a kind relies on.
_FIELDS = {
    "data": ("fingerprint", "source", "schema", "rows", "label_counts", "columns", "splits", "made_up"),
    "tokens": ("tokenizer", "fingerprint", "rows"),
    "run": _MODEL,
    "model": _MODEL,
    "quantized": (*_MODEL, "quantization"),
    "engine": (*_MODEL, "target", "precision", "spared"),
    "fit": ("serves",),
    "triton": ("model",),
}
_MADE_BY = {
    "data": "bertforge prepare TABLE --out {}",
    "run": "bertforge train --data DATA --out {}",
    "model": "bertforge merge RUN --out {}",
    "quantized": "bertforge quantize MODEL --data DATA --out {}",
    "engine": "bertforge compile MODEL --target openvino --precision bf16 --out {}",
    "fit": "bertforge fit TABLE --label-column L --out {}",
    "triton": "bertforge export-triton ARTIFACT --out {}",
}

_TOKENS = "remove them, and the next command tokenizes again"

_whole: dict[str, tuple[list[int], str]] = {}
"""Path -> stamp and digest, of files that this process has read."""


def write_manifest(directory: Path, kind: str, *, leave_out: Collection[str] = (), **fields: Any) -> Path:
    """Writes `bertforge.json` into `directory`: its kind, the versions that made it, `fields`, and the digests of its
    files but those that `leave_out` names, which change or go.
    """
    files = {name: digest_file(directory / name) for name in sorted(_files(directory, leave_out))}
    return write_sealed(directory / MANIFEST, {"kind": kind, "versions": versions(), **fields, "files": files})


def amend_manifest(directory: Path, manifest: dict[str, Any]) -> Path:
    """Writes what `read_manifest` gave, changed; the digests of the files stay as they were."""
    return write_sealed(directory / MANIFEST, manifest)


def carried(manifest: dict[str, Any]) -> dict[str, Any]:
    """The fields of a model's manifest that every folder made of the model keeps."""
    return {name: manifest[name] for name in (*_READING, *_ANSWERING) if name in manifest}


def identity(directory: Path) -> str:
    """What a folder calls its `parent`, of which it was made: the hash of the manifest.

    Thresholds, which may be chosen anew at any time, are left out of it: an engine does not hang on them.
    """
    fields = read_sealed(directory / MANIFEST)
    fields.pop(DECISION, None)
    return "sha256:" + hashlib.sha256(to_json(sealed(fields)).encode()).hexdigest()


def read_manifest(directory: Path, *kinds: str) -> dict[str, Any]:
    """The manifest of a folder of one of `kinds` whose every file is as it was written.

    Raises ArtifactError naming the command that makes the right kind when the folder is missing, is something else, or
    has a file, the manifest among them, that is missing or changed.
    """
    manifest = peek_manifest(directory, *kinds)
    if damage := next(_damages(directory, manifest), None):
        raise ArtifactError(f"{damage}; {remake(directory, manifest['kind'], manifest)}")
    return manifest


def served(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The folder that is loaded for `directory`, another one for a folder made by `fit`, and its manifest."""
    manifest = read_manifest(directory, "run", "model", "quantized", "engine", "fit")
    if manifest["kind"] != "fit":
        return directory, manifest
    directory = Path(directory, manifest["serves"])
    return directory, read_manifest(directory, "run", "model", "engine")


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
                clear_training(directory)
    except BusyError:
        if not finished:
            raise
    except OSError as error:  # a place where only reading is allowed
        old = beside(directory.resolve(), OLD)
        if old.is_dir() and not directory.exists():
            raise ArtifactError(
                f"a command that was killed left {directory} under another name; put it back: mv {old} {directory}"
            ) from error


def clear_training(run: Path) -> None:
    """Removes what a run holds while it trains."""
    for name in WHILE_TRAINING:
        (run / name).unlink(missing_ok=True)


def peek_manifest(directory: Path, *kinds: str) -> dict[str, Any]:
    """The manifest alone, whatever became of the files, for one about to write them anew; see `read_manifest`."""
    put_right(directory)
    hint = " or ".join(f"`{_MADE_BY[kind].format('DIR')}`" for kind in kinds if kind in _MADE_BY)
    if len(kinds) > 3:
        hint = " or ".join(f"`{' '.join(_MADE_BY[kind].split()[:2])}`" for kind in kinds)
    path = directory / MANIFEST
    if not path.is_file():
        if (directory / RUNNING).is_file():
            raise ArtifactError(
                f"{directory} holds a run that has not ended; go on with `bertforge train` and --resume"
            )
        what = "does not exist" if not directory.exists() else f"holds no {MANIFEST}"
        again = f"it should be a folder made by {hint}" if hint else f"{_TOKENS}: {removal(directory)}"
        raise ArtifactError(f"{directory} {what}{_meant(directory, kinds)}; {again}")
    try:
        manifest = read_sealed(path)
        kind = str(manifest["kind"])
    except (ValueError, KeyError) as error:  # what is no JSON and no UTF-8 among them
        reason = error if isinstance(error, ValueError) else "it lacks 'kind'"
        again = f"make the folder again with {hint}, after" if hint else _TOKENS
        raise ArtifactError(f"{path} is damaged ({reason}); {again}: {removal(directory)}") from error
    if kind not in kinds:
        raise ArtifactError(
            f"{directory} is of kind {kind!r}, but {' or '.join(kinds)} is needed: make one with {hint}"
        )
    if missing := [name for name in (*_FIELDS.get(kind, ()), "files") if name not in manifest]:
        raise ArtifactError(f"{path} is damaged (it lacks {missing[0]!r}); make the folder again with {hint}")
    return manifest


def _meant(directory: Path, kinds: Collection[str]) -> str:
    """Names folders of one of `kinds` in `directory`, or beside it where it does not exist, the most alike first."""
    inside = directory.is_dir()
    found = []
    for path in sorted((directory if inside else directory.parent).glob(f"*/{MANIFEST}")):
        with suppress(OSError, ValueError, KeyError):
            if read_sealed(path)["kind"] in kinds:
                found.append(path.parent)
    if not inside:
        found.sort(key=lambda folder: SequenceMatcher(None, folder.name, directory.name).ratio(), reverse=True)
    there = ", ".join(map(str, found[:_NAMED])) + (" and others" if len(found) > _NAMED else "")
    return f" ({'in' if inside else 'beside'} it: {there})" if found else ""


def check_folder(directory: Path) -> tuple[str, list[str]]:
    """The kind of the folder that holds a manifest, and what is wrong with it, stamps or not: nothing when all is well.

    Each line names the file and the command that makes it again.
    """
    try:
        kind = str(read_sealed(directory / MANIFEST)["kind"])
        manifest = peek_manifest(directory, kind)
    except (OSError, ValueError, KeyError) as error:
        return "damaged", [
            f"{directory / MANIFEST} is damaged ({error}); make it again with the command that wrote it, after: "
            f"{removal(directory)}"
        ]
    except ArtifactError as error:
        return kind, [str(error)]
    damages = _damages(directory, manifest, anew=True)
    return kind, [f"{damage}; {remake(directory, kind, manifest)}" for damage in damages]


def remake(directory: Path, kind: str, manifest: dict[str, Any]) -> str:
    """What to type to have the folder again."""
    if kind == "tokens":
        return f"{_TOKENS}: {removal(directory)}"
    if kind == "engine":
        command = compile_command(directory, manifest["target"], manifest["precision"])
    else:
        command = _MADE_BY[kind].format(shlex.quote(str(directory)))
    return f"make it again: {removal(directory)}, then `{command}`"


def compile_command(engine: Path, target: str, precision: str) -> str:
    """What builds the engine in the folder `engine` again; its model is known where the folder lies in the model's."""
    in_model = engine.parent.name == "engines"
    command = f"bertforge compile {engine.parent.parent if in_model else 'MODEL'}"
    command += f" --target {target} --precision {precision}"
    command += " --data DATA" if precision in FORMATS else ""  # whose rows calibrate and prove 8 bits
    return command if in_model and engine.name == f"{target}-{precision}" else f"{command} --out {engine}"


def weights_of(manifest: dict[str, Any]) -> str | None:
    """The digest of the weights that a folder holds, or that an engine was compiled from: equal for equal weights. None
    for adapters, whose base lies elsewhere."""
    found: str | None = manifest.get("weights") if manifest["kind"] == "engine" else manifest["files"].get(_WEIGHTS)
    return found


def _files(directory: Path, leave_out: Collection[str], within: str = "") -> Iterator[str]:
    """Names, relative to the folder, of the files that belong to it."""
    for entry in os.scandir(directory):
        name = within + entry.name
        if entry.name.startswith(".") or name in leave_out or name == MANIFEST:
            continue
        if entry.is_file():
            yield name
        elif entry.is_dir() and not Path(entry, MANIFEST).is_file():
            yield from _files(Path(entry), leave_out, f"{name}/")


def _damages(directory: Path, manifest: dict[str, Any], *, anew: bool = False) -> Iterator[str]:
    """Each file that is not as it was written; with `anew`, whatever is known of its stamp."""
    seen = _seen(directory) if manifest["kind"] in _STAMPED else {}
    found: dict[str, list[int]] = {}
    for name, written in manifest["files"].items():
        path = directory / name
        try:
            stamp = _stamp(path)
            settled = _settled(stamp)  # before it is read: meanwhile it may change within the tick of the stamp
            if (anew or seen.get(name) != stamp) and _digest(path, stamp, settled, anew) != written:
                yield f"{path} is damaged: it is not what was written"
                continue
        except FileNotFoundError:
            yield f"{path} is missing"
            continue
        except OSError as error:
            yield f"{path} cannot be read ({error.strerror})"
            continue
        if settled:
            found[name] = stamp
    if manifest["kind"] in _STAMPED and found and found != seen:
        with suppress(OSError):  # a folder that may only be read is read whole each time
            (directory / _CHECKED).unlink(missing_ok=True)
            with (directory / _CHECKED).open("x") as file:  # half-written it counts as none: a kill leaves nothing else
                json.dump(sealed({"machine": platform.node(), "stamps": found}), file)


def _seen(directory: Path) -> dict[str, list[int]]:
    """The stamps of the files that were whole when this machine read them."""
    try:
        kept = read_sealed(directory / _CHECKED)
    except (OSError, ValueError):
        return {}
    return dict(kept["stamps"]) if kept.get("machine") == platform.node() else {}


def _digest(path: Path, stamp: list[int], settled: bool, anew: bool) -> str:
    known, found = _whole.get(str(path), ([], ""))
    if anew or known != stamp:
        found = digest_file(path)
        if settled:
            _whole[str(path)] = (stamp, found)
    return found


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _settled(stamp: list[int]) -> bool:
    return time.time() - max(stamp[-2:]) * 1e-9 > _SETTLED

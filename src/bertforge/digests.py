"""Digests that show damage: of a file, and of a JSON file by itself.

xxh3 with 128 bits runs at the speed of memory, so a gigabyte of weights costs a fraction of a second. It is no
cryptographic hash: it finds flipped bits, lost pages and swapped files, and not what somebody made on purpose.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import xxhash

from bertforge.artifact import write_json

_DIGEST = "digest"


def digest(content: bytes) -> str:
    """`xxh3:<32 hex digits>` of some bytes."""
    return f"xxh3:{xxhash.xxh3_128_hexdigest(content)}"


def digest_file(path: Path) -> str:
    """`digest` of a file's content, read in pieces."""
    with path.open("rb") as file:
        return f"xxh3:{hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()}"  # type: ignore[arg-type]


def write_sealed(path: Path, fields: dict[str, Any]) -> Path:
    """Atomically writes `fields` as JSON, with the digest of all of them."""
    return write_json(path, sealed(fields))


def sealed(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` with the digest of all of them."""
    return {**fields, _DIGEST: _of(fields)}


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote; raises ValueError with the reason when the file is anything else."""
    try:
        fields = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(fields, dict):
        raise ValueError("it is no JSON object")
    if (found := fields.pop(_DIGEST, None)) is None:
        raise ValueError("it has no digest: an earlier version wrote it, or it was changed")
    if found != _of(fields):
        raise ValueError("its digest is another: it was changed after it was written")
    return fields


def _of(fields: dict[str, Any]) -> str:
    return digest(json.dumps(fields).encode())

"""API keys: a file with a line for each client, `NAME KEY`.

The name stands in logs and metrics and has its own turn in the queue; the key stands nowhere else. What is kept of keys
is their SHA-256, and each is compared with all of them in constant time, so that no answer tells how much of a guess
was right or where in the file it was.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bertforge.errors import UsageError

_LINE = re.compile(r"([A-Za-z0-9._-]{1,64})\s+([!-~]+)")
_SHORTEST = 16  # characters: fewer can be tried out


@dataclass(frozen=True)
class Keys:
    """Who may ask."""

    known: tuple[tuple[str, bytes], ...]
    """Names and digests."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Empty lines, and those that begin with #, count for nothing; raises UsageError naming the line."""
        known: dict[str, bytes] = {}
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise UsageError(f"--api-keys {path} cannot be read ({reason})") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip() or line.startswith("#"):
                continue
            where, found = f"line {number} of --api-keys {path}", _LINE.fullmatch(line.strip())
            if found is None:  # nor is the line shown, which may hold a key
                raise UsageError(f"{where} is not NAME KEY; a name is made of letters, digits and . _ -")
            name, key = found.groups()
            if len(key) < _SHORTEST:
                raise UsageError(
                    f"{where} has a key of {len(key)} characters; {_SHORTEST} are the least: openssl rand -hex 32"
                )
            if name in known or _digest(key) in known.values():
                raise UsageError(f"{where} has the name or the key of an earlier line; give each client its own")
            known[name] = _digest(key)
        if not known:
            raise UsageError(f"--api-keys {path} holds no key; write a line for each client: NAME KEY")
        return cls(tuple(known.items()))

    def client(self, authorization: str) -> str | None:
        """Whose key a header `Bearer KEY` holds; None for nobody's."""
        scheme, _, key = authorization.partition(" ")
        given, found = _digest(key.strip()), None
        for name, known in self.known:
            if hmac.compare_digest(given, known):
                found = name
        return found if scheme.lower() == "bearer" else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()

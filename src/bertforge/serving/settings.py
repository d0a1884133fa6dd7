"""What `bertforge serve` was told: the whole service, and what each process needs to know of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

READY, ALIVE = b"ready\n", b"alive\n"
"""What a process says to its supervisor on its standard output: a front once it can answer, the engine process once a
second. The engine process also says which folders it serves, as JSON: `EngineOrder.serving`."""
OURS = "bertforge-serve-"
"""What the name of the folder begins with that a service keeps its socket and counters in."""
RELOAD = b"reload\n"
"""What a supervisor says to its processes on their standard input, which they end with."""


@dataclass(frozen=True)
class Limits:
    """Of one request."""

    max_body_mb: float = 8.0
    """MiB of its body."""
    max_texts: int = 1024
    """Texts, or rows of columns."""
    max_characters: int = 100_000
    """Of each text or cell."""
    max_depth: int = 16
    """Of arrays and objects in each other."""

    @property
    def body(self) -> int:
        """Bytes."""
        return int(self.max_body_mb * (1 << 20))


@dataclass(frozen=True)
class Pace:
    """How much the engine process takes on at a time."""

    latency: float = 0.05
    """Seconds that a batch may take."""
    queue: float = 2.0
    """Seconds of work that may wait."""


@dataclass(frozen=True)
class Service:
    """What is served, and how."""

    models: Mapping[str, Path]
    """Folders by the names that clients use; the first answers where a request names none."""
    adapters: Mapping[str, Path] = field(default_factory=dict)
    """LoRA runs on the base of one of `models`, by the names that clients use."""
    fronts: int = 1
    limits: Limits = field(default_factory=Limits)
    pace: Pace = field(default_factory=Pace)
    drain: float = 30.0
    """Seconds for requests to be answered once the service is told to end."""
    api_keys: Path | None = None
    """None lets everybody in."""
    precision: str = "auto"
    """Of runs and merged models, as `Predictor.load` takes it."""
    prior: Mapping[str, float] | None = None
    """Shares of labels in what is asked; None for those of training, or of the folder's thresholds."""


@dataclass(frozen=True)
class EngineOrder:
    """What the engine process is to do."""

    socket: str
    """Path of the Unix socket it makes."""
    models: dict[str, str]
    """Folder of each model, by the name that clients use."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Run of each adapter, by the name that clients use; it is computed beside the first of `models` that can."""
    precision: str = "auto"
    """Of runs and merged models, as `Predictor.load` takes it."""
    pace: Pace = field(default_factory=Pace)
    prior: dict[str, float] | None = None
    """Shares of labels in what is asked: a folder whose thresholds were chosen for others is not served."""
    serving: dict[str, str] | None = None
    """Of a process that is started again: folders to begin with, by the names of models and adapters, where those above
    may have become others: links that point elsewhere now."""

    def command(self) -> list[str]:
        """Starts the process; it ends with its standard input, which should be a pipe."""
        return [sys.executable, "-m", "bertforge.serving.process", json.dumps(asdict(self))]

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `command`'s last argument."""
        values: dict[str, Any] = json.loads(text)
        return cls(**values | {"pace": Pace(**values["pace"])})


@dataclass(frozen=True)
class FrontOrder:
    """What a front is to do."""

    listening: int
    """File descriptor of the socket that connections come from."""
    engine: str
    """Path of the engine's socket."""
    limits: Limits
    counters: str
    """File of its own for the counters of `monitor`."""
    api_keys: str | None
    prior: Mapping[str, float] | None
    again: bool = False
    """Whether one before it has died."""

    def command(self) -> list[str]:
        """Starts the process; it ends with its standard input, which should be a pipe."""
        return [sys.executable, "-m", "bertforge.serving.front", json.dumps(asdict(self))]

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `command`'s last argument."""
        values: dict[str, Any] = json.loads(text)
        return cls(**values | {"limits": Limits(**values["limits"])})

"""`GET /v1/monitor`, and the same for Prometheus: whether what is asked looks like what the model learnt from.

Each front counts the rows that it answers, some requests at a time, for to count one takes 0.1 ms and a hundred hardly
more. Once a second, while there are any, it writes its counters into a file of its own beside the engine's socket, and
whichever front is asked adds up all files. A front that was started again writes the file that it wrote before.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from fastapi import APIRouter, Response
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel, ConfigDict, Field

from bertforge.artifact import write_atomic
from bertforge.evaluation.drift import Monitor, Reference, drift
from bertforge.inference.codec import Codec, is_blank
from bertforge.serving.preparing import Prepared, joined

if TYPE_CHECKING:
    from bertforge.serving.models import Model, Models

_EVERY = 1.0  # seconds between two writes
_TOGETHER = 64  # requests that are counted at once


class Counters:
    """What this front was asked, and the others as they last wrote it."""

    def __init__(self, file: Path) -> None:
        """`file` is this front's own; those of the others differ in their number."""
        self._file = file
        self._counted: dict[str, _Counted] = {}  # by the model's name
        self._due = False

    def add(self, name: str, generation: str, codec: Codec, prepared: Prepared, logits: np.ndarray) -> None:
        """Rows that a model answered with `logits` `[rows, labels]`; in a running loop."""
        counted = self._counted.get(name)
        if counted is None or counted.generation != generation:
            counted = self._counted[name] = _Counted(generation, codec)
        counted.add(prepared, logits)
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_later(_EVERY, self._write)

    def of(self, name: str, generation: str) -> list[Mapping[str, Sequence[int]]]:
        """Snapshots of all fronts, of which this one's is of now."""
        others = self._file.parent.glob(f"{self._file.stem.rpartition('-')[0]}-*{self._file.suffix}")
        found = [self._snapshots(), *(json.loads(file.read_text()) for file in others if file != self._file)]
        return [counted[name][generation] for counted in found if generation in counted.get(name, {})]

    def _write(self) -> None:
        self._due = False
        write_atomic(self._file, json.dumps(self._snapshots()))

    def _snapshots(self) -> dict[str, dict[str, dict[str, list[int]]]]:
        known = [*self._counted.items()]  # a thread may ask
        return {name: {counted.generation: found} for name, counted in known if (found := counted.snapshot())}


class _Counted:
    """The rows of one model."""

    def __init__(self, generation: str, codec: Codec) -> None:
        self.generation = generation
        self._codec, reference = codec, Reference.of(codec.manifest)
        self._monitor = None if reference is None else Monitor(reference, codec.transform)
        self._waiting: list[tuple[Prepared, np.ndarray]] = []

    def add(self, prepared: Prepared, logits: np.ndarray) -> None:
        self._waiting.append((prepared, logits))
        if len(self._waiting) >= _TOGETHER:
            self._count()

    def snapshot(self) -> dict[str, list[int]] | None:
        """None where an earlier version trained the model."""
        self._count()
        return None if self._monitor is None else self._monitor.snapshot()

    def _count(self) -> None:
        waiting, self._waiting = self._waiting, []
        if self._monitor is None or not waiting:
            return
        rows = joined([prepared for prepared, _ in waiting])
        unknown = rows.ids == self._codec.tokenizer.unk_id  # [tokens]
        starts = np.cumsum(rows.lengths) - rows.lengths
        predicted = np.concatenate([logits.argmax(axis=1) for _, logits in waiting])
        predicted[[is_blank(text) for text in rows.texts]] = -1
        self._monitor.add(rows.lengths, np.add.reduceat(unknown, starts, dtype=np.int64), predicted, rows.columns)


class _Told(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Drifted(_Told):
    """One quantity of the rows."""

    psi: float | None = Field(description="Population stability index, from 0 on; null while nothing was counted.")
    by_chance: float | None = Field(description="The index that so few rows exceed by chance once in a hundred times.")
    drift: Literal["none", "some", "much"] = Field(description="Beside both.")
    bins: list[str]
    training: list[float] = Field(description="Share of each bin in training.")
    served: list[float] | None = Field(description="Share of each bin among the rows that were asked.")


class Monitored(_Told):
    """Rows that were asked beside those of training."""

    model: str
    rows: int = Field(description="That were counted: the newest.")
    missing: str | None = Field(None, description="Why there is nothing to tell; absent where there is.")
    quantities: dict[str, Drifted]


def told(models: Models, model: Model) -> dict[str, Any]:
    """What `/v1/monitor` says of a model."""
    name, generation = model.served.name, model.served.generation
    found = drift(Reference.of(model.codec.manifest), models.counters.of(name, generation))
    return {"model": name, **found}


class Drift(Collector):
    """The indices of all models, for Prometheus."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> list[Metric]:
        """See Collector."""
        labels = ["model", "quantity"]
        index = GaugeMetricFamily("bertforge_drift_psi", "Population stability index beside training.", labels=labels)
        chance = GaugeMetricFamily("bertforge_drift_by_chance", "What chance exceeds once in 100 times.", labels=labels)
        for model in [*self._models.models.values()]:
            for name, quantity in told(self._models, model)["quantities"].items():
                if quantity["psi"] is not None:
                    index.add_metric([model.served.name, name], quantity["psi"])
                    chance.add_metric([model.served.name, name], quantity["by_chance"])
        return [index, chance]


def router(models: Models) -> APIRouter:
    """The route."""
    from bertforge.serving.classify import refused

    found = APIRouter(prefix="/v1", tags=["operation"])

    @found.get("/monitor", response_model=Monitored, responses=refused(404, 422, 503))
    async def monitor(model: str | None = None) -> Response:
        """Whether the newest rows look like those that the model was trained on."""
        content = await asyncio.to_thread(told, models, models.get(model))
        return Response(json.dumps(content), media_type="application/json")

    return found

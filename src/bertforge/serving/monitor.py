"""`GET /v1/monitor`, and the same for Prometheus: whether what is asked looks like what the model learnt from."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import Field

from bertforge.evaluation.drift import Reference, drift
from bertforge.serving.counters import Snapshots
from bertforge.serving.describe import PlainRoute, Told, refused
from bertforge.serving.models import Model, Models


class Drifted(Told):
    """One quantity of the rows."""

    psi: float | None = Field(description="Population stability index, from 0 on; null while nothing was counted.")
    by_chance: float | None = Field(description="The index that so few rows exceed by chance once in a hundred times.")
    drift: Literal["none", "some", "much"] | None = Field(description="Beside both; null while rows are too few.")
    bins: list[str]
    training: list[float] = Field(description="Share of each bin in training.")
    served: list[float] | None = Field(description="Share of each bin among the rows that were asked.")


class Monitored(Told):
    """Rows that were asked beside those of training."""

    model: str
    rows: int = Field(description="Rows counted, the newest ones.")
    fewest: int = Field(description="Rows from which on they are compared; fewer tell nothing.")
    missing: str | None = Field(None, description="Why there is nothing to tell; absent where there is.")
    quantities: dict[str, Drifted]


def told(model: Model, counted: list[Snapshots]) -> dict[str, Any]:
    """What `/v1/monitor` says of a model, from the counts of all fronts."""
    name, generation = model.served.name, model.served.generation
    rows = [counts[name][generation] for counts in counted if generation in counts.get(name, {})]
    return {"model": name, **drift(Reference.of(model.codec.manifest), rows)}


class Drift(Collector):
    """The indices of all models that were asked often enough, for Prometheus."""

    def __init__(self, models: Models) -> None:
        """In the event loop; `collect` may be called in a thread."""
        self._models, self._counters, self._own = (
            [*models.models.values()],
            models.counters,
            models.counters.snapshots(),
        )

    def collect(self) -> list[Metric]:
        """See Collector."""
        labels = ["model", "quantity"]
        index = GaugeMetricFamily("bertforge_drift_psi", "Population stability index beside training.", labels=labels)
        chance = GaugeMetricFamily("bertforge_drift_by_chance", "What chance exceeds once in 100 times.", labels=labels)
        counted = [self._own, *self._counters.others()]
        for model in self._models:
            for name, quantity in told(model, counted)["quantities"].items():
                if quantity["drift"] is not None:
                    index.add_metric([model.served.name, name], quantity["psi"])
                    chance.add_metric([model.served.name, name], quantity["by_chance"])
        return [index, chance]


def router(models: Models) -> APIRouter:
    """The route."""
    found = APIRouter(prefix="/v1", tags=["operation"], route_class=PlainRoute)
    name = {"name": "model", "in": "query", "required": False, "schema": {"type": "string"}}

    @found.get("/monitor", response_model=Monitored, responses=refused(404, 503), openapi_extra={"parameters": [name]})
    async def monitor(request: Request) -> Response:
        """Whether the newest rows look like those that the model was trained on."""
        model, own = models.get(request.query_params.get("model")), models.counters.snapshots()
        content = await asyncio.to_thread(lambda: told(model, [own, *models.counters.others()]))
        return Response(json.dumps(content), media_type="application/json")

    return found

"""`POST /v1/classify` and `GET /v1/models`."""

from __future__ import annotations

import json
import time
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from bertforge.serving import metrics
from bertforge.serving.describe import Input, ModelTold, PlainRoute, Told, json_body, refused
from bertforge.serving.door import call_of
from bertforge.serving.models import Model, Models
from bertforge.serving.requests import read_question


class Question(Told):
    """What to classify."""

    inputs: Input | list[Input] = Field(
        description="A text; or, where the model reads columns, an object with those of its training table; "
        "or a list of either."
    )
    model: str | None = Field(None, description="One of /v1/models; the first where it is left out.")
    timeout_ms: int | None = Field(
        None, ge=1, le=600_000, description="After so long without an answer: 504, and the rows leave the queue."
    )


class Result(Told):
    """Of one input."""

    label: str | int | bool | None = Field(description="Null for a text that is blank.")
    probability: float | None = Field(description="Of the label.")
    probabilities: dict[str, float] | None = Field(description="Of every label.")
    decision: str | int | bool | None = Field(
        None, description="The label, or `abstain`: a person should look. Absent where no thresholds were chosen."
    )
    tokens: int = Field(description="Tokens that the model read.")
    tokens_cut: int = Field(description="Tokens cut from the end of the text, which the model did not read.")
    problem: str | None = Field(None, description="What could not be read and counts as missing; absent where all was.")


class Classified(Told):
    """The answer."""

    id: str
    model: ModelTold
    results: list[Result] = Field(description="In the order of the inputs.")


class ModelCard(Told):
    """One model."""

    name: str
    id: str
    kind: str = Field(description="run, model, quantized or engine.")
    engine: str
    precision: str
    device: str
    labels: list[str]
    text_columns: list[str] = Field(description="Joined by a space, they are the text.")
    columns: list[str] = Field(description="Others that an input must hold; none where a text is enough.")
    max_length: int = Field(description="Tokens a text is cut to.")
    thresholds: dict[str, float] | None = Field(description="From which probability on a label is decided.")
    prior: dict[str, float] | None = Field(description="Shares of the labels; null where those of training are taken.")
    adapter_of: str | None = Field(description="The model on whose base this adapter runs.")


class ModelCards(Told):
    """All models."""

    models: list[ModelCard]


def router(models: Models) -> APIRouter:
    """The routes."""
    found = APIRouter(prefix="/v1", tags=["classify"], route_class=PlainRoute)

    @found.post(
        "/classify",
        response_model=Classified,
        responses=refused(400, 404, 422, 429, 503, 504),
        openapi_extra=json_body(Question),
    )
    async def classify(request: Request) -> Response:
        """Label one text or many, with calibrated probabilities."""
        call = call_of(request)
        inputs, name, deadline = await read_question(request, models.limits, call.arrived)
        answers = await models.answer(call, inputs, name, deadline=deadline)
        began = time.monotonic()
        content = json.dumps({"id": call.id, "model": answers.model.told, "results": answers.results()})
        metrics.stage("write", time.monotonic() - began)
        return Response(content, media_type="application/json")

    @found.get("/models", response_model=ModelCards, responses=refused(503))
    async def list_models(request: Request) -> Response:
        """The models, the first of which answers where none is named."""
        models.get(None)
        cards = {"models": [_card(model) for model in models.models.values()]}
        return Response(json.dumps(cards), media_type="application/json")

    return found


def _card(model: Model) -> dict[str, Any]:
    codec, told = model.codec, model.served
    return {
        "name": told.name,
        "id": told.generation,
        "kind": codec.manifest["kind"],
        "engine": told.engine,
        "precision": told.precision,
        "device": told.device,
        "labels": list(codec.label_names),
        "text_columns": list(model.columns.texts),
        "columns": list(model.columns.needed),
        "max_length": codec.max_length,
        "thresholds": codec.policy and dict(zip(codec.label_names, codec.policy.thresholds, strict=True)),
        "prior": codec.prior and dict(zip(codec.label_names, codec.prior, strict=True)),
        "adapter_of": told.adapter_of,
    }

"""`POST /v1/explain`: the words and columns that pushed the model to its answer, and mistakes it made on similar texts.

The model is asked some hundred times over (leave_one_out.py), by way of the same queue as everybody. These rows are of
a client of their own in it, so that who has something explained keeps nobody waiting, himself least of all. Nor do
they count as what is asked: `/v1/monitor` would tell of texts that lack a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from bertforge.errors import ArtifactError
from bertforge.evaluation.groups import excerpt
from bertforge.evaluation.mistakes import Mistakes
from bertforge.inference.codec import is_blank
from bertforge.serving import metrics
from bertforge.serving.describe import Input, ModelTold, PlainRoute, Told, json_body, refused
from bertforge.serving.door import Call, call_of
from bertforge.serving.inputs import Row, read_inputs
from bertforge.serving.leave_one_out import Pushes, leave_one_out
from bertforge.serving.models import Model, Models
from bertforge.serving.requests import RequestError, read_question


class Subject(Told):
    """What to explain."""

    inputs: Input = Field(description="One text, or one object with the columns of the training table.")
    model: str | None = Field(None, description="One of /v1/models; the first where it is left out.")
    timeout_ms: int | None = Field(None, ge=1, le=600_000, description="After so long without an answer: 504.")


class Word(Told):
    """A word, or neighbouring words of a long text that were left out together."""

    field: str | None = Field(description="The text column that it stands in; null where the input is a text.")
    start: int = Field(description="Characters (Unicode code points) of the field before it.")
    end: int
    text: str
    push: float = Field(description="The label's probability less what it is without the word.")


class Column(Told):
    """A column that had a value."""

    name: str
    value: str
    push: float = Field(description="The label's probability less what it is when the column is missing.")


class SimilarMistake(Told):
    """A text that the model gave the same label, wrongly, when it was evaluated."""

    text: str = Field(description="Its start.")
    true: str
    predicted: str
    probability: float


class Explained(Told):
    """The answer."""

    id: str
    model: ModelTold
    label: str | int | bool | None = Field(description="Null for a text that is blank.")
    probability: float | None
    words: list[Word] = Field(description="In the order of the text, as far as the model read it.")
    columns: list[Column]
    mistakes: list[SimilarMistake] = Field(description="The most similar first; none where the model has no report.")
    note: str = Field(description="What was left together or left out, for a text is asked about in bounded time.")


def router(models: Models) -> APIRouter:
    """The route."""
    found = APIRouter(prefix="/v1", tags=["explain"], route_class=PlainRoute)

    @found.post(
        "/explain",
        response_model=Explained,
        responses=refused(400, 404, 422, 429, 503, 504),
        openapi_extra=json_body(Subject),
    )
    async def explain(request: Request) -> Response:
        """Tell which words and columns of one input speak for the label, and which against it."""
        call = call_of(request)
        inputs, name, deadline = await read_question(request, models.limits, call.arrived)
        asking = replace(call, client=f"{call.client} (explain)")
        while True:
            try:
                told = await _explained(models, asking, inputs, models.get(name), deadline)
                break
            except _ReplacedError:  # by a new one, which answers from the beginning
                continue
        call.rows = asking.rows
        metrics.rows(told["model"]["name"], 1)
        return Response(json.dumps({"id": call.id, **told}), media_type="application/json")

    return found


class _ReplacedError(Exception):
    """Another model has the name now."""


async def _explained(models: Models, call: Call, inputs: Any, model: Model, deadline: float) -> dict[str, Any]:
    """The answer, but for the request's id; raises RequestError, and _ReplacedError where `model` was swapped."""
    row = _only(read_inputs(inputs, model.columns, models.limits))

    async def probabilities(rows: list[Row]) -> list[list[float]]:
        answers = await models.answer(call, rows, model.served.name, deadline=deadline, watched=False)
        if answers.model is not model:
            raise _ReplacedError
        chances: list[list[float]] = answers.probabilities.tolist()
        return chances

    text = row if isinstance(row, str) else " ".join(row[name] for name in model.columns.texts)
    if is_blank(text):
        nothing: dict[str, Any] = {
            "label": None,
            "probability": None,
            "words": [],
            "columns": [],
            "mistakes": [],
            "note": "",
        }
        return {"model": model.told, **nothing}
    (whole,) = await probabilities([row])
    best = max(range(len(whole)), key=whole.__getitem__)

    async def of_label(rows: list[Row]) -> list[float]:
        return [chances[best] for chances in await probabilities(rows)]

    def is_full(before: str) -> bool:
        return len(model.codec.tokenizer.encode([before])[0]) >= model.codec.max_length

    columns = model.columns
    pushes = await leave_one_out(row, whole[best], columns.texts, columns.needed, is_full, of_label)
    return {"model": model.told, **_told(model, row, best, whole[best], pushes, text)}


def _only(rows: list[Row]) -> Row:
    if len(rows) > 1:
        raise RequestError(422, f"inputs has {len(rows):,} entries; send one at a time", "inputs")
    return rows[0]


def _told(model: Model, row: Row, best: int, probability: float, pushes: Pushes, text: str) -> dict[str, Any]:
    """All but the request's id and the model, JSON-ready."""
    cells: Mapping[Any, str] = {None: row} if isinstance(row, str) else row
    similar, note = _similar(model, text, best)
    return {
        "label": model.codec.schema.original_labels()[best],
        "probability": probability,
        "words": [
            {
                "field": part.field,
                "start": part.start,
                "end": part.end,
                "text": cells[part.field][part.start : part.end],
                "push": part.push,
            }
            for part in pushes.passages
        ],
        "columns": [{"name": name, "value": cells[name], "push": push} for name, push in pushes.columns.items()],
        "mistakes": similar,
        "note": "; ".join(filter(None, (pushes.note, note))),
    }


def _similar(model: Model, text: str, best: int) -> tuple[list[dict[str, Any]], str]:
    """Mistakes on similar texts, and what there is to say of their file."""
    try:
        found = _mistakes(model.served.folder, model.served.generation).like(text, model.codec.label_names[best])
    except ArtifactError:
        return [], "no similar mistakes are shown, for their file is damaged: bertforge evaluate writes it again"
    return [
        {"text": excerpt(one.text), "true": one.true, "predicted": one.predicted, "probability": one.probability}
        for one in found
    ], ""


@lru_cache(maxsize=16)
def _mistakes(folder: str, generation: str) -> Mistakes:
    """Of a folder, read once while its model is the same."""
    return Mistakes.find(Path(folder))

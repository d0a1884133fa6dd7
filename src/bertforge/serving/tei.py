"""`POST /predict` and `GET /info` of text-embeddings-inference, whose clients then need another address and no more.

Shapes, defaults and errors are those of its router at commit 0d124dc9, which sorts labels by their score and calls an
error Validation, not validation as its document has it:

    https://github.com/huggingface/text-embeddings-inference/blob/0d124dc9773be6ac5a9a57d8439aba9bbbf33273/router/src/http

As there, `POST /` is the same, because Hugging Face's InferenceClient asks the base address. It sends the field
`parameters`, which text-embeddings-inference ignores: the client then takes the first label for the whole answer. Here
the field is heeded, and the answer to one text is a list in a list, which is what that client expects.

These clients name no model, so the first answers, and it must read text alone. A pair of texts is refused, for no model
here reads two, and so is truncation from the left: models are trained on the beginnings of texts.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from bertforge import __version__
from bertforge.inference.codec import is_blank
from bertforge.serving.describe import PlainRoute, Told, json_body, refused
from bertforge.serving.door import call_of
from bertforge.serving.models import Answers, Model, Models
from bertforge.serving.requests import RequestError, check_fields, kind_of, read_json

One = Annotated[list[str], Field(min_length=1, max_length=1)]
_TYPES = {424: "Backend", 429: "Overloaded", 500: "Backend", 503: "Unhealthy"}  # others: Validation


class Refused(Told):
    """Every error."""

    error: str
    error_type: Literal["Unhealthy", "Backend", "Overloaded", "Validation", "Empty"]


class HubParameters(Told):
    """What Hugging Face's InferenceClient sends."""

    top_k: int | None = Field(None, ge=1, description="So many labels, the likeliest.")
    function_to_apply: Literal["softmax", "none"] | None = Field(None, description="none: raw scores.")


class PredictRequest(Told):
    """What to classify."""

    inputs: str | One | list[One] = Field(description="A text, or a list of lists of one text.")
    raw_scores: bool = Field(False, description="Logits in the place of calibrated probabilities.")
    truncate: bool | None = Field(None, description="False refuses a text that is longer than the model reads.")
    truncation_direction: Literal["left", "Left", "right", "Right"] = Field("right", description="The text's end goes.")
    parameters: HubParameters | None = None


class Prediction(Told):
    """One label."""

    score: float
    label: str


class Classifier(Told):
    """The labels."""

    id2label: dict[str, str]
    label2id: dict[str, int]


class ModelType(Told):
    """What the model does."""

    classifier: Classifier


class Info(Told):
    """The model that answers."""

    model_id: str
    model_sha: str = Field(description="The digest of its folder.")
    model_dtype: str
    served_model_name: str
    model_type: ModelType
    max_input_length: int = Field(description="Tokens a text is cut to.")
    max_client_batch_size: int
    auto_truncate: bool
    version: str


class _EmptyError(RequestError):
    """A text that is none."""


def form(error: RequestError, request_id: str) -> tuple[int, dict[str, Any]]:
    """An error as text-embeddings-inference has it; a limit of a field is a 422 there."""
    status = 422 if error.status == 413 and error.field else error.status
    kind = "Empty" if isinstance(error, _EmptyError) else _TYPES.get(status, "Validation")
    return status, {"error": error.message, "error_type": kind}


def router(models: Models) -> APIRouter:
    """The routes."""
    found = APIRouter(tags=["text-embeddings-inference"], route_class=PlainRoute)
    answers = list[Prediction] | list[list[Prediction]]
    statuses = refused(400, 422, 424, 429, 503, form=Refused)

    @found.post("/", response_model=answers, responses=statuses, openapi_extra=json_body(PredictRequest))
    @found.post("/predict", response_model=answers, responses=statuses, openapi_extra=json_body(PredictRequest))
    async def predict(request: Request) -> Response:
        """Label a text or a batch, the likeliest label first."""
        given = await read_json(request, models.limits)
        check_fields(given, "inputs", "raw_scores", "truncate", "truncation_direction", "parameters")
        model, hub = _first(models), _hub(given)
        inputs, several = _texts(given.get("inputs"))
        raw = _flag(given, "raw_scores") or hub.get("function_to_apply") == "none"
        whole = _flag(given, "truncate") is False
        left = _direction(given)
        answered = await models.answer(call_of(request), inputs, model.served.name)
        _check_whole(answered, whole=whole, left=left)
        labels = [_sorted(answered, row, raw=raw)[: hub.get("top_k")] for row in range(len(answered.probabilities))]
        content = labels if several or "parameters" in given else labels[0]
        return Response(json.dumps(content), media_type="application/json")

    @found.get("/info", response_model=Info, responses=refused(424, 503, form=Refused))
    async def info(request: Request) -> Response:
        """The model that answers."""
        model = _first(models)
        names = model.codec.label_names
        content = {
            "model_id": model.served.name,
            "model_sha": model.served.generation,
            "model_dtype": model.served.precision,
            "served_model_name": model.served.name,
            "model_type": {
                "classifier": {
                    "id2label": {str(place): name for place, name in enumerate(names)},
                    "label2id": {name: place for place, name in enumerate(names)},
                }
            },
            "max_input_length": model.codec.max_length,
            "max_client_batch_size": models.limits.max_texts,
            "auto_truncate": True,
            "version": __version__,
        }
        return Response(json.dumps(content), media_type="application/json")

    return found


def _first(models: Models) -> Model:
    model = models.get(None)
    if model.columns.beside:
        name = model.served.name
        raise RequestError(424, f"{name} reads {model.columns}, not a text alone; ask it at /v1/classify")
    return model


def _texts(given: Any) -> tuple[Any, bool]:
    """`inputs` for `Models.answer`, and whether they are a batch."""
    if not isinstance(given, list):
        if isinstance(given, dict):
            raise RequestError(422, "inputs is an object; send a text, or a list of lists of one text", "inputs")
        return given, False
    if given and isinstance(given[0], str):
        _check_single(given, "inputs")
        return given, False
    for place, one in enumerate(given):
        if not isinstance(one, list):
            raise RequestError(422, f"inputs[{place}] is {kind_of(one)}; send a list of one text", f"inputs[{place}]")
        _check_single(one, f"inputs[{place}]")
    return [one[0] for one in given], True


def _check_single(texts: list[Any], name: str) -> None:
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise RequestError(
            422, f'{name} is not one text; a batch is [["first"], ["second"]], and pairs are not read', name
        )


def _flag(given: dict[str, Any], name: str) -> bool | None:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(422, f"{name} is {kind_of(value)}; send true or false", name)
    return value


def _direction(given: dict[str, Any]) -> bool:
    """Whether it is the left."""
    name = "truncation_direction"
    if (value := given.get(name, "right")) not in ("left", "Left", "right", "Right"):
        raise RequestError(422, f"{name} is not right or left", name)
    return str(value).lower() == "left"


def _hub(given: dict[str, Any]) -> dict[str, Any]:
    found = {} if given.get("parameters") is None else given["parameters"]
    if not isinstance(found, dict):
        raise RequestError(422, f"parameters is {kind_of(found)}; send an object, or leave it out", "parameters")
    check_fields(found, "top_k", "function_to_apply")
    if found.get("function_to_apply") not in (None, "softmax", "none"):
        raise RequestError(422, "function_to_apply is not softmax or none, which the model has", "function_to_apply")
    if (top := found.get("top_k")) is not None and (type(top) is not int or top < 1):
        raise RequestError(422, "top_k is no whole number from 1 on", "top_k")
    return found


def _check_whole(answers: Answers, *, whole: bool, left: bool) -> None:
    """Raises RequestError for a text that is blank, or that was cut as it must not be."""
    most = answers.model.codec.max_length
    for place, (text, tokens) in enumerate(zip(answers.prepared.texts, answers.prepared.whole.tolist(), strict=True)):
        name = f"inputs[{place}]"
        if is_blank(text):
            raise _EmptyError(400, f"{name} holds no text", name)
        if tokens > most and (whole or left):
            how = "send truncate: true" if whole else "truncation_direction must be right"
            raise RequestError(422, f"{name} has {tokens:,} tokens; the model reads {most:,}, so {how}", name)


def _sorted(answers: Answers, row: int, *, raw: bool) -> list[dict[str, Any]]:
    """The likeliest label first; of equal ones the last, as there."""
    scores = (answers.logits if raw else answers.probabilities)[row].tolist()
    found = [
        {"score": score, "label": label} for score, label in zip(scores, answers.model.codec.label_names, strict=True)
    ]
    return sorted(found, key=lambda one: one["score"])[::-1]

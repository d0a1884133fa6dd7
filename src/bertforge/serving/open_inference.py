"""`/v2`: the Open Inference Protocol, as Triton, KServe and their clients speak it over HTTP.

    https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md

Every column that a model reads is a tensor with a cell for each row; a model that reads a text alone has one tensor,
`text`. The answer holds `label`, `probability`, `probabilities` and, where thresholds were chosen, `decision`. Only the
two ends differ from `/v1/classify`: tensors become `inputs`, and answers become tensors (`tensors.py`). What lies
between, limits, queue and deadline, is that of `Models.answer`.

The version of a model is the digest of its folder, so who names one is never answered by another model. Parameters that
mean nothing here are ignored, as the protocol has it, but for those that would change the answer: they are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from bertforge import __version__
from bertforge.serving.describe import PlainRoute, json_body, refused
from bertforge.serving.door import call_of
from bertforge.serving.models import Answers, Model, Models
from bertforge.serving.requests import RequestError, check_fields, check_media_type, parse, seconds_of, text_of
from bertforge.serving.tensors import objects, parameters_of, read_tensors, written

_HEADER = "inference-header-content-length"
_TEXT = {"type": "string"}
_MICROSECOND = 1e-6  # the unit of Triton's `timeout`
Parameters = dict[str, str | int | float | bool]


class _Sent(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class Refused(_Sent):
    """Every error."""

    error: str


class Server(_Sent):
    """The service."""

    name: str
    version: str
    extensions: list[str]


class Kind(_Sent):
    """A tensor of a model."""

    name: str
    datatype: str
    shape: list[int] = Field(description="-1 for the number of rows.")


class Description(_Sent):
    """A model."""

    name: str
    versions: list[str] = Field(description="The digest of its folder.")
    platform: str
    inputs: list[Kind]
    outputs: list[Kind]


class Live(_Sent):
    """Whether the service runs."""

    live: bool


class Ready(_Sent):
    """Whether requests can be answered."""

    ready: bool
    name: str | None = Field(None, description="Of the model; absent where all are meant.")


class InputTensor(_Sent):
    """One column of the rows."""

    name: str
    shape: list[int] = Field(description="[rows] or [rows, 1].")
    datatype: str = Field(description="BYTES; for a column that holds no text also BOOL, INT64, FP64 and their kin.")
    parameters: Parameters | None = Field(None, description="`binary_data_size`: the bytes are behind the JSON.")
    data: list[Any] | None = Field(None, description="Unless they are.")


class WantedTensor(_Sent):
    """One of the answer."""

    name: str
    parameters: Parameters | None = Field(None, description="`binary_data`: as bytes behind the JSON.")


class InferRequest(_Sent):
    """What to classify."""

    id: str | None = None
    model_name: str | None = Field(None, description="As in the address.")
    parameters: Parameters | None = Field(
        None, description="`binary_data_output`: all tensors as bytes; `timeout`: microseconds until 504."
    )
    inputs: list[InputTensor]
    outputs: list[WantedTensor] | None = Field(None, description="All where it is left out.")


class OutputTensor(_Sent):
    """One tensor of the answer."""

    name: str
    shape: list[int]
    datatype: str
    parameters: Parameters | None = None
    data: list[Any] | None = None


class InferResponse(_Sent):
    """The answer."""

    model_name: str
    model_version: str
    id: str | None = Field(None, description="That of the request; absent where it has none.")
    outputs: list[OutputTensor]


def form(error: RequestError, request_id: str) -> tuple[int, dict[str, Any]]:
    """An error as the protocol has it."""
    return error.status, {"error": error.message}


def router(models: Models) -> APIRouter:
    """The routes."""
    found = APIRouter(prefix="/v2", tags=["Open Inference Protocol"], route_class=PlainRoute)

    @found.get("", response_model=Server, responses=_refused())
    async def server(request: Request) -> Response:
        """The service itself."""
        return _json({"name": "bertforge", "version": __version__, "extensions": ["binary_tensor_data"]})

    @found.get("/health/live", response_model=Live, responses=_refused())
    async def live(request: Request) -> Response:
        """Whether the service runs."""
        return _json({"live": True})

    @found.get("/health/ready", response_model=Ready, responses=_refused(503))
    async def ready(request: Request) -> Response:
        """Whether all models answer."""
        models.get(None)
        return _json({"ready": True})

    async def describe(request: Request) -> Response:
        """What a model reads and answers."""
        model = _asked(models, request)
        told = model.served
        content = {
            "name": told.name,
            "versions": [told.generation],
            "platform": f"bertforge_{told.engine}",
            "inputs": [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in _names(model)],
            "outputs": [
                {"name": name, "datatype": datatype, "shape": [-1, *more]}
                for name, (datatype, *more) in _outputs(model).items()
            ],
        }
        return _json(content)

    async def model_ready(request: Request) -> Response:
        """Whether a model answers."""
        return _json({"name": _asked(models, request).served.name, "ready": True})

    async def infer(request: Request) -> Response:
        """Label the rows of the tensors."""
        call, model = call_of(request), _asked(models, request)
        given, blob = await _read(request, models)
        request_id = text_of(given, "id")
        parameters = parameters_of(given, "the request")
        deadline = call.arrived + seconds_of(parameters, "timeout", _MICROSECOND)
        rows, field = _rows(given, blob, model), "rows" if model.columns.beside else "text"
        answers = await models.answer(call, rows, model.served.name, name=field, deadline=deadline)
        _check_version(answers.model, request)
        binary = parameters.get("binary_data_output") is True
        wanted = _wanted(given.get("outputs"), tuple(_outputs(answers.model)), binary)  # it may have been swapped
        return _response(answers, wanted, request_id)

    name, version = ({"name": name, "in": "path", "required": True, "schema": _TEXT} for name in ("name", "version"))
    for path, names in (("/models/{name}", [name]), ("/models/{name}/versions/{version}", [name, version])):
        told: dict[str, Any] = {"responses": _refused(404, 503), "openapi_extra": {"parameters": names}}
        found.add_api_route(path, describe, response_model=Description, **told)
        found.add_api_route(f"{path}/ready", model_ready, response_model=Ready, **told)
        told = {
            "responses": _refused(400, 404, 422, 429, 503, 504),
            "openapi_extra": {"parameters": names, **json_body(InferRequest)},
        }
        found.add_api_route(f"{path}/infer", infer, methods=["POST"], response_model=InferResponse, **told)
    return found


def _refused(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return refused(*statuses, form=Refused)


def _json(content: object) -> Response:
    return Response(json.dumps(content), media_type="application/json")


def _asked(models: Models, request: Request) -> Model:
    model = models.get(request.path_params["name"])
    _check_version(model, request)
    return model


def _check_version(model: Model, request: Request) -> None:
    told = model.served
    if request.path_params.get("version", told.generation) != told.generation:
        raise RequestError(404, f"there is no such version of {told.name}; there is {told.generation}")


def _names(model: Model) -> tuple[str, ...]:
    """Of the tensors that a model reads."""
    return (*model.columns.texts, *model.columns.needed) if model.columns.beside else ("text",)


async def _read(request: Request, models: Models) -> tuple[dict[str, Any], memoryview]:
    """The JSON of a request, and the bytes behind it."""
    if "origin" in request.headers:  # from a browser; of others Triton takes any type, as curl's -d sends it
        check_media_type(request, "application/json", "application/octet-stream")
    body = await request.body()
    end = request.headers.get(_HEADER, str(len(body)))
    if not re.fullmatch(r"[0-9]{1,12}", end) or int(end) > len(body):
        raise RequestError(400, f"the header {_HEADER} is no number up to {len(body):,}, the bytes of the body")
    given = parse(body[: int(end)], models.limits)
    check_fields(given, "id", "model_name", "parameters", "inputs", "outputs")
    if given.get("model_name", name := request.path_params["name"]) != name:
        raise RequestError(422, f"model_name is not {name}, as in the address; leave it out", "model_name")
    return given, memoryview(body)[int(end) :]


def _outputs(model: Model) -> dict[str, tuple[Any, ...]]:
    """Of a model: by its name the datatype of each tensor, and the size of a row where it has one."""
    found: dict[str, tuple[Any, ...]] = {
        "label": ("BYTES",),
        "probability": ("FP32",),
        "probabilities": ("FP32", len(model.codec.label_names)),
    }
    return found if model.codec.policy is None else found | {"decision": ("BYTES",)}


def _wanted(given: Any, names: tuple[str, ...], binary: bool) -> dict[str, bool]:
    """The tensors of the answer, and which of them as bytes."""
    if given is None or given == []:
        return dict.fromkeys(names, binary)
    found = {}
    for place, output in enumerate(objects(given, "outputs")):
        if output.get("name") not in names:
            raise RequestError(422, f"outputs[{place}] names no tensor of the model; it has {', '.join(names)}")
        parameters = parameters_of(output, f"outputs[{place}]")
        found[output["name"]] = parameters.get("binary_data", binary) is True
    return found


def _rows(given: dict[str, Any], blob: memoryview, model: Model) -> list[Any]:
    """`inputs` for `Models.answer`."""
    known, others = _names(model), model.columns.others if model.columns.beside else ()
    tensors = read_tensors(given.get("inputs"), blob, known, others)
    if not model.columns.beside:
        return tensors["text"]
    return [dict(zip(tensors, cells, strict=True)) for cells in zip(*tensors.values(), strict=True)]


def _response(answers: Answers, wanted: dict[str, bool], request_id: str | None) -> Response:
    chances, told, codec = answers.probabilities, answers.model.served, answers.model.codec
    blank = np.isnan(chances).any(axis=1)

    def texts(names: Sequence[Any]) -> list[str]:
        return ["" if none else str(name) for name, none in zip(names, blank, strict=True)]

    tensors: dict[str, list[str] | np.ndarray] = {
        "label": texts([codec.label_names[label] for label in chances.argmax(axis=1)]),
        "probability": chances.max(axis=1),
        "probabilities": chances,
    }
    if codec.policy is not None:
        tensors["decision"] = texts(codec.policy.names(codec.policy.decide(chances), codec.label_names))
    parts = [written(name, tensors[name], binary=binary) for name, binary in wanted.items()]
    content: dict[str, Any] = {"model_name": told.name, "model_version": told.generation}
    content |= {} if request_id is None else {"id": request_id}
    head = json.dumps(content | {"outputs": [part for part, _ in parts]}).encode()
    if not any(wanted.values()):
        return Response(head, media_type="application/json")
    body = b"".join([head, *(blob for _, blob in parts)])
    return Response(body, headers={_HEADER: str(len(head))}, media_type="application/octet-stream")

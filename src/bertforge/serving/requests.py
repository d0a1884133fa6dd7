"""What comes in over HTTP, as far as no model is asked: the limits, JSON that is read strictly, and refusals.

Python's `json` is lenient where two readers of one text may understand it differently: it takes NaN, the last of two
equal keys, half of a surrogate pair, and any depth. Each is refused here, and the message names what is wrong. The
depth is counted before anything is parsed, on the brackets alone.

Every error of the service has one form, whoever found it:

    {"error": {"code": "too_large", "message": "inputs[3] has ...", "field": "inputs[3]"}, "id": "..."}

An address that speaks another protocol has that one's form. A message names the field, the limit and what to do. It
holds no text of the request, for texts stay out of logs.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from bertforge.serving.settings import Limits

CODES = {
    400: "bad_request",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    408: "slow_body",
    413: "too_large",
    415: "unsupported_media_type",
    422: "invalid_field",
    424: "unsuitable_model",
    429: "queue_full",
    500: "internal",
    503: "unavailable",
    504: "deadline",
}
"""What programs tell a refusal by, of each status."""
_LONGEST = 600.0  # seconds of a deadline
_STEPS = np.zeros(256, np.int8)
_STEPS[[ord("["), ord("{")]], _STEPS[[ord("]"), ord("}")]] = 1, -1
_PLAIN = bytes(sorted(set(range(256)) - set(b'"[]{}')))


class RequestError(Exception):
    """A request that is refused. Raised anywhere below a route, it becomes the response."""

    def __init__(self, status: int, message: str, field: str | None = None, retry_after: float | None = None) -> None:
        """`field` is a path such as `inputs[3].Title`; `retry_after` counts seconds, which the message then tells."""
        if retry_after is not None:
            message = f"{message}; try again in {math.ceil(retry_after)} s"
        super().__init__(message)
        self.status, self.message, self.field, self.retry_after = status, message, field, retry_after

    @property
    def code(self) -> str:
        """One for each status."""
        return CODES.get(self.status, "refused")

    def response(self, request_id: str, form: Form | None = None) -> Response:
        """As every route answers it, in the form of the service or of another protocol."""
        status, told = (form or _own_form)(self, request_id)
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(math.ceil(self.retry_after))
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["www-authenticate"] = "Bearer"
        content = json.dumps(told)  # ASCII: a name may hold half a character
        return Response(content, status, headers, media_type="application/json")


Form = Callable[[RequestError, str], tuple[int, dict[str, Any]]]
"""An error and the request's id -> the status and the body of the response."""


def _own_form(error: RequestError, request_id: str) -> tuple[int, dict[str, Any]]:
    told = {"code": error.code, "message": error.message, "field": error.field}
    return error.status, {"error": told, "id": request_id}


async def read_json(request: Request, limits: Limits) -> dict[str, Any]:
    """The object in the body; raises RequestError for anything else."""
    check_media_type(request, "application/json")
    return parse(await request.body(), limits)


def check_media_type(request: Request, *known: str) -> None:
    """Raises RequestError for a body of another kind: what a form of a strange page may send is none of these."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("", *known):
        raise RequestError(415, f"the body is {_shown(kind)}; send JSON with the header Content-Type: {known[0]}")


def parse(body: bytes, limits: Limits) -> dict[str, Any]:
    """A JSON object; raises RequestError with the status 400 for what is none."""
    if not body:
        raise RequestError(400, "the body is empty; send a JSON object")
    if (found := depth(body)) > limits.max_depth:
        raise RequestError(400, f"the body nests {found:,} levels deep; the limit is {limits.max_depth}")
    try:
        parsed = json.loads(body.decode(), object_pairs_hook=_object, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise RequestError(
            400, f"the body is not UTF-8: byte {error.start + 1:,} is wrong; encode it as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise RequestError(400, f"the body is not valid JSON: {error.msg} at character {error.pos + 1:,}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets that never close
        raise RequestError(
            400, "the body is not valid JSON: a number is too long, or the nesting is too deep"
        ) from error
    if not isinstance(parsed, dict):
        raise RequestError(400, f"the body is {kind_of(parsed)}; send a JSON object")
    return parsed


def depth(body: bytes) -> int:
    """How deep arrays and objects lie in each other, of JSON; of other bytes any number."""
    most = body.count(b"[") + body.count(b"{")
    if most <= 1:
        return most
    marks = body.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _PLAIN)  # quotes and brackets alone
    found = np.frombuffer(marks, np.uint8)
    outside = np.cumsum(found == ord('"'), dtype=np.int32) % 2 == 0
    return int(np.cumsum(_STEPS[found] * outside, dtype=np.int32).max(initial=0))


def check_fields(given: Mapping[str, Any], *known: str) -> None:
    """Raises RequestError naming a field that no such request has."""
    for name in given:
        if name not in known:
            shown = _shown(name)
            raise RequestError(422, f"unknown field {shown}; this request takes {', '.join(known)}", shown)


def text_of(given: Mapping[str, Any], name: str) -> str | None:
    """A field that may be left out; raises RequestError where it is no text."""
    value = given.get(name)
    if value is not None and not isinstance(value, str):
        raise RequestError(422, f"{name} is {kind_of(value)}; send a text, or leave it out", name)
    return value


def seconds_of(given: Mapping[str, Any], name: str, unit: float = 1e-3) -> float:
    """A field of time in units of so many seconds that may be left out, infinite then; raises RequestError."""
    value, most = given.get(name), round(_LONGEST / unit)
    if value is None:
        return math.inf
    if type(value) is not int or not 1 <= value <= most:
        shown = f"{value:.15g}" if type(value) in (int, float) and abs(value) < 1e15 else kind_of(value)
        raise RequestError(422, f"{name} is {shown}; send a whole number from 1 to {most}", name)
    return value * unit


async def read_question(request: Request, limits: Limits, arrived: float) -> tuple[Any, str | None, float]:
    """What the routes of `/v1` are asked: `inputs` as they came, the model's name, and the deadline of a request that
    `arrived` then, by `time.monotonic()`. Raises RequestError.
    """
    given = await read_json(request, limits)
    check_fields(given, "inputs", "model", "timeout_ms")
    return given.get("inputs"), text_of(given, "model"), arrived + seconds_of(given, "timeout_ms")


def kind_of(value: Any) -> str:
    """What a value of JSON is, for a message."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _shown(name: str) -> str:
    """A name that a client made, short."""
    return name if len(name) <= 60 else f"{name[:57]}..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = _shown(next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1))
        raise RequestError(400, f"an object names {twice} twice; name it once", twice)
    return found


def _no_constant(name: str) -> None:
    raise RequestError(400, f"the body holds {name}, which is no JSON; send null for a missing number")

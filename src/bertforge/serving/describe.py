"""How OpenAPI describes a route that reads its request and writes its response by itself: what all routes share.

A request is read by hand rather than by pydantic: a limit is then met before anything large is made, and every message
names the field in the same words. The classes are what the document at `/openapi.json` says; the tests hold both the
checks and the answers to it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field

Cell = str | int | float | bool | None
Input = str | dict[str, Cell]


class Told(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Refusal(Told):
    """What went wrong."""

    code: str = Field(description="For programs; one for each status.")
    message: str = Field(description="For people: the field, the limit and what to do.")
    field: str | None = Field(description="Where, such as inputs[3].Title; null where it is no field.")


class Refused(Told):
    """Every error."""

    error: Refusal
    id: str = Field(description="The request's, as in the header X-Request-Id.")


class ModelTold(Told):
    """Which model answered."""

    name: str
    id: str = Field(description="The digest of its folder, another one for another model.")
    precision: str


class PlainRoute(APIRoute):
    """A route whose function takes the request and returns the response, with nothing of FastAPI's in between."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See APIRoute."""
        return self.endpoint


def refused(*statuses: int, form: type[BaseModel] = Refused) -> dict[int | str, dict[str, Any]]:
    """The error responses of a route, for OpenAPI; those of the door come with each."""
    return {status: {"model": form} for status in sorted({*statuses, 401, 408, 413, 415, 500})}


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """The request body of a route that reads it by itself, for OpenAPI."""
    schema = model.model_json_schema()
    schema = _inlined(schema, schema.pop("$defs", {}))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _inlined(node: Any, named: dict[str, Any]) -> Any:
    """A schema with what it refers to in place, for a body cannot have definitions of its own."""
    if isinstance(node, list):
        return [_inlined(part, named) for part in node]
    if not isinstance(node, dict):
        return node
    if reference := node.get("$ref"):
        return _inlined(named[reference.rpartition("/")[2]], named)
    return {key: _inlined(part, named) for key, part in node.items()}

"""Columns as tensors of the Open Inference Protocol, `[rows]` or `[rows, 1]`, in JSON or as bytes behind it.

Triton's client sends and wants bytes unless it is told otherwise. A text is four bytes of its length and then itself, a
number is as in memory, little end first, and tensors follow each other in the order of the JSON:

    https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md

Sizes come from clients, so each is compared with what is there before anything is made of it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bertforge.serving.requests import RequestError, kind_of

_NUMBERS = {
    "BOOL": "?", "INT8": "i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8", "UINT8": "u1", "UINT16": "<u2",
    "UINT32": "<u4", "UINT64": "<u8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
_CHANGE = ("sequence_id", "priority", "classification", "shared_memory_region")  # the answer, in Triton


def read_tensors(given: Any, blob: memoryview, needed: Sequence[str], others: Sequence[str]) -> dict[str, list[Any]]:
    """The cells of each tensor of a request: all that are `needed`, and `others` if they are there.

    `blob` are the bytes behind the JSON. A missing number, NaN or null, is None. Raises RequestError.
    """
    names, found = ", ".join(needed), dict[str, list[Any]]()
    for place, tensor in enumerate(objects(given, "inputs")):
        where, name = f"inputs[{place}]", tensor.get("name")
        if name not in (*needed, *others):
            raise RequestError(422, f"{where} is no tensor of the model; it reads {names}")
        if name in found:
            raise RequestError(422, f"{where} is {name} once more; send it once")
        size = parameters_of(tensor, where).get("binary_data_size")
        if size is None:
            found[name] = _of_json(tensor, name)
            continue
        if type(size) is not int or not 0 <= size <= len(blob):
            raise RequestError(400, f"the binary_data_size of {name} is no number up to {len(blob):,}, the bytes left")
        found[name] = _of_bytes(tensor, name, blob[:size])
        blob = blob[size:]
    if len(blob):
        raise RequestError(400, f"{len(blob):,} bytes belong to no tensor; name their number as its binary_data_size")
    for name in needed:
        if name not in found:
            raise RequestError(422, f"there is no tensor {name}; the model reads {names}")
    rows = len(found[needed[0]])
    for name, cells in found.items():
        if len(cells) != rows:
            raise RequestError(422, f"{name} has {len(cells):,} rows, but {needed[0]} has {rows:,}")
    return found


def written(name: str, values: list[str] | np.ndarray, *, binary: bool) -> tuple[dict[str, Any], bytes]:
    """A tensor of an answer: its JSON, and its bytes where they stand behind that.

    `values` are texts or float32 of any shape, of which NaN is null in JSON.
    """
    numbers = isinstance(values, np.ndarray)
    told = {"name": name, "shape": list(np.shape(values)), "datatype": "FP32" if numbers else "BYTES"}
    if not binary:
        data = [None if value != value else value for value in np.ravel(values).tolist()]
        return told | {"data": data}, b""
    if isinstance(values, np.ndarray):
        blob = values.astype("<f4").tobytes()
    else:
        encoded = [value.encode() for value in values]
        blob = b"".join(struct.pack("<I", len(value)) + value for value in encoded)
    return told | {"parameters": {"binary_data_size": len(blob)}}, blob


def objects(given: Any, name: str) -> list[dict[str, Any]]:
    """A field that is a list of objects; raises RequestError where it is none."""
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise RequestError(422, f"{name} is no list of objects; send one for each tensor", name)
    return given


def parameters_of(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Those of a request or a tensor; raises RequestError for one that would change the answer and cannot."""
    found = {} if given.get("parameters") is None else given["parameters"]
    if not isinstance(found, dict):
        raise RequestError(422, f"the parameters of {where} are {kind_of(found)}; send an object, or leave it out")
    for name in _CHANGE:
        if name in found:
            raise RequestError(422, f"{where} has the parameter {name}, which is not known here; leave it out")
    return found


def _of_json(tensor: dict[str, Any], name: str) -> list[Any]:
    rows, datatype = _declared(tensor, name)
    data = tensor.get("data")
    if not isinstance(data, list):
        raise RequestError(422, f"{name} has no list of data; send it, or its binary_data_size and the bytes")
    cells = [cell for part in data for cell in (part if isinstance(part, list) else [part])]
    if len(cells) != rows:
        raise RequestError(422, f"{name} has {len(cells):,} cells, but its shape says {rows:,}")
    kinds: tuple[type, ...] = {"BYTES": (str,), "BOOL": (bool,)}.get(datatype, (int,))
    if datatype.startswith("FP"):
        kinds = (int, float, type(None))
    for place, cell in enumerate(cells):
        if type(cell) not in kinds:
            raise RequestError(422, f"{name}[{place}] is {kind_of(cell)}, but its datatype is {datatype}")
    return cells


def _of_bytes(tensor: dict[str, Any], name: str, blob: memoryview) -> list[Any]:
    rows, datatype = _declared(tensor, name)
    if datatype == "BYTES":
        return _texts(name, bytes(blob), rows)
    dtype = np.dtype(_NUMBERS[datatype])
    if len(blob) != rows * dtype.itemsize:
        raise RequestError(400, f"{name} has {len(blob):,} bytes; {rows:,} of {datatype} are {rows * dtype.itemsize:,}")
    return [None if value != value else value for value in np.frombuffer(blob, dtype).tolist()]


def _declared(tensor: dict[str, Any], name: str) -> tuple[int, str]:
    """Its rows and its datatype."""
    shape, datatype = tensor.get("shape"), tensor.get("datatype")
    if not isinstance(shape, list) or not shape or shape[1:] not in ([], [1]):
        raise RequestError(422, f"the shape of {name} is not [rows] or [rows, 1]; send one cell for each row")
    rows = shape[0]
    if type(rows) is not int or rows < 0:
        raise RequestError(422, f"the shape of {name} begins with no whole number; send [rows] or [rows, 1]")
    if not isinstance(datatype, str) or datatype not in ("BYTES", *_NUMBERS):
        raise RequestError(422, f"the datatype of {name} is none of BYTES, {', '.join(_NUMBERS)}")
    return rows, datatype


def _texts(name: str, blob: bytes, rows: int) -> list[str]:
    found, start = list[str](), 0
    while start < len(blob) and len(found) < rows:
        end = start + 4 + int.from_bytes(blob[start : start + 4], "little")
        where = f"{name}[{len(found)}]"
        if end > len(blob):
            raise RequestError(400, f"{where} is longer than the bytes that are left; check its length")
        try:
            found.append(blob[start + 4 : end].decode())
        except UnicodeDecodeError as error:
            raise RequestError(
                400, f"{where} is not UTF-8: byte {error.start + 1:,} is wrong; encode it as UTF-8"
            ) from error
        start = end
    if start < len(blob) or len(found) < rows:
        raise RequestError(400, f"the bytes of {name} hold another number of texts than the {rows:,} of its shape")
    return found

"""Tensors beside Triton's client: what it writes is read here, and it reads what is written here."""

import json

import numpy as np
import pytest
import tritonclient.http as http

from bertforge.serving.tensors import read_tensors, written

WHOLE = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
COLUMNS = {
    "BYTES": np.array(["", "a", "Größe 🙂", "\0\n"], object),
    "BOOL": np.array([True, False, False, True]),
    "FP16": np.array([0.5, -2, np.nan, 65504], np.float16),
    "FP32": np.array([0.5, -2, np.nan, 1e30], np.float32),
    "FP64": np.array([0.5, -2, np.nan, 1e300], np.float64),
    **{name.upper(): np.array([0, 1, 7, np.iinfo(name).max], name) for name in WHOLE},
}


def sent(name, values, datatype, binary):
    """As the client sends it: the JSON, and the bytes behind."""
    found = http.InferInput(name, list(values.shape), datatype).set_data_from_numpy(values, binary_data=binary)
    told = json.loads(json.dumps(found._get_tensor()).replace("NaN", "null"))
    return told, found._get_binary_data() or b""


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("datatype", COLUMNS)
def test_every_datatype_is_read(datatype, binary):
    values = COLUMNS[datatype]
    parts = [sent("one", values, datatype, binary), sent("two", values.reshape(4, 1)[::-1], datatype, binary)]
    blob = memoryview(b"".join(blob for _, blob in parts))
    found = read_tensors([told for told, _ in parts], blob, ("one",), ("two", "three"))
    expected = [None if value != value else value for value in values.tolist()]
    assert found == {"one": expected, "two": expected[::-1]}


def test_what_is_written_is_read_by_the_client():
    tensors = {
        "label": ["open", "", "Größe 🙂"],
        "probability": np.array([0.5, np.nan, 1], np.float32),
        "probabilities": np.array([[0.5, 0.5], [np.nan, np.nan], [0, 1]], np.float32),
    }
    for binary in (True, False):
        parts = [written(name, values, binary=binary) for name, values in tensors.items()]
        head = json.dumps({"outputs": [told for told, _ in parts]}, allow_nan=False).encode()
        body = head + b"".join(blob for _, blob in parts)
        answer = http.InferResult.from_response_body(body, header_length=len(head) if binary else None)
        labels = answer.as_numpy("label").tolist()
        assert [label.decode() if binary else label for label in labels] == tensors["label"]
        for name in ("probability", "probabilities"):
            np.testing.assert_array_equal(answer.as_numpy(name), tensors[name])

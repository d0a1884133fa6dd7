import json
import random
import time

import pytest

from bertforge.serving.requests import RequestError, check_fields, depth, parse, seconds_of, text_of
from bertforge.serving.settings import Limits


def refusal(call, *arguments) -> RequestError:
    with pytest.raises(RequestError) as raised:
        call(*arguments)
    return raised.value


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the body is empty"),
        (b"{", "at character 2"),
        (b'{"a": 1} x', "Extra data at character 10"),
        (b"\xff{}", "byte 1 is wrong"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'{"a": NaN}', "holds NaN"),
        (b'{"a": -Infinity}', "holds -Infinity"),
        (b'{"a": ' + b"1" * 5000 + b"}", "a number is too long"),
        (b"[1]", "the body is a list"),
        (b"null", "the body is null"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "names c twice"),
        (b'{"a": "tab\there"}', "Invalid control character"),
        (b"[" * 100_000, "nests 100,000 levels deep; the limit is 16"),
    ],
)
def test_what_is_no_json_object_is_refused(body, said):
    error = refusal(parse, body, Limits())
    assert error.status == 400
    assert said in str(error)


def test_a_name_that_stands_twice_is_found_at_once_among_many():
    names = ",".join(f'"{number}": 0' for number in range(150_000))
    start = time.process_time()
    assert "names 149999 twice" in str(refusal(parse, f'{{{names}, "149999": 0}}'.encode(), Limits()))
    assert time.process_time() - start < 10  # by comparing each with all before it, minutes


def test_depth_is_held_at_its_edge():
    nested = b'{"a": ' + b"[" * 15 + b"]" * 15 + b"}"
    assert parse(nested, Limits()) == json.loads(nested)
    assert refusal(parse, nested, Limits(max_depth=15)).status == 400


def test_brackets_in_texts_are_no_depth():
    generator = random.Random(0)
    for _ in range(200):
        text = "".join(generator.choices('[{]}"\\a é', k=40))
        found = {text: [{"b": text}], "c": {"d": text}}
        for ascii_only in (True, False):
            assert depth(json.dumps(found, ensure_ascii=ascii_only).encode()) == 3


def test_a_field_that_is_unknown_is_named():
    assert check_fields({"a": 1}, "a", "b") is None
    error = refusal(check_fields, {"a": 1, "x" * 100: 2}, "a", "b")
    assert (error.status, error.field) == (422, "x" * 57 + "...")
    assert "takes a, b" in str(error)


@pytest.mark.parametrize("value", [0, -1, 600_001, 1.5, True, "1", [1], 10**400])
def test_milliseconds_are_whole_and_within_limits(value):
    assert seconds_of({"ms": 600_000}, "ms") == 600
    assert seconds_of({}, "ms") == float("inf")
    error = refusal(seconds_of, {"ms": value}, "ms")
    assert (error.status, error.field) == (422, "ms")


def test_a_text_field_is_a_text():
    assert text_of({"model": "a"}, "model") == "a"
    assert text_of({}, "model") is None
    assert refusal(text_of, {"model": 3}, "model").field == "model"


def test_a_response_survives_half_a_character():
    response = refusal(check_fields, {"\ud800": 1}, "a").response("id")
    said = "unknown field \ud800; this request takes a"
    told = {"code": "invalid_field", "message": said, "field": "\ud800"}
    assert json.loads(response.body) == {"error": told, "id": "id"}

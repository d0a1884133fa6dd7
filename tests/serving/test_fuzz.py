"""Requests that nobody should send: broken bytes, and whatever the OpenAPI document lets one think of."""

import hypothesis
import pytest
import schemathesis
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving.fuzz import ALLOWED, Fuzz, attack
from tests.serving.service import service

TEXTS = [f"How do I sort list {number}?" for number in range(10)]
INPUTS = 600  # `benchmarks/fuzz_serve.py` has 50,000
EXAMPLES = 15
CHECKS = [content_type_conformance, response_schema_conformance, status_code_conformance]


@pytest.fixture(scope="module")
def live(runs, tmp_path_factory):
    """A model of texts and one that reads columns."""
    folder = tmp_path_factory.mktemp("fuzzed")
    with service(folder / "log", f"text={runs['full']}", f"columns={runs['columns']}") as found:
        yield found


def test_broken_bytes_do_no_harm(live):
    before = live.processes("bertforge.serving")
    told = Fuzz(live.address, TEXTS, seed=1).run(INPUTS)
    assert told.failures == []
    assert told.good + told.busy == INPUTS // 20
    assert told.good > 0
    assert {200, 400, 404, 405, 422} <= set(told.answers)
    assert live.processes("bertforge.serving") == before
    assert '"event": "defect"' not in live.said()


def test_an_attack_is_made_again_from_its_number():
    assert attack(TEXTS, 1, 17) == attack(TEXTS, 1, 17)
    assert len({attack(TEXTS, 1, number).kind for number in range(100)}) == 12


def test_every_address_answers_as_its_document_says(live):
    document = schemathesis.openapi.from_dict(live.http.get("/openapi.json").json())
    document.config.base_url = live.address
    seen = {check_operation(found.ok()) for found in document.get_all_operations()}
    assert "/v1/classify" in seen


def check_operation(operation):
    """Its path, once examples made from its part of the document were answered as that says."""

    @hypothesis.settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(case=operation.as_strategy())
    def check(case):
        response = case.call()
        assert response.status_code < 500 or response.status_code in ALLOWED, response.text
        case.validate_response(response, checks=CHECKS)

    check()
    return operation.path

"""Engines side by side: each row a claim that can be checked against the model itself."""

import json
import shutil

import numpy as np
import pytest

from bertforge.backends.base import BatchShape
from bertforge.backends.registry import TARGETS, Target
from bertforge.benchmark.measure import padding_waste, rate
from bertforge.benchmark.run import chosen, run_benchmark
from bertforge.benchmark.table import markdown
from bertforge.errors import UsageError
from tests.runs import run_command


@pytest.fixture
def model(runs, tmp_path):
    """A copy: engines are compiled into the model's folder."""
    return shutil.copytree(runs["full"], tmp_path / "model")


def test_a_target_that_is_missing_is_a_row_that_says_how_to_get_it(model, data, monkeypatch):
    absent = Target(("fp32",), ("no_such_library",), "fast", "model.bin")
    monkeypatch.setitem(TARGETS, "absent", absent)
    found = run_benchmark(model, data, "absent", split="validation", rows=32, repeats=1, say=lambda text: None)
    assert [row["framework"] for row in found["rows"]] == ["pytorch", "absent"]
    assert "pip install 'bertforge[fast]'" in found["rows"][1]["missing"]
    assert "pip install" in markdown(found)
    reference = found["rows"][0]
    assert reference["recovery"] == 1
    assert reference["changed_labels"] == 0
    assert reference["padding_waste"] == 0
    assert reference["p50_ms"] <= reference["p95_ms"] <= reference["p99_ms"]


def test_from_the_command_line(model, data, tmp_path, capsys):
    arguments = ("--data", data, "--targets", "onnxruntime-fp32", "--rows", "32", "--repeats", "1")
    assert run_command("benchmark", model, *arguments, "--out", tmp_path) == 0
    said = capsys.readouterr().out
    assert "| onnxruntime | fp32 |" in said
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert [row["precision"] for row in rows] == ["fp32", "fp32"]
    assert rows[0]["accuracy"] == rows[1]["accuracy"]
    assert (tmp_path / "table.md").read_text().startswith("| framework |")


def test_a_model_with_columns_is_measured_with_them(runs, data, tmp_path):
    model = shutil.copytree(runs["columns"], tmp_path / "model")
    found = run_benchmark(
        model, data, "onnxruntime-fp32", split="validation", rows=32, repeats=1, say=lambda text: None
    )["rows"]
    assert [row["changed_labels"] for row in found] == [0, 0]
    assert found[1]["end_to_end_questions_per_s"] > 0


def test_targets_are_chosen_by_name_and_the_reference_is_always_there():
    assert chosen("openvino-int8") == [("pytorch", "fp32"), ("openvino", "int8")]
    assert chosen("pytorch") == [("pytorch", "fp32"), ("pytorch", "bf16")]
    assert set(chosen("openvino")) < set(chosen("all"))
    with pytest.raises(UsageError, match="'tpu' does not exist; choose all or some of"):
        chosen("openvino,tpu")


def test_padding_waste_by_hand():
    lengths = np.array([3, 1, 2, 10])
    assert padding_waste(lengths, True, BatchShape(8)) == 0
    assert padding_waste(lengths, False, BatchShape(1)) == 0
    # (10), (3, 2), (1) in batches of 8 tokens: 10 + 6 + 1 computed for 16
    assert padding_waste(lengths, False, BatchShape(8, rows=2)) == pytest.approx(17 / 16 - 1)


def test_a_rate_is_warmed_up_and_repeated():
    calls = []
    found = rate(lambda: calls.append(1), 10, 3)
    assert len(calls) == 4
    assert found.low <= found.median <= found.high

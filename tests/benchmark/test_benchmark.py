"""Engines side by side: each row a claim that can be checked against the model itself."""

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import bertforge
from bertforge.artifact import hash_file
from bertforge.benchmark.fresh import fresh_process
from bertforge.benchmark.roofline import add_shares, needed_flops, product_rate
from bertforge.benchmark.run import _accuracy, _changed, chosen, run_benchmark
from bertforge.benchmark.table import markdown, summary
from bertforge.benchmark.workload import Workload
from bertforge.data.prepared import PreparedData
from bertforge.engines import measure
from bertforge.engines.measure import cold_ms, latencies_ms, rate, singles
from bertforge.engines.onnxruntime import OnnxRuntimeEngine
from bertforge.engines.registry import TARGETS
from bertforge.errors import ArtifactError, UsageError
from bertforge.hardware import detect
from bertforge.inference.predictor import Predictor
from bertforge.jobs.quantize import QuantizeOptions, quantize_model
from bertforge.manifest import MANIFEST, read_manifest
from tests.model.tiny import tiny_bert
from tests.runs import run_command


@pytest.fixture
def model(runs, tmp_path):
    """A copy: engines are compiled into the model's folder."""
    return shutil.copytree(runs["full"], tmp_path / "model")


UNREAD = {"first_answer_s": None, "first_call_ms": None, "peak_memory_gb": None}


@pytest.fixture
def no_process(monkeypatch):
    """Starts no process for each row, which takes most of a test's time."""
    monkeypatch.setattr("bertforge.benchmark.run.fresh_process", lambda *arguments: UNREAD)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """Before a cold call."""
    monkeypatch.setattr("bertforge.engines.measure.PAUSE_S", 0.0)
    monkeypatch.setattr("bertforge.engines.measure.OTHER_BYTES", 1)


@pytest.mark.usefixtures("no_process")
def test_a_target_that_is_missing_is_a_row_that_says_how_to_get_it(model, data, monkeypatch):
    missing = {
        "name": "absent",
        "libraries": ("no_such_library",),
        "extra": "fast",
        "precisions": ("fp32",),
        "only": {},
    }
    monkeypatch.setitem(TARGETS, "absent", replace(TARGETS["onnxruntime"], **missing))
    found = run_benchmark(model, data, "absent", split="validation", rows=32, repeats=1, say=lambda text: None)
    assert [row["framework"] for row in found["rows"]] == ["pytorch", "absent"]
    assert "pip install 'bertforge[fast]'" in found["rows"][1]["missing"]
    assert "pip install" in markdown(found)
    reference = found["rows"][0]
    assert reference["recovery"] == 1
    assert reference["changed_labels"] == 0
    assert reference["padding_waste"] == 0
    for of in ("", "tokenizer_", "text_"):
        p50, p95, p99, cold = (reference[f"{of}{name}_ms"] for name in ("p50", "p95", "p99", "cold"))
        assert 0 < p50 <= p95 <= p99
        assert cold > 0


def measured(model, data, targets, **more):
    """Rows of a benchmark as small as can be."""
    return run_benchmark(model, data, targets, split="validation", rows=32, repeats=1, say=lambda text: None, **more)[
        "rows"
    ]


@pytest.mark.usefixtures("no_process")
def test_what_a_library_raises_is_a_row_and_the_others_stay(model, data, monkeypatch):
    def fail(engine, *arguments):
        if engine.name == "onnxruntime":
            raise RuntimeError("an illegal memory access\nat 0x7f")
        return singles(engine, *arguments)

    closed = []
    monkeypatch.setattr("bertforge.benchmark.run.singles", fail)
    measured(model, data, "onnxruntime-fp32")  # compiled, and the engine that proved it closed
    monkeypatch.setattr(OnnxRuntimeEngine, "close", lambda self: closed.append(self.name))
    reference, intact, broken = measured(model, data, "onnxruntime-fp32,openvino-fp32")
    assert broken == {
        "framework": "onnxruntime",
        "precision": "fp32",
        "missing": "RuntimeError: an illegal memory access",
        "split": "random/validation",
        "rows_timed": 17,
    }
    assert closed == ["onnxruntime"]
    assert reference["questions_per_s"] > 0
    assert intact["questions_per_s"] > 0


@pytest.mark.usefixtures("no_process")
def test_an_interrupt_keeps_what_was_measured(model, data, monkeypatch):
    def stop(engine, *arguments):
        if engine.precision == "bf16":
            raise KeyboardInterrupt
        return singles(engine, *arguments)

    monkeypatch.setattr("bertforge.benchmark.run.singles", stop)
    reference, *others = measured(model, data, "pytorch-bf16,pytorch-padded-fp32")
    assert reference["questions_per_s"] > 0
    assert [row["missing"] for row in others] == ["interrupted", "interrupted"]
    monkeypatch.setattr("bertforge.benchmark.run.REFERENCE", ("pytorch", "bf16"))
    with pytest.raises(KeyboardInterrupt):
        measured(model, data, "pytorch-bf16")


@pytest.mark.usefixtures("no_process")
def test_an_error_of_the_reference_is_raised(model, data, monkeypatch):
    monkeypatch.setattr("bertforge.benchmark.run.singles", None)
    with pytest.raises(TypeError):
        measured(model, data, "pytorch-fp32")


@pytest.mark.usefixtures("no_process")
def test_what_no_gpu_here_runs_is_not_even_built(model, data):
    rows = measured(model, data, "tensorrt,tensorrt-rtx")[1:]
    assert len(rows) == 10
    for row in rows:
        assert row["missing"] == f"{row['framework']} cannot run here: this machine has no NVIDIA GPU"
    assert not (model / "engines").exists()


def test_a_fresh_process_is_unknown_when_it_fails_and_libraries_may_print(model, data, tmp_path, monkeypatch):
    failed = fresh_process(tmp_path / "nowhere", "pytorch", "fp32", data, "validation", 32)
    assert "nowhere does not exist" in failed.pop("fresh_missing")
    assert failed == UNREAD
    (tmp_path / "usercustomize.py").write_text("print('hello from a library')")
    (tmp_path / "sitecustomize.py").write_text("print('hello from a library')")
    source = Path(bertforge.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(source)]))
    found = fresh_process(model, "pytorch", "fp32", data, "validation", 32)
    assert 0.1 < found["peak_memory_gb"] < 5
    assert 0 < found["first_call_ms"] < 1e3 * found["first_answer_s"], "the process had to start and load first"


@pytest.mark.usefixtures("no_process")
def test_engines_of_a_quantized_folder_are_built_from_it_and_from_no_other(model, runs, data, tmp_path):
    quantized = tmp_path / "q"
    quick = QuantizeOptions(calibration="max", rows=16, validation_rows=16)
    quantize_model(model, data, quantized, quick, None, lambda text: None)
    rows = measured(model, data, "openvino-fp32,openvino-int8", quantized=quantized)
    assert [row["precision"] for row in rows if "missing" not in row] == ["fp32", "fp32", "int8"]
    parent = read_manifest(quantized / "engines" / "openvino-int8", "engine")["parent"]
    assert parent == hash_file(quantized / MANIFEST) != hash_file(model / MANIFEST)
    assert [path.name for path in (model / "engines").iterdir()] == ["openvino-fp32"]
    with pytest.raises(UsageError, match=f"{quantized} was not made from {runs['columns']} as it is now"):
        measured(runs["columns"], data, "openvino-int8", quantized=quantized)
    with pytest.raises(UsageError, match=f"benchmark MODEL --data DIR --quantized {quantized}"):
        measured(quantized, data, "openvino-int8")
    with pytest.raises(ArtifactError, match="is of kind 'run', but quantized is needed"):
        measured(model, data, "openvino-int8", quantized=model)


def test_from_the_command_line(model, data, tmp_path, capsys):
    targets = "pytorch-padded-fp32,onnxruntime-fp32"
    arguments = ("--data", data, "--targets", targets, "--rows", "32", "--repeats", "1")
    assert run_command("benchmark", model, *arguments, "--out", tmp_path) == 0
    said = capsys.readouterr().out
    tables = [line for line in said.splitlines() if not line.startswith("wrote")]
    assert max(map(len, tables)) <= 80
    assert sum(line.strip().startswith("onnxruntime fp32 ") for line in tables) == 5
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert [row["framework"] for row in rows] == ["pytorch", "pytorch-padded", "onnxruntime"]
    assert len({row["accuracy"] for row in rows}) == 1
    assert rows[1]["padding_waste"] > rows[0]["padding_waste"] == 0
    for row in rows:
        assert 0 < row["share_of_ceiling"] < 1
        assert 0.1 < row["peak_memory_gb"] < 5
        assert row["first_answer_s"] > 0
        assert row["changed_rows"] == []
    assert (tmp_path / "table.md").read_text().startswith("| framework |")
    assert "onnxruntime fp32" in (tmp_path / "chart.svg").read_text()


@pytest.mark.usefixtures("no_process")
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


def test_changed_labels_are_listed_by_line_and_recovery_has_a_paired_interval(runs, data):
    prepared = PreparedData.open(data)
    work = Workload.of(Predictor.load(runs["full"], "fp32"), prepared, "validation", 32)
    baseline = np.eye(2, dtype=np.float32)[work.labels] * 4  # right everywhere
    logits = baseline.copy()
    logits[3] = -logits[3]
    logits[3] += 4
    (changed,) = _changed(baseline, logits, prepared, work)
    right, wrong = (prepared.label_names[label] for label in (work.labels[3], 1 - work.labels[3]))
    assert changed == {"line": int(prepared.lines[work.rows[3]]), "true": right, "reference": right, "engine": wrong}
    row = _accuracy(baseline, logits, work.labels)
    assert row["recovery"] == pytest.approx(1 - 1 / len(work.rows))
    assert row["recovery_low"] < row["recovery"] < row["recovery_high"] == 1
    assert row["changed_labels"] == 1


def test_needed_work_by_hand():
    config = tiny_bert(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2).config
    below = 3 * (4 * 64 + 2 * 128) + 2 * 8 * 9  # three tokens through the first layer, and attention
    last = 3 * 2 * 64 + 2 * 8 * 3 + (2 * 64 + 2 * 128)  # keys and values of all, the rest of the first token
    assert needed_flops(config, np.array([3])) == 2 * (below + last + 8 * (8 + 2))
    assert needed_flops(config, np.array([3, 3])) == 2 * needed_flops(config, np.array([3]))


def test_the_ceiling_is_measured_where_torch_has_the_product():
    here = detect()
    assert all(product_rate(here, precision) > 0 for precision in ("fp32", "bf16", "int8"))
    assert product_rate(here, "fp8") is None


@pytest.mark.parametrize(("flops", "sizes"), [(1e8, [512]), (2e9, [512, 1024]), (1e11, [512, 1024, 2048])])
def test_a_product_so_slow_that_a_larger_one_takes_seconds_is_not_made_larger(monkeypatch, flops, sizes):
    tried = []

    def product_seconds(device, precision, shape, measure_s):
        assert len(set(shape)) == 1
        tried.append(shape[0])
        return 2 * shape[0] ** 3 / flops

    monkeypatch.setattr("bertforge.benchmark.roofline.product_seconds", product_seconds)
    assert product_rate(replace(detect(), device=torch.device("cpu")), "bf16") == pytest.approx(flops)
    assert tried == sizes


def test_the_ceiling_is_measured_on_as_many_cores_as_the_engines_have(monkeypatch):
    used, threads, mm = [], torch.get_num_threads(), torch.mm
    monkeypatch.setattr(torch, "mm", lambda *matrices: used.append(torch.get_num_threads()) or mm(*matrices))
    product_rate(replace(detect(), device=torch.device("cpu"), cores=threads + 1), "fp32")
    assert set(used) == {threads + 1}
    assert torch.get_num_threads() == threads


def test_a_share_of_the_ceiling_is_never_above_it():
    def row(precision, rate, product_rate):
        return {"precision": precision, "questions_per_s": rate, "product_rate": product_rate}

    rows = [row("bf16", 4, 10.0), row("bf16", 16, 40.0), row("int8", 9, 10.0), row("fp8", 9, None), {"missing": "it"}]
    add_shares(rows, 2.0)
    assert [each.get("share_of_ceiling") for each in rows] == [0.2, 0.8, None, None, None]


@pytest.mark.usefixtures("no_process")
def test_a_share_that_is_left_out_is_explained(model, data):
    found = run_benchmark(model, data, "pytorch-fp32", split="validation", rows=32, repeats=1, say=lambda text: None)
    found["rows"][0]["share_of_ceiling"] = 0.5
    assert "no ceiling" not in shown(summary(found))
    found["rows"][0]["share_of_ceiling"] = None
    assert "no ceiling for an engine that was faster than the matrix product" in shown(summary(found))


def shown(group):
    console = Console(file=io.StringIO(), width=200)
    console.print(group)
    return console.file.getvalue()


class Clock:
    """A clock that moves while a question is answered or somebody sleeps, and not otherwise."""

    def __init__(self):
        self.now, self.asked, self.slept = 0.0, [], []

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(len(self.asked))
        self.now += seconds

    def ask(self, seconds):
        self.asked.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(measure, "time", clock := Clock())
    return clock


def test_latencies_are_of_questions_asked_before(clock):
    assert latencies_ms(clock.ask, [1.0, 2.0], 3) == pytest.approx([1000, 2000] * 3)
    assert clock.asked == [1.0, 2.0] * 4
    assert clock.slept == []


def test_a_slow_engine_answers_fewer_questions_and_only_those_it_knows(clock, monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", 5.0)

    def ask(seconds):
        known = any(seconds == asked / 2 for asked in clock.asked)
        clock.ask(seconds if known else 2 * seconds)  # the first time it prepares itself

    assert latencies_ms(ask, [2.0, 2.5, 3.0, 7.0], 3) == pytest.approx([2000, 2500, 2000])
    assert clock.asked == [4.0, 5.0, 2.0, 2.5, 2.0]


def test_a_cold_call_follows_a_pause_which_does_not_count(clock):
    assert cold_ms(clock.ask, [1.0, 2.0]) == pytest.approx([1000, 2000])
    assert clock.slept == [0, 1]


def test_the_widest_figures_fit_into_a_terminal():
    row = dict.fromkeys(("p50", "p95", "p99", "cold"), 9999.0)
    figures = {f"{of}{name}_ms": value for of in ("", "tokenizer_", "text_") for name, value in row.items()}
    whole = {
        **figures,
        "framework": "onnxruntime",
        "precision": "bf16",
        "products": {"label": "mixed"},
        **dict.fromkeys(("questions_per_s", "end_to_end_questions_per_s"), 22000.0),
        **dict.fromkeys(("questions_per_s_batch_1", "questions_per_s_batch_32"), 22000.0),
        **dict.fromkeys(("accuracy", "recovery", "recovery_low", "recovery_high", "share_of_ceiling"), 1.0),
        "mcnemar_p": 1.2e-05,
        "changed_labels": 4488,
        "accuracy_rows": 44878,
        "first_answer_s": 123.4,
        "peak_memory_gb": 123.45,
    }
    shown = io.StringIO()
    Console(file=shown, width=80).print(summary({"rows": [whole]}))
    assert "…" not in shown.getvalue(), "nothing is cut off"
    assert shown.getvalue().count("9999 / 9999 / 9999 / 9999") == 3


def test_a_rate_is_warmed_up_and_repeated():
    calls = []
    found = rate(lambda: calls.append(1), 10, 3)
    assert len(calls) == 4
    assert found.low <= found.median <= found.high

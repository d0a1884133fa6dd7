"""The commands that do the work: what they say, what they write, and what they name to type next."""

import json
import re
import shutil

import pandas as pd
import pytest

from bertforge.cli.estimate import _money
from bertforge.evaluation.standing import Standing
from bertforge.training.config import load_recipe, variants
from tests.runs import KINDS, STEPS, run_command

QUICK = ("epochs=1", "max_length=48", "tokens_per_step=1024", "precision=fp32")


def test_train_with_settings_in_one_go(tmp_path, data, base, capsys):
    arguments = ("train", "--data", data, "--out", tmp_path / "run", "--model", base, "--variant", "lora-r8")
    assert run_command(*arguments, "--set", *QUICK, "lora.r=2") == 0
    said = capsys.readouterr()
    assert f"lora-r8 on {base}: 290 trainable parameters, 128 train and 17 validation rows" in said.err
    assert "epoch 1: train loss 0." in said.out
    assert (f" and {tmp_path / 'run' / 'tensorboard'})" in said.out) == (tmp_path / "run" / "tensorboard").is_dir()
    assert "<- kept" in said.out
    assert "| on 17 validation rows | accuracy | macro F1 | lead of the model (95% interval) |" in said.out
    assert "| TF-IDF + logistic regression, fitted on 128 rows in " in said.out
    assert f"next: bertforge evaluate {tmp_path / 'run'} --data {data}" in said.out, "long paths are not broken"
    manifest = json.loads((tmp_path / "run" / "bertforge.json").read_text())
    assert Standing.from_dict(manifest["baselines"]).verdict in said.out
    assert (manifest["recipe"]["epochs"], manifest["recipe"]["lora"]["r"]) == (1, 2)
    assert manifest["history"][-1]["step"] == STEPS


def test_the_variants_are_listed_without_any_other_option(capsys):
    assert run_command("train", "--variant", "list") == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == variants()
    for line in said:
        assert len(line.split()) > 4, f"{line} says nothing"
    assert "lora-r1            LoRA on query and value, rank 1: 38,402 trainable parameters on BERT-base." in said


def test_the_settings_of_a_variant_are_listed_without_any_other_option(capsys):
    assert run_command("train", "--variant", "lora-r1", "--set", "list") == 0
    said = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1] for line in said.splitlines() if len(line.split()) > 2}
    recipe = load_recipe("lora-r1").to_dict()
    plain = [name for name in recipe if name not in ("lora", "tabular", "stackoverflow")]
    names = plain + [f"lora.{name}" for name in recipe["lora"]]
    assert set(names) <= set(rows)
    assert (rows["lora.r"], rows["seed"], rows["prefix_cache_gb"]) == ("1", "42", "-")
    derived = {name for name, value in rows.items() if value == "derived"}
    assert derived == {"rows_per_step", "tokens_per_step", "epochs", "lr", "head_lr", "warmup", "start"}
    assert "on the Stack Overflow questions: tokens_per_step=4096 epochs=4 lr=0.002 warmup=0.06 start=random" in said
    assert "tabular.bins" in rows, "what the recipe does not use can be set too"
    assert "Rank of the update." in said


def test_settings_are_listed_with_what_else_is_set_and_whole(capsys):
    assert run_command("train", "--variant", "lora-r8-all", "--set", "list", "epochs=7", "lora.r=3") == 0
    said = capsys.readouterr().out
    assert "\u2026" not in said, "no value is cut off"
    rows = {line.split()[0]: line.split()[1] for line in said.splitlines() if len(line.split()) > 1}
    assert (rows["epochs"], rows["lora.r"]) == ("7", "3")


@pytest.mark.parametrize(
    ("amount", "shown"),
    [(1234.5, "1,234.50"), (0.1, "0.10"), (0.0123, "0.012"), (0.00000123, "0.0000012"), (0, "0.00")],
)
def test_money_is_never_shown_as_nothing(amount, shown):
    assert _money(amount) == shown


def test_without_a_terminal_training_tells_each_epoch_and_how_far_it_is(tmp_path, data, base, capsys, monkeypatch):
    monkeypatch.setattr("bertforge.cli.train.EVERY_S", 0.0)
    arguments = ("train", "--data", data, "--out", tmp_path / "run", "--model", base, "--variant", "lora-r8")
    assert run_command(*arguments, "--set", *QUICK, "epochs=2") == 0
    said = capsys.readouterr().err.splitlines()
    assert any(line.startswith(f"epoch 1, step 2 of {2 * STEPS}: ") for line in said)
    assert sum(line.startswith("epoch 1: train loss ") for line in said) == 1
    assert not any("nan" in line for line in said)
    assert any("rows/s" in line and "loss" not in line for line in said), "before the first loss is read"


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_writes_metrics_and_a_report(tmp_path, data, runs, capsys, kind):
    report, metrics = tmp_path / "report.html", tmp_path / "metrics.json"
    arguments = ("evaluate", runs[kind], "--data", data, "--against", runs["full"])
    assert run_command(*arguments, "--report", report, "--json", metrics) == 0
    said = capsys.readouterr().out
    found = json.loads(metrics.read_text())
    assert f"{found['metrics']['rows']} rows" in said
    assert found["comparison"]["verdict"] in said
    assert f"wrote {metrics}" in said
    assert f"wrote {report}" in said
    assert report.read_text().startswith("<!doctype html>")
    assert found["data"]["made_up"] is True
    assert "made-up data: " in said
    assert not list(runs[kind].glob("*.html"))


def test_a_tables_report_stands_beside_the_prepared_splits(tmp_path, data, runs, capsys):
    run, table = tmp_path / "run", tmp_path / "test.csv"
    shutil.copytree(runs["full"], run)
    shutil.copy(data.with_suffix(".csv"), table)
    assert run_command("evaluate", run, "--data", data) == 0
    assert "may have been trained on" not in capsys.readouterr().out
    prepared = (run / "report-test.html").read_text()
    assert run_command("evaluate", run, "--data", table) == 0
    assert "test.csv (rows which the run may have been trained on: " in capsys.readouterr().out
    assert (run / "report-test.html").read_text() == prepared
    assert "may have been trained on" in (run / "report-table-test.html").read_text()


def test_predict_and_merge_go_together(tmp_path, data, runs, capsys):
    table, model = data.with_suffix(".csv"), tmp_path / "model"
    assert run_command("merge", runs["lora"], "--out", model) == 0
    said = capsys.readouterr().out
    assert re.search(r"on 4 validation rows the merge changed logits by \S+ at most, and 0 labels", said)
    assert f"next: bertforge predict {model} TABLE --out predictions.csv" in said
    for folder, out in ((runs["lora"], tmp_path / "run.parquet"), (model, tmp_path / "model.parquet")):
        assert run_command("predict", folder, table, "--out", out) == 0
        said = capsys.readouterr().out
        assert f"wrote {out}: 160 rows" in said
        assert "made-up data: " in said
    one, other = pd.read_parquet(tmp_path / "run.parquet"), pd.read_parquet(tmp_path / "model.parquet")
    # bfloat16, where `auto` chooses it, rounds an adapter beside its layer and within it differently.
    pd.testing.assert_frame_equal(one[["p_open"]], other[["p_open"]], atol=0.02)


def test_doctor_says_what_there_is_and_writes_json(tmp_path, capsys):
    assert run_command("doctor", "--json", tmp_path / "machine.json") == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "machine.json").read_text())
    machine = found["machine"]
    assert machine["device"] in ("cpu", "cuda")
    assert machine["cores"] >= 1
    assert machine["memory_gb"] > 0
    assert machine["precision"] in ("fp32", "bf16")
    assert machine["name"] in said
    assert f"torch {found['versions']['torch']}" in said
    assert f"telemetry   nothing calls home: {found['telemetry'].partition(': ')[2]}\n" in said
    assert "online      nothing, for HF_HUB_OFFLINE forbids it\n" in said, "as the tests have it"
    for library in found["optional"]:
        assert library["name"] in said
        hinted = f"pip install 'bertforge[{library['extra']}]'" in said
        assert hinted or library["installed"]


def test_doctor_names_the_folder_that_minilm_is_taken_from(base, capsys, monkeypatch):
    monkeypatch.delenv("BERTFORGE_MINILM", raising=False)
    assert run_command("doctor") == 0
    assert "BERTFORGE_MINILM" not in capsys.readouterr().out
    monkeypatch.setenv("BERTFORGE_MINILM", str(base))
    assert run_command("doctor") == 0
    assert f"minilm      {base}, which BERTFORGE_MINILM names" in capsys.readouterr().out


def test_estimate_prints_its_figures_and_writes_json(tmp_path, data, base, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bertforge.training.estimate.SECONDS", 0.1)
    arguments = ("train", "--data", data, "--model", base, "--variant", "lora-r8", "--set", *QUICK, "--estimate")
    assert run_command(*arguments, "--price-per-hour", "2.5", "--json", "figures.json") == 0
    said = capsys.readouterr()
    found = json.loads((tmp_path / "figures.json").read_text())
    assert [row["variant"] for row in found["rows"]] == ["full", "lora-r8", "lora-r8-last-4"]
    for row in found["rows"][:2]:
        assert f"{row['trainable_parameters']:,}" in said.out
        assert row["cost"] == row["device_hours"] * 2.5
    assert all(title in said.out for title in ("hours/epoch", "cost/epoch", "cost/run"))
    assert "lora-r8-last-4: the model has 2 layers, fewer than 4" in said.out
    assert "run: the epochs of its recipe (full 1, lora-r8 1)" in said.out
    assert ("the machine is busy" in said.out) == any(row["busy"] for row in found["rows"][:2])
    assert said.err.splitlines() == ["measuring full", "measuring lora-r8"]
    assert "…" not in said.out, "every column fits"
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    assert run_command(*arguments) == 0
    assert "cost" not in capsys.readouterr().out, "none without a price"


READ = [
    ("compile", "MODEL"),
    ("compile", "MODEL", "--data", "DATA"),
    ("compile", "MODEL", "--data", "DATA", "--out", "models/engine"),
    ("compile", "MODEL", "--target", "onnxruntime", "--precision", "fp32", "--verify"),
    ("evaluate", "MODEL", "--data", "DATA", "--report", "reports/r.html", "--json", "json/m.json"),
    ("predict", "MODEL", "DATA", "--out", "predictions/p.csv"),
    ("threshold", "MODEL", "--data", "DATA", "--precision", "0.5", "--json", "json/t.json"),
    ("quantize", "MODEL", "--data", "DATA", "--out", "models/q", "--json", "json/q.json"),
    ("benchmark", "MODEL", "--data", "DATA", "--out", "benchmarks"),
    ("merge", "MODEL", "--out", "models/merged"),
]


@pytest.mark.parametrize(
    ("absent", "command"),
    [(absent, command) for absent in ("MODEL", "DATA") for command in READ if absent in command],
    ids=lambda words: words if isinstance(words, str) else " ".join(words),
)
def test_a_folder_that_is_not_there_is_told_in_one_line_and_nothing_is_made(
    tmp_path, data, runs, capsys, monkeypatch, absent, command
):
    there = {"MODEL": shutil.copytree(runs["full"], tmp_path / "model"), "DATA": data} | {absent: f"{absent}/nope"}
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run_command(*(there.get(word, word) for word in command)) in (3, 4)
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1), said.err
    assert said.err.startswith(f"error: {absent}/nope")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_wrong_with_a_model_is_told_once_for_all_engines(tmp_path, data, runs, capsys):
    assert run_command("compile", runs["lora"], "--data", data, "--out", tmp_path / "engine") == 4
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"merge first: bertforge merge {runs['lora']} --out DIR" in said
    assert not list(tmp_path.iterdir())

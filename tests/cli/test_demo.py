"""The demo writes into its own folder again and into no one else's; that it runs is what `make demo` shows."""

from bertforge.autofit import fit, search
from bertforge.cli import demo
from bertforge.engines.fastest import Candidate
from bertforge.manifest import read_manifest
from bertforge.training import schedule
from tests.runs import needs_the_minilm_package, run_command


def test_a_folder_that_no_demo_made_is_refused_and_kept(tmp_path, capsys):
    table = tmp_path / "survey" / "questions.csv"
    table.parent.mkdir()
    table.write_text("years of work")
    assert run_command("demo", "--out", table.parent) == 4
    assert "holds something that is no demo; name another folder with --out" in capsys.readouterr().err
    assert table.read_text() == "years of work"
    assert run_command("demo", "--out", table) == 4
    assert f"{table} is a file; name a folder with --out" in capsys.readouterr().err


@needs_the_minilm_package
def test_an_interrupted_demo_goes_on_and_a_finished_one_is_replaced(tmp_path, monkeypatch, capsys):
    """The model is the real one, on a few rows and with one setting to try."""
    monkeypatch.setattr(demo, "ROWS", 60)
    monkeypatch.setattr(search, "candidates", lambda columns: [search.Candidate(True, 1.0, False)])
    monkeypatch.setattr(search, "LEAST_STEPS", 1)
    monkeypatch.setattr(schedule, "MOST_EPOCHS", 1)
    monkeypatch.setattr(fit, "candidates", lambda *arguments: [Candidate("onnxruntime", "fp32")])
    out = tmp_path / "demo"
    with monkeypatch.context() as patch:
        patch.setattr(fit, "merge_run", raise_interrupt)
        assert run_command("demo", "--out", out) == 130
    assert "the same command goes on" in capsys.readouterr().out
    (out / "notes.txt").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(search.Workbench, "trial", None)  # no trial is made again
        patch.setattr(fit, "finetune", None)
        assert run_command("demo", "--out", out) == 0
    said = capsys.readouterr().out
    assert f"predicted {demo.NEW_ROWS} new questions: {out / 'predictions.csv'}" in said
    assert "bertforge fit TABLE.csv --label-column folder --out model" in said
    assert read_manifest(out / "model", "fit")["serves"] == "engine"
    with monkeypatch.context() as patch:
        patch.setattr(fit, "baselines", raise_interrupt)
        assert run_command("demo", "--out", out) == 130
    assert not (out / "model" / "engine").exists(), "the finished one was removed"
    assert (out / "notes.txt").read_text() == "mine"


def raise_interrupt(*arguments):
    raise KeyboardInterrupt

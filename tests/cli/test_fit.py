"""`bertforge fit` on the command line: what it shows, and what is said when it is interrupted or cannot start."""

import pytest

from bertforge.autofit import fit as module
from bertforge.autofit import search
from bertforge.engines.fastest import Candidate
from tests.autofit.tables import mails
from tests.runs import run_command


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "mails.csv"
    mails(120)[["message", "folder"]].to_csv(path, index=False)
    return path


def test_it_goes_on_after_an_interrupt_and_ends_with_what_to_type_next(table, base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search, "candidates", lambda columns: [search.Candidate(True, 0.2, False)])
    monkeypatch.setattr(module, "candidates", lambda *arguments: [Candidate("onnxruntime", "fp32")])
    out = tmp_path / "model"
    command = ("fit", table, "--label-column", "folder", "--minutes", "2", "--out", out, "--model", base)
    with monkeypatch.context() as patch:
        patch.setattr(search.Workbench, "trial", raise_interrupt)
        assert run_command(*command) == 130
    said = capsys.readouterr()
    assert "text: message; label: folder" in said.out
    assert "the same command goes on" in said.out
    assert run_command(*command) == 0
    said = capsys.readouterr()
    for part in ("trials on validation rows", "LoRA, learning rate x 0.2", "Accuracy", "onnxruntime fp32", "next:"):
        assert part in said.out
    assert f"bertforge predict {out} TABLE --out predictions.csv" in said.out
    assert run_command(*command) == 0
    again = capsys.readouterr()
    assert "holds this fit, finished: nothing to do" in again.out
    assert again.out.splitlines()[1:] == said.out.splitlines()[-len(again.out.splitlines()) + 1 :], "the same summary"
    assert run_command("predict", out, table, "--out", tmp_path / "predictions.csv") == 0


def raise_interrupt(*arguments):
    raise KeyboardInterrupt


def test_what_cannot_be_is_one_line_and_an_exit_code(table, tmp_path, capsys):
    out = tmp_path / "model"
    assert run_command("fit", table, "--label-column", "folder", "--minutes", "0.2", "--out", out) == 2
    assert "--minutes 0.2 cannot be kept; name a number of minutes, 1 or more" in capsys.readouterr().err
    assert run_command("fit", table, "--label-column", "foldr", "--out", out) == 3
    assert "the table has no column foldr; did you mean folder? it has message, folder" in capsys.readouterr().err
    assert run_command("fit", tmp_path / "nope.csv", "--label-column", "folder", "--out", out) == 3
    assert "nope.csv does not exist" in capsys.readouterr().err
    assert not out.exists()

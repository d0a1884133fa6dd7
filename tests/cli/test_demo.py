"""The demo writes into its own folder again and into no one else's; that it runs is what `make demo` shows."""

from bertforge.cli import demo
from tests.runs import run_command


def test_a_folder_that_no_demo_made_is_refused_and_kept(tmp_path, capsys):
    table = tmp_path / "survey" / "questions.csv"
    table.parent.mkdir()
    table.write_text("years of work")
    assert run_command("demo", "--out", table.parent) == 4
    assert "holds something that is no demo; name another folder with --out" in capsys.readouterr().err
    assert table.read_text() == "years of work"
    assert run_command("demo", "--out", table) == 4
    assert f"{table} is a file; name a folder with --out" in capsys.readouterr().err


def test_an_earlier_demo_is_replaced_and_what_was_added_to_it_stays(tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("bertforge.data.prepare.prepare", stop)  # after the first of six steps
    monkeypatch.setattr(demo, "ROWS", 20)
    out = tmp_path / "demo"
    assert run_command("demo", "--out", out) == 130
    made = {path.name for path in out.iterdir()}
    assert made == {demo.MARKER, "questions.csv"}
    (out / "run").mkdir()
    (out / "run" / "old").touch()
    (out / "notes.txt").write_text("mine")
    assert run_command("demo", "--out", out) == 130
    assert {path.name for path in out.iterdir()} == {*made, "notes.txt"}

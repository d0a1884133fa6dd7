"""Exit codes mean something, and an error is one line that says what to type instead."""

import subprocess
import sys

import pytest
import torch

from bertforge.cli import main as module
from bertforge.errors import BertforgeError
from tests.runs import run_command

COMMANDS = (
    "demo",
    "doctor",
    "sample-data",
    "prepare",
    "train",
    "evaluate",
    "threshold",
    "predict",
    "merge",
    "serve",
    "export-triton",
)


def test_importing_the_command_line_loads_no_heavy_library():
    program = (
        "import sys, bertforge.cli.main; print(*({'torch', 'pandas', 'pyarrow', 'transformers'} & {*sys.modules}))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_and_says_how_to_begin(capsys, command):
    assert run_command(command, "--help") == 0
    said = capsys.readouterr().out
    assert f"Usage: bertforge {command}" in said
    if command not in ("demo", "sample-data"):  # whose usage line is the example
        assert said.count(f"bertforge {command}") > 1, "an example beside the usage line"


def test_help_lists_every_command(capsys):
    assert run_command("--help") == 0
    said = capsys.readouterr().out
    assert [line.split()[1] for line in said.splitlines() if line.startswith("│ ") and line[2] in "dsptem"] == [
        *COMMANDS
    ]
    assert run_command("--version") == 0
    assert capsys.readouterr().out.startswith("bertforge ")


def one_line(capsys):
    """What stands on stderr, which must be one line."""
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            ("train", "--data", "{data}", "--out", "{new}", "--variant", "lora-r9"),
            2,
            "'lora-r9' does not exist; choose",
        ),
        (
            ("train", "--data", "{data}", "--out", "{new}", "--set", "epoch=2"),
            2,
            "epoch is not a setting; did you mean epochs? known: ",
        ),
        (("train", "--data", "{data}", "--out", "{new}", "--variant", "a", "--recipe", "b"), 2, "give one of them"),
        (("train", "--data", "{data}"), 2, "--out is missing; name the run's folder: --out runs/first"),
        (("train", "--data", "{data}", "--resume", "--estimate"), 2, "leave --resume out"),
        (("train", "--data", "{data}", "--out", "{new}", "--estimate"), 2, "writes no run; leave --out out"),
        (("train", "--data", "{data}", "--out", "{new}", "--json", "{new}"), 2, "--json belongs to --estimate; add"),
        (("train", "--data", "{data}", "--out", "{new}", "--price-per-hour", "2"), 2, "--price-per-hour belongs to"),
        (("train", "--data", "absent", "--estimate"), 4, "absent does not exist; it should be a folder made by"),
        (("train", "--data", "{data}", "--estimate", "--json", "{run}"), 2, "is a folder; name a file"),
        (("predict", "{run}", "{table}", "--out", "{new}.xlsx"), 2, "should end in .csv, .parquet, .jsonl"),
        (("evaluate", "{run}", "--data", "{data}", "--split", "exam"), 2, "unknown part 'exam'"),
        (("predict", "{run}", "{table}", "--out", "{table}"), 2, "is the table itself, which would be overwritten"),
        (("predict", "{run}", "{table}", "--out", "{table}/p.csv"), 2, "questions.csv is a file; name another path"),
        (("evaluate", "{run}", "--data", "{data}", "--json", "{run}"), 2, "is a folder; name a file"),
        (("evaluate", "{run}", "--data", "{data}", "--report", "{table}/r.html"), 2, "is a file; name another path"),
        (("evaluate", "{run}", "--data", "{table}", "--split", "test"), 2, "is a raw table and scored whole"),
        (("predict", "{run}", "absent.csv", "--out", "{new}.csv"), 3, "absent.csv does not exist; name a table"),
        (("evaluate", "{run}", "--data", "{run}/tokenizer.txt"), 3, "tokenizer.txt does not exist"),
        (("train", "--data", "absent", "--out", "{new}"), 4, "absent does not exist; it should be a folder made by"),
        (
            ("predict", "{data}", "{table}", "--out", "{new}.csv"),
            4,
            "is of kind 'data', but run or model",
        ),
        (("train", "--data", "{data}", "--out", "{run}"), 4, "holds a finished run; name another folder with --out"),
        (
            ("train", "--data", "{data}", "--out", "{new}", "--model", "./absent"),
            4,
            "model folder ./absent does not exist",
        ),
        (
            ("train", "--data", "{data}", "--out", "{new}", "--variant", "bert-base"),  # the Hub is out of reach here
            4,
            "could not be downloaded (HF_HUB_OFFLINE forbids it); name a local folder, or --model minilm",
        ),
        (("merge", "{run}", "--out", "{new}"), 4, "there is nothing to merge"),
    ],
)
def test_an_expected_error_is_one_line_and_a_code(tmp_path, data, runs, capsys, arguments, code, said):
    table, new = data.with_suffix(".csv"), tmp_path / "new"
    filled = [argument.format(data=data, run=runs["full"], new=new, table=table) for argument in arguments]
    assert run_command(*filled) == code
    line = one_line(capsys)
    assert line.startswith("error: ")
    assert said in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", [0, 1, 3, 5], ids=["first", "after the command", "in between", "last"])
def test_debug_shows_the_traceback_wherever_it_stands(tmp_path, place):
    arguments = ["train", "--data", "absent", "--out", str(tmp_path / "run")]
    arguments.insert(place, "--debug")
    with pytest.raises(BertforgeError, match="absent does not exist"):
        run_command(*arguments)


def test_debug_on_the_command_line_prints_it(tmp_path):
    command = [sys.executable, "-m", "bertforge", "predict", "absent", "t.csv", "--out", "p.csv"]
    for extra, wanted in (["--debug"], True), ([], False):
        result = subprocess.run([*command, *extra], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert result.returncode != 0
        assert ("Traceback (most recent call last)" in result.stderr) == wanted
        assert "absent does not exist" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "--out", "x"), "error: --data is missing"),
        (("teach",), "No such command 'teach'"),
        (("merge", "x", "--out", "y", "--fast"), "No such option"),
        (("sample-data", "x.csv", "--rows", "many"), "Invalid value for '--rows'"),
    ],
)
def test_a_mistyped_command_is_code_2(capsys, arguments, said):
    assert run_command(*arguments) == 2
    assert said in capsys.readouterr().err


def test_a_defect_of_ours_is_code_1_and_says_how_to_see_more(tmp_path, data, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise KeyError("nobody knows")

    monkeypatch.setattr("bertforge.training.finetune.finetune", fail)
    assert run_command("train", "--data", data, "--out", tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert said.startswith("internal error: KeyError: ")
    assert "This is a defect of bertforge; run `bertforge --debug ...` for the traceback." in said


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (IsADirectoryError(21, "Is a directory", "some/path"), 4, "error: some/path: Is a directory"),
        (FileExistsError(17, "File exists", "beside", None, "some/path"), 4, "error: some/path: File exists"),
        (OSError(28, "No space left on device"), 4, "error: standard output: No space left on device"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to ..."), 5, "lower tokens_per_step: --set"),
    ],
    ids=["a path", "two paths", "no path", "GPU memory"],
)
def test_what_the_machine_refuses_is_no_defect(tmp_path, data, capsys, monkeypatch, error, code, said):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("bertforge.training.finetune.finetune", fail)
    assert run_command("train", "--data", data, "--out", tmp_path / "run") == code
    assert said in one_line(capsys)
    with pytest.raises(type(error)):
        run_command("--debug", "train", "--data", data, "--out", tmp_path / "run")


def test_an_interrupt_is_code_130(tmp_path, data, capsys, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("bertforge.training.finetune.finetune", interrupt)
    assert run_command("train", "--data", data, "--out", tmp_path / "run") == 130
    assert one_line(capsys) == "interrupted\n", "nothing was written, so there is nothing to resume"


def test_a_reader_that_goes_away_is_no_defect():
    command = f"{sys.executable} -m bertforge train --help | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert "defect" not in result.stderr


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("train --set a=1 b=2 --out x", "train --set a=1 --set b=2 --out x"),
        ("train --set a=1 --set b=2", "train --set a=1 --set b=2"),
        ("train --set a=1 b=2 c=3", "train --set a=1 --set b=2 --set c=3"),
        ("predict run=1 b=2.csv", "predict run=1 b=2.csv"),
        ("train --set a=1 --recipe b=2.toml", "train --set a=1 --recipe b=2.toml"),
        ("train --data d --debug", "--debug train --data d"),
        ("train --data d --threads 2 --out x", "--threads 2 train --data d --out x"),
        ("train --set a=1 --threads=2 b=2", "--threads=2 train --set a=1 --set b=2"),
    ],
)
def test_the_line_is_put_into_the_form_that_typer_reads(given, meant):
    assert module._normalised(given.split()) == meant.split()

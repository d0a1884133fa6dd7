"""Where a command writes: another one at work there is named before any work starts, and a full disk by its path."""

import resource
from contextlib import contextmanager

import pytest

from bertforge.training.history import History
from tests.runs import made_up, run_command
from tests.test_locks import held_by_another

COMMANDS = {
    "prepare": "prepare {table} --out {out} --model {base}",
    "train": "train --data {data} --out {out} --model {base} --set max_length=48",
    "cross-validate": "cross-validate --data {data} --out {out} --model {base}",
    "merge": "merge {lora} --out {out}",
    "compile": "compile {full} --target onnxruntime --precision fp32 --out {out}",
    "verify": "compile {full} --verify --out {out}",
    "quantize": "quantize {full} --data {data} --out {out}",
    "benchmark": "benchmark {full} --data {data} --out {out}",
    "fit": "fit {table} --label-column OpenStatus --out {out}",
    "demo": "demo --out {out}",
    "sample-data": "sample-data {out}.csv --rows 30",
    "predict": "predict {full} {table} --out {out}.csv",
    "predict to Parquet": "predict {full} {table} --out {out}.parquet",
    "report": "evaluate {full} --data {data} --report {out}.html",
    "metrics": "evaluate {full} --data {data} --report {out}.html --json {out}.json",
    "estimate": "train --estimate --data {data} --json {out}.json",
}
WRITES = ("prepare", "train", "merge", "sample-data", "predict", "predict to Parquet", "metrics")


@pytest.fixture
def arguments(tmp_path, data, base, runs):
    """The words of a command that writes to `out`, all else being as it should."""
    places = {"data": data, "base": base, "table": tmp_path / "t.csv", "out": tmp_path / "place" / "out", **runs}
    made_up(60).to_csv(places["table"], index=False)
    places["out"].parent.mkdir()
    return lambda command: [word.format(**places) for word in COMMANDS[command].split()]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("predict to Parquet", "metrics")])
def test_the_second_command_is_refused_before_it_works(tmp_path, arguments, command, capsys):
    words = arguments(command)
    name = next(word for word in reversed(words) if "place" in word).rpartition("/")[2]
    path = tmp_path / "place" / name
    with held_by_another(path) as process:
        before = sorted((tmp_path / "place").rglob("*"))
        assert run_command(*words) == 4
        said = capsys.readouterr()
        assert f"error: {path} is being written by process {process.pid}, since" in said.err
        assert "wrote" not in said.out
        assert sorted((tmp_path / "place").rglob("*")) == before


@contextmanager
def full_at(size):
    """Every file is full at `size` bytes; a full disk says no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("command", WRITES)
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # of a file that is closed too late
def test_a_full_disk_is_one_line_that_names_the_path(tmp_path, arguments, command, capsys):
    words = arguments(command)
    with full_at(700):
        code = run_command(*words)
    said = capsys.readouterr().err
    assert code == 4, said
    assert f"error: {tmp_path / 'place'}" in said
    assert ": File too large" in said
    assert "Traceback" not in said
    left = [path for path in (tmp_path / "place").rglob("*") if path.name.startswith(".")]
    assert not left, "nothing half-written"


def test_tensorboard_names_its_file_too_and_prints_nothing(tmp_path, capfd):
    pytest.importorskip("tensorboard")
    history = History(tmp_path, [])

    def add() -> None:
        for step in range(100):
            history.add({"step": step, "x": 1})

    with full_at(3000), pytest.raises(OSError, match=r"tensorboard/events\.out\.tfevents"):
        add()
    with pytest.raises(OSError, match="tensorboard"), full_at(3000):
        history.__exit__(None, None, None)
    assert capfd.readouterr().err == ""

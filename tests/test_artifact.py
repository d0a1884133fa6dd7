"""Nothing half-written is ever left under a final name, and a folder of the wrong kind is refused."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bertforge.artifact import check_output, fresh_directory, hash_file, versions, write_atomic, write_json
from bertforge.errors import ArtifactError, UsageError


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_versions_name_what_decides_a_result():
    assert {"python", "torch", "numpy", "tokenizers", "safetensors"} <= versions().keys()


def test_a_hash_is_the_contents(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    assert hash_file(tmp_path / "file") == "sha256:" + hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_file_is_written_with_its_folder(tmp_path):
    assert write_atomic(tmp_path / "new" / "file", "ä").read_bytes() == "ä".encode()
    assert write_atomic(tmp_path / "new" / "file", b"\0").read_bytes() == b"\0"
    assert names(tmp_path / "new") == ["file"]


def test_a_path_no_file_can_be_written_at_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "new", tmp_path / "a" / "b" / "c"):
        check_output(path)
    with pytest.raises(UsageError, match="is a folder; name a file, such as"):
        check_output(tmp_path)
    with pytest.raises(UsageError, match=r"cannot be written: .*file is a file; name another path"):
        check_output(tmp_path / "file" / "a" / "b")
    assert names(tmp_path) == ["file"]


def test_the_folder_one_stands_in_can_be_made_afresh(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with fresh_directory(Path()) as folder:
        (folder / "file").write_text("new")
    assert names(tmp_path / "here") == ["file"]
    assert names(tmp_path) == ["here"]
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ArtifactError, match="already exists and is not empty"), fresh_directory(Path()):
        pass


def test_who_reads_while_a_file_is_replaced_reads_the_old_one(tmp_path):
    write_atomic(tmp_path / "file", "old and longer")
    with (tmp_path / "file").open() as reader:
        write_atomic(tmp_path / "file", "new")
        assert reader.read() == "old and longer"
    assert (tmp_path / "file").read_text() == "new"


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    write_json(tmp_path / "file", {"a": 1})
    for unwritable in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(tmp_path / "file", unwritable)
    assert json.loads((tmp_path / "file").read_text()) == {"a": 1}
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_atomic(tmp_path / "folder", "a folder cannot be replaced by a file")
    assert names(tmp_path) == ["file", "folder"]


def test_a_fresh_directory_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "new" / "target"
    with fresh_directory(target) as directory:
        (directory / "file").write_text("content")
        assert not target.exists()
    assert names(tmp_path / "new") == ["target"]
    assert (target / "file").read_text() == "content"


def write_half(target, error, **options):
    with fresh_directory(target, **options) as directory:
        (directory / "file").write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_inside_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        write_half(tmp_path / "target", error)
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_inside_leaves_the_older_folder_as_it_was(tmp_path, error):
    target = tmp_path / "target"
    write_atomic(target / "old", "old")
    with pytest.raises(error):
        write_half(target, error, replace=True)
    assert names(tmp_path) == ["target"]
    assert names(target) == ["old"]


def test_an_interruption_of_the_swap_itself_keeps_the_older_folder(tmp_path, monkeypatch):
    target = tmp_path / "target"
    write_atomic(target / "old", "old")
    replace_by, moves = os.replace, []

    def interrupted(source, destination):
        moves.append(destination)
        if len(moves) == 2:  # the older folder has been moved aside, the new one is not yet in its place
            raise KeyboardInterrupt
        replace_by(source, destination)

    with pytest.raises(KeyboardInterrupt), fresh_directory(target, replace=True):
        monkeypatch.setattr("bertforge.artifact.os.replace", interrupted)
    assert names(tmp_path) == ["target"]
    assert names(target) == ["old"]


def test_a_killed_process_leaves_nothing_under_the_final_name(tmp_path):
    kill_inside = (
        "import os, sys; from pathlib import Path; from bertforge.artifact import fresh_directory\n"
        "with fresh_directory(Path(sys.argv[1])) as directory:\n"
        "    (directory / 'file').write_text('half'); os.kill(os.getpid(), 9)"
    )
    target = tmp_path / "target"
    assert subprocess.run([sys.executable, "-c", kill_inside, str(target)], check=False).returncode == -9
    assert not target.exists()
    with fresh_directory(target) as directory:
        (directory / "file").write_text("whole")
    assert (target / "file").read_text() == "whole"


def test_a_folder_that_holds_something_is_replaced_only_when_asked(tmp_path):
    write_atomic(tmp_path / "target" / "old", "old")
    with (
        pytest.raises(ArtifactError, match=r"already exists and is not empty; name another folder"),
        fresh_directory(tmp_path / "target"),
    ):
        pytest.fail("the block must not run")
    assert names(tmp_path / "target") == ["old"]
    with fresh_directory(tmp_path / "target", replace=True) as directory:
        (directory / "new").write_text("new")
    assert names(tmp_path) == ["target"]
    assert names(tmp_path / "target") == ["new"]


def test_an_empty_folder_may_stand_there_but_no_file(tmp_path):
    (tmp_path / "empty").mkdir()
    with fresh_directory(tmp_path / "empty") as directory:
        (directory / "file").write_text("content")
    assert names(tmp_path / "empty") == ["file"]
    for replace in (False, True):
        with pytest.raises(ArtifactError), fresh_directory(tmp_path / "empty" / "file", replace=replace):
            pytest.fail("the block must not run")
    assert (tmp_path / "empty" / "file").read_text() == "content"

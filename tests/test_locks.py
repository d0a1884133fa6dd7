"""One command writes an output at a time, and whatever kills it, the next one finds the old or the new."""

import errno
import fcntl
import json
import os
import signal
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from bertforge import locks
from bertforge.artifact import fresh_directory, write_atomic
from bertforge.digests import write_sealed
from bertforge.errors import ArtifactError, UsageError
from bertforge.locks import BusyError, locked
from bertforge.manifest import MANIFEST, WHILE_TRAINING, put_right, read_manifest
from tests import crashes
from tests.crashes import FORKED, After, Before, died

HANGS = 60  # seconds: only what hangs takes so long


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def wait_for(condition):
    until = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@contextmanager
def another(work, *arguments):
    """A process at work, killed at the end."""
    process = FORKED.Process(target=work, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


@contextmanager
def held_by_another(path, work=crashes.hold):
    told = path.parent / "told"
    with another(work, path, told) as process:
        wait_for(told.exists)
        yield process
    told.unlink()


def test_the_second_is_told_who_is_writing_and_leaves_all_as_it_is(tmp_path):
    with held_by_another(tmp_path / "out") as process:
        with pytest.raises(BusyError) as refused, locked(tmp_path / "out"):
            pytest.fail("both write")
        assert str(refused.value).startswith(f"{tmp_path / 'out'} is being written by process {process.pid}, since 20")
        assert str(refused.value).endswith("; wait until it ends or stop it, or name another place")
        with locked(tmp_path / "other"):
            assert (tmp_path / ".other.lock").exists()
    assert names(tmp_path) == [".out.lock"], "what the kill left"


def test_a_dead_holders_lock_is_taken_over_without_a_word(tmp_path, caplog):
    with held_by_another(tmp_path / "out"):
        pass
    assert (tmp_path / ".out.lock").exists()
    with locked(tmp_path / "out"):
        assert json.loads((tmp_path / ".out.lock").read_text())[0] == os.getpid()
    assert names(tmp_path) == []
    assert not caplog.records


def test_a_dead_holders_child_does_not_hold_on(tmp_path):
    with held_by_another(tmp_path / "out", crashes.hold_and_fork) as process:
        wait_for(lambda: (tmp_path / "told").read_text())
        child = int((tmp_path / "told").read_text())
        with pytest.raises(BusyError), locked(tmp_path / "out"):
            pytest.fail("both write")
        process.kill()
        process.join()
        os.kill(child, 0)  # it lives
        with locked(tmp_path / "out"):
            os.kill(child, signal.SIGKILL)


def test_one_thread_may_lock_twice_and_another_is_refused(tmp_path):
    found = []

    def ask():
        try:
            with locked(tmp_path / "out", patience=0):
                found.append("both write")
        except BusyError as error:
            found.append(str(error))

    with locked(tmp_path / "out"):
        with locked(tmp_path / "x" / ".." / "out"):
            pass
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert f"process {os.getpid()}, since" in found[0]
    assert names(tmp_path) == []


def test_a_link_to_a_folder_has_the_folders_lock(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    with held_by_another(tmp_path / "out"), pytest.raises(BusyError), locked(tmp_path / "link"):
        pytest.fail("both write")


def test_many_take_their_turns(tmp_path):
    """Each removes the lock's file, so that who waited has locked a file that bears the name no more."""
    (tmp_path / "count").write_text("0")
    workers = [FORKED.Process(target=crashes.count_up, args=(tmp_path / "count", 100)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(HANGS)
    assert (tmp_path / "count").read_text() == "300"
    assert names(tmp_path) == ["count"]


def test_who_needs_what_another_makes_waits_and_says_so(tmp_path, caplog):
    with held_by_another(tmp_path / "tokens") as process:
        threading.Timer(1.5 * locks.PATIENCE, process.kill).start()
        with locked(tmp_path / "tokens", patience=HANGS):
            pass
    assert [record.message.endswith("waiting for it to end") for record in caplog.records] == [True]


def test_a_file_system_without_locks_is_told_and_nothing_is_cleared_there(tmp_path, monkeypatch, caplog):
    def refuse(fd, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".out.partial").mkdir()  # it may be a live one's
    with locked(tmp_path / "out"):
        write_atomic(tmp_path / "file", "content")
    assert "knows no locks: start no other command that writes there" in caplog.text
    refused = pytest.raises(ArtifactError, match=r"\.out\.partial is in the way; remove it: rm -r ")
    with refused, fresh_directory(tmp_path / "out"):
        pytest.fail("two write")
    assert names(tmp_path) == [".out.partial", "file"]


def test_folders_made_for_the_lock_alone_go_with_it(tmp_path):
    with locked(tmp_path / "a" / "b" / "out"):
        pass
    assert names(tmp_path) == []
    with locked(tmp_path / "a" / "out"):
        (tmp_path / "a" / "out").mkdir()
    assert names(tmp_path / "a") == ["out"]


def whole(path):
    """Which of both folders stands at `path`, and nothing beside it."""
    assert names(path.parent) == [path.name]
    found = {file.relative_to(path).as_posix(): file.read_text() for file in path.rglob("*") if file.is_file()}
    both = {"old": {"first": "old"}, "new": {"first": "new" * 100, "more/second": "new" * 100}}
    return next(which for which, content in both.items() if content == found)


@pytest.mark.parametrize("next_one", [put_right, crashes.replace_folder], ids=["read", "written"])
def test_wherever_a_folders_writer_dies_the_next_command_finds_one_whole(tmp_path, next_one):
    seen = []
    for kind, points in ((Before, range(1000)), (After, (0, 3, 150, 299))):
        for number in points:
            path = tmp_path / f"{kind.__name__}-{number}" / "out"
            write_atomic(path / "first", "old")
            if not died(kind(number), crashes.replace_folder, path):
                break
            hidden = not path.exists()
            next_one(path)
            seen.append((whole(path), hidden))
    if next_one is put_right:
        assert {("old", False), ("old", True), ("new", False)} <= set(seen)
        assert seen[-1] == ("old", False), "killed in a write"
    assert len(seen) > 10


def test_wherever_a_files_writer_dies_the_file_is_whole_and_alone(tmp_path):
    seen = set()
    for number in range(1000):
        path = tmp_path / f"{number}" / "out"
        write_atomic(path, "old")
        met = died(Before(number), crashes.replace_file, path)
        seen.add(path.read_text())
        with locked(path):
            pass
        assert names(path.parent) == ["out"]
        if not met:
            break
    assert seen == {"old", "new" * 100}
    write_atomic(path, "old")
    assert died(After(100), crashes.replace_file, path)
    assert path.read_text() == "old"


def test_wherever_a_run_dies_as_it_ends_no_checkpoint_stays_with_the_finished_one(tmp_path):
    kept = []
    for number in range(1000):
        path = tmp_path / f"{number}" / "run"
        for name in WHILE_TRAINING:
            write_atomic(path / name, name)
        met = died(Before(number), crashes.end_a_run, path)
        with suppress(ArtifactError):  # it holds a run that has not ended
            read_manifest(path, "fit")
        kept.append(names(path))
        if not met:
            break
    assert set(map(tuple, kept)) == {tuple(sorted(WHILE_TRAINING)), (MANIFEST,)}, "all that resuming needs, or nothing"


def test_the_file_of_a_living_writer_stays(tmp_path):
    (tmp_path / "run").mkdir()
    with locks.new_file(tmp_path / "run" / "report.html") as file:
        file.write(b"half")
        with locked(tmp_path / "run"):
            assert len(names(tmp_path / "run")) == 1
    assert names(tmp_path / "run") == ["report.html"]
    (tmp_path / "run" / ".best.safetensors.0123abcd.partial").write_text("a dead one's")
    with locked(tmp_path / "run"):
        assert names(tmp_path / "run") == ["report.html"]


def test_a_reader_of_what_is_not_written_yet_is_told_who_writes_it(tmp_path):
    with held_by_another(tmp_path / "data") as process:
        with pytest.raises(BusyError, match=f"data is being written by process {process.pid}, since"):
            read_manifest(tmp_path / "data", "data")
        (tmp_path / "data").mkdir()
        write_sealed(tmp_path / "data" / MANIFEST, {"kind": "fit", "serves": "run", "files": {}})
        assert read_manifest(tmp_path / "data", "fit")["serves"] == "run", "an older one is read while it is replaced"


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "victim"
    path.mkdir()
    (path / "file").write_text("years of work")
    yield path
    assert names(path) == ["file"]
    assert (path / "file").read_text() == "years of work"


def test_a_planted_lock_is_not_written_to(tmp_path, victim):
    lock = tmp_path / ".out.lock"
    refused = pytest.raises(ArtifactError, match=r"\.out\.lock is no lock of bertforge; remove it: rm ")
    lock.symlink_to(victim / "file")
    with refused, locked(tmp_path / "out"):
        pytest.fail("a link was followed")
    lock.unlink()
    os.link(victim / "file", lock)
    with refused, locked(tmp_path / "out"):
        pytest.fail("another's file was taken for a lock")
    lock.unlink()


def test_planted_links_are_not_followed_by_what_is_written(tmp_path, victim, monkeypatch):
    for name in (".out.partial", ".out.bertforge-old", ".out.0123abcd.partial"):
        (tmp_path / name).symlink_to(victim)
    crashes.replace_folder(tmp_path / "out")
    assert (tmp_path / "out" / "first").read_text() == "new" * 100
    (tmp_path / "file").symlink_to(victim / "file")
    write_atomic(tmp_path / "file", "mine")
    assert not (tmp_path / "file").is_symlink()
    monkeypatch.setattr(locks.secrets, "token_hex", lambda count: "0123abcd")  # who could guess it
    (tmp_path / ".guess.0123abcd.partial").symlink_to(victim / "file")
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "guess", "mine")


def test_in_a_folder_mounted_from_elsewhere_the_lock_lies_within(tmp_path, monkeypatch):
    """Its parent may not be written."""
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with locked(out):
        assert names(out) == [".lock"]
        assert names(tmp_path) == ["out"]
    assert names(out) == []


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which no file can be made: /proc")
def test_a_folder_that_takes_no_files_is_named():
    with (
        pytest.raises(UsageError, match="no file can be made in /proc; name another place"),
        locked(Path("/proc/x.csv")),
    ):
        pass

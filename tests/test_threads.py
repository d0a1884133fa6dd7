"""The number of threads: asked for, or set by the user, or what the process may use; and every library hears of it."""

import os
import subprocess
import sys

import pytest

from bertforge import threads


@pytest.fixture
def unset(monkeypatch):
    """None of the variables is set, and none stays so after the test."""
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # remembers to put back what there was
        monkeypatch.delenv(name)
    return monkeypatch


def groups(tmp_path, own, **limits):
    """A made-up /sys/fs/cgroup with files of `limits`, `__` for a slash, and /proc/self/cgroup that says `own`."""
    for name, text in limits.items():
        path = tmp_path / "fs" / name.replace("__", "/").replace("cpu_max", "cpu.max").replace("cfs", "cpu.cfs")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "own").write_text(own)
    return tmp_path / "fs", tmp_path / "own"


@pytest.mark.parametrize(
    ("own", "limits", "cores"),
    [
        ("0::/\n", {}, 64),
        ("0::/\n", {"cpu_max": "max 100000\n"}, 64),
        ("0::/\n", {"cpu_max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu_max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu_max": "10000 100000\n"}, 1),
        ("0::/\n", {"cpu_max": "99900000 100000\n"}, 64),
        ("0::/a/b\n", {"a__b__cpu_max": "max 100000", "a__cpu_max": "300000 100000"}, 3),
        ("0::/a/b\n", {"a__b__cpu_max": "200000 100000", "a__cpu_max": "300000 100000", "c__cpu_max": "1 1"}, 2),
        ("4:cpu:/\n", {"cpu__cfs_quota_us": "400000\n", "cpu__cfs_period_us": "100000\n"}, 4),
        ("4:cpu:/\n", {"cpu__cfs_quota_us": "-1\n", "cpu__cfs_period_us": "100000\n"}, 64),
    ],
)
def test_a_container_has_the_cores_of_its_quota(tmp_path, monkeypatch, own, limits, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    assert threads.usable_cores(*groups(tmp_path, own, **limits)) == cores


def test_this_process_may_use_the_cores_it_is_bound_to():
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert 1 <= threads.usable_cores() <= bound


def test_the_users_variables_stay_and_a_number_asked_for_goes_before_them(unset):
    threads.set_environment()
    assert os.environ["OMP_NUM_THREADS"] == os.environ["RAYON_NUM_THREADS"] == str(threads.usable_cores())
    unset.setenv("OMP_NUM_THREADS", "7,2")
    unset.setenv("GOMP_SPINCOUNT", "5")
    threads.set_environment()
    assert (os.environ["OMP_NUM_THREADS"], os.environ["GOMP_SPINCOUNT"], threads.count()) == ("7,2", "5", 7)
    threads.set_environment(3)
    assert os.environ["OMP_NUM_THREADS"] == os.environ["RAYON_NUM_THREADS"] == "3"
    assert threads.count() == 3


def test_how_threads_wait_is_left_to_a_user_who_says_it_in_openmps_own_words(unset):
    unset.setenv("OMP_WAIT_POLICY", "active")
    threads.set_environment()
    assert "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.parametrize("arguments", ["--threads 1 doctor", "doctor --threads=1"])
def test_the_command_lines_number_reaches_torch_and_the_engines(arguments):
    program = f"""
import os, sys
from bertforge.cli.main import main
sys.argv = ["bertforge", *{arguments.split()!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end
import torch
from bertforge.hardware import detect
print(torch.get_num_threads(), detect().cores, os.environ["RAYON_NUM_THREADS"])
"""
    waiting = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # the tests' own; either would be left as it is
    environment = {name: value for name, value in os.environ.items() if name not in waiting}
    environment |= {"OMP_NUM_THREADS": "2", "OMP_DISPLAY_ENV": "verbose"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.splitlines()[-1] == "1 1 1"
    if "GOMP_SPINCOUNT" in run.stderr:  # torch has GCC's OpenMP
        assert f"GOMP_SPINCOUNT = '{threads._SPINS}'" in run.stderr


def test_no_thread_at_all_is_refused():
    run = subprocess.run(
        [sys.executable, "-m", "bertforge", "doctor", "--threads", "0"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "--threads" in run.stderr

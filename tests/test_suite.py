"""benchmarks/tables.py: processes share the jobs without loss, and their records become one."""

import argparse
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("tables")


@pytest.fixture
def jobs(suite):
    return suite.all_jobs(argparse.Namespace(only=list(suite.NAMES), systems=list(suite.SYSTEMS), seeds=[42, 43]))


@pytest.mark.parametrize("parts", [1, 3, 10, 200])
def test_every_job_is_dealt_once(suite, jobs, parts):
    dealt = [suite.share(jobs, part, parts, lambda job: job.seconds(None, 5)) for part in range(1, parts + 1)]
    assert sorted(job.key for part in dealt for job in part) == sorted(job.key for job in jobs)


def test_shares_take_about_as_long(suite, jobs):
    jobs = [job for job in jobs if job.seconds(None, 5) < 100]
    dealt = [suite.share(jobs, part, 4, lambda job: job.seconds(None, 5)) for part in range(1, 5)]
    seconds = [sum(job.seconds(None, 5) for job in part) for part in dealt]
    assert max(seconds) < 1.1 * min(seconds)


def test_columns_and_fit_are_left_out_where_they_cannot_be(jobs):
    keys = {(job.table.name, job.system) for job in jobs}
    assert ("banking77", "fit") in keys
    assert ("banking77-own-test", "fit") not in keys
    assert ("airline-tweets", "columns") in keys
    assert ("banking77", "columns") not in keys


def made(*rows, **head):
    base = {"benchmark": "tables", "commit": None, "device": "a", "versions": {}, "date": "2026-01-01", "seed": [42]}
    return (
        base | head | {"rows": [{"table": "banking77", "job": "trainer", "seed": 42, "system": "T"} | r for r in rows]}
    )


def test_a_measured_row_replaces_a_missing_one(suite):
    missing, measured, other = {"missing": "full"}, {"accuracy": 0.9}, {"accuracy": 0.8, "seed": 43}
    for records in ([made(missing, other), made(measured)], [made(measured), made(other, missing)]):
        joined = suite.join(records)
        assert [row["accuracy"] for row in joined["rows"]] == [0.9, 0.8]
        assert joined["seed"] == [42, 43]
    assert suite.join([made(missing)])["rows"][0]["missing"] == "full"


def test_records_of_other_machines_are_not_joined(suite):
    with pytest.raises(SystemExit, match="different device: a and b"):
        suite.join([made(), made(device="b")])

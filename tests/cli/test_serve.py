"""What `bertforge serve` refuses before anything starts; tests/serving has the rest."""

import shutil
import socket
import tempfile

import pytest

from tests.runs import reseal, run_command


@pytest.fixture
def said(capfd):
    """The one line of a command that fails, and its exit code."""

    def run(*arguments):
        code = run_command("serve", *arguments)
        return code, " ".join(capfd.readouterr().err.split())

    return run


def test_a_folder_that_is_missing_or_no_model_is_named(said, data, tmp_path):
    assert said(tmp_path / "nothing")[0] == 4
    code, line = said(data, "--port", 0)
    assert (code, "is of kind 'data'" in line) == (4, True)


def test_models_have_names_of_their_own(said, runs):
    code, line = said(runs["full"], f"full={runs['lora']}")
    assert (code, "two models are called full" in line) == (2, True)
    code, line = said(f"my model={runs['full']}")
    assert (code, "'my model' cannot be the name of a model" in line) == (2, True)


def test_a_prior_is_of_the_labels_of_all_models(said, runs, tmp_path):
    other = shutil.copytree(runs["lora"], tmp_path / "other")
    reseal(other, labels=["spam", "ham"])
    code, line = said(runs["full"], other, "--prior", "closed=0.06", "--port", 0)
    assert (code, "--prior is for all models, and these have different labels" in line) == (2, True)
    code, line = said(runs["full"], "--prior", "0.06", "--port", 0)
    assert (code, "--prior '0.06' is not LABEL=NUMBER" in line) == (2, True)


def test_an_address_that_is_taken_or_wrong_is_named(said, runs):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, line = said(runs["full"], "--port", port)
    assert (code, line) == (2, f"error: --host 127.0.0.1 --port {port}: address already in use; name another")
    code, line = said(runs["full"], "--host", "256.0.0.1")
    assert (code, "error: --host 256.0.0.1 --port 8080: " in line) == (2, True)


def test_a_folder_of_temporary_files_may_be_too_deep_for_a_socket(said, runs, tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    code, line = said(runs["full"], "--port", 0)
    assert (code, f"{deep}, the folder of temporary files, has too long a name for a socket" in line) == (5, True)


def test_an_address_that_others_reach_wants_keys(said, runs, tmp_path):
    code, line = said(runs["full"], "--host", "0.0.0.0", "--port", 0)
    assert code == 2
    assert "--host 0.0.0.0 lets other machines ask; name who may with --api-keys FILE" in line
    code, line = said(runs["full"], "--host", "0.0.0.0", "--port", 0, "--api-keys", tmp_path / "none")
    assert (code, "--api-keys" in line, "cannot be read" in line) == (2, True, True)


def test_what_cannot_start_ends_the_service_with_its_reason(said, runs):
    code, line = said(runs["full"], "--port", 0, "--precision", "fp64")
    assert code == 2
    assert "fp64" in line

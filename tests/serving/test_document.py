"""`docs/serving.md` is a session in a shell: this runs its commands and programs and compares the answers it shows."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
from contextlib import suppress
from inspect import signature

import pytest

from bertforge.cli.serve import serve
from bertforge.serving.requests import CODES
from tests.runs import reseal
from tests.serving.service import PATIENCE, ROOT

DOCUMENT = (ROOT / "docs" / "serving.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE)


def form(value):
    """What an answer is like, whatever texts and numbers stand in it."""
    if isinstance(value, dict):
        return {name: form(part) for name, part in sorted(value.items()) if name != "probabilities"}
    return [form(part) for part in value] if isinstance(value, list) and not isinstance(value[0], float) else "value"


def script(blocks, port):
    """A shell script of the blocks; the output of block 3 goes to `3.out`."""
    lines = ["set -euo pipefail"]
    for number, (language, text) in enumerate(blocks):
        assert language in ("sh", "python", "json"), f"nothing runs a block of {language}"
        text = text.replace("8080", str(port)).replace("bertforge serve", f"bertforge serve --port {port}")
        if language == "python":
            text = f"export KEY=${{KEY:-}}; python - <<'END'\n{text}END\n"
        if language != "json":
            lines.append(f"{{\n{text}}} > {number}.out")
    return "\n".join([*lines, "kill -TERM $SERVER", "wait $SERVER", "echo whole > end.out\n"])


@pytest.fixture(scope="module")
def session(runs, tmp_path_factory):
    """The folder in which the whole document was run."""
    assert shutil.which("curl"), "the document's commands need curl: apt-get install curl"
    folder = tmp_path_factory.mktemp("session")
    for name, run in {"models/first": "full", "models/questions": "columns", "models/next": "full"}.items():
        shutil.copytree(runs[run], folder / name)
    reseal(folder / "models/next", temperature=2.0)
    for name in ("first", "spam"):
        shutil.copytree(runs["lora"], folder / "runs" / name)
    (folder / "bin").mkdir()
    for name, command in {"bertforge": "-m bertforge", "python": ""}.items():
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} {command} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "session.sh").write_text(script(BLOCKS, port))
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"}  # the client asks this machine alone
    with (folder / "said").open("w") as said:
        shell = subprocess.Popen(
            ["bash", "session.sh"], cwd=folder, env=environment, stdout=said, stderr=said, start_new_session=True
        )
        try:
            shell.wait(4 * PATIENCE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)  # a server that it left behind
    assert shell.returncode == 0, (folder / "said").read_text()
    return folder


def test_every_command_and_program_runs(session):
    assert (session / "end.out").read_text() == "whole\n"
    for number, (language, text) in enumerate(BLOCKS):
        if language == "python":
            lines = (session / f"{number}.out").read_text()
            assert re.search(r"open|closed", lines), text


def test_the_answers_are_like_those_that_are_shown(session):
    shown = [number for number, (language, _) in enumerate(BLOCKS) if language == "json"]
    assert len(shown) >= 4
    for number in shown:
        answer = json.loads((session / f"{number - 1}.out").read_text())
        assert form(answer) == form(json.loads(BLOCKS[number][1])), BLOCKS[number - 1][1]


def test_the_client_is_ten_lines():
    (code,) = [text for language, text in BLOCKS if language == "python" and "def classify" in text]
    client = code.split("\nfor ")[0]
    assert len([line for line in client.splitlines() if line]) == 10


def test_the_client_asks_again_where_it_was_cut_off_and_gives_up_in_the_end(monkeypatch):
    (code,) = [text for language, text in BLOCKS if language == "python" and "def classify" in text]
    cut, full, answer = b"", b"429 Full\r\nRetry-After: 7", b"200 OK"
    bodies = {answer: b'{"results": ["a result"]}'}
    waited, client = [], {}
    monkeypatch.setattr("time.sleep", waited.append)
    exec(code.split("\nfor ")[0], client)

    def asked(*heads):
        with socket.create_server(("127.0.0.1", 0)) as server:

            def serve():
                for head in heads:
                    connection, _ = server.accept()
                    with connection, connection.makefile("rb") as sent:
                        length = next(int(line.split()[1]) for line in sent if line.startswith(b"Content-Length"))
                        while sent.readline().strip():
                            pass
                        sent.read(length)
                        if head:
                            connection.sendall(b"HTTP/1.1 %s\r\n\r\n%s" % (head, bodies.get(head, b"")))

            serving = threading.Thread(target=serve)
            serving.start()
            try:
                return client["classify"](["a"], f"http://127.0.0.1:{server.getsockname()[1]}")
            finally:
                serving.join(PATIENCE)

    assert asked(cut, full, answer) == ["a result"]
    assert waited == [1, 7]
    with pytest.raises(urllib.error.HTTPError, match="422"):
        asked(b"422 Field")
    with pytest.raises(ConnectionError):
        asked(*[cut] * 10)
    assert len(waited) == 2 + 9


def test_the_metrics_that_are_named_exist(session):
    (number,) = [number for number, (_, text) in enumerate(BLOCKS) if "8080/metrics" in text]
    told = (session / f"{number}.out").read_text()
    for name in set(re.findall(r"\bbertforge_\w+", DOCUMENT)):
        assert re.search(rf"^(# TYPE )?{name}(_count)?[ {{]", told, re.MULTILINE), name


def test_the_codes_of_refusals_are_all_there():
    listed = re.findall(r"^\| (\d+) \| `(\w+)` \|", DOCUMENT, re.MULTILINE)
    assert {int(status): code for status, code in listed} == CODES


def test_the_options_that_are_named_have_these_defaults():
    parameters = signature(serve).parameters.items()
    defaults = {f"--{name.replace('_', '-')}": parameter.default for name, parameter in parameters}
    listed = re.findall(r"^\| `(--[\w-]+)` \| (\d+) \|", DOCUMENT, re.MULTILINE)
    assert len(listed) == 6
    for option, default in listed:
        assert defaults[option] == float(default), option

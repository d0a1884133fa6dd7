"""The Dockerfile and compose.yaml: clean by their linters, and the steps that make the image make a server.

No image is built here. The `RUN` steps of the CPU's image run as they stand in a new environment, with the folders of
the image below a temporary one. They ask no index: what they want to download must be what `make test` has installed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import yaml

ROOT = Path(__file__).parent.parent
BIN = Path(sys.prefix) / "bin"
VENV = "/opt/bertforge"


def instructions() -> list[tuple[str, str]]:
    lines = (line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in whole.splitlines() if line)]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, those of the stage that it begins with among them."""
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = list(found.get(base, []))
        else:
            found[name].append((word, rest))
    return found


def compose() -> dict:
    return yaml.safe_load((ROOT / "compose.yaml").read_text())


def lint(*command: object) -> None:
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_finds_nothing():
    lint(BIN / "hadolint", "Dockerfile")


def test_compose_yaml_is_of_the_published_schema():
    lint(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml")


def test_hadolint_and_the_schema_find_what_is_wrong(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN pip install torch\n")
    (tmp_path / "compose.yaml").write_text("services: {cpu: {imagine: bertforge}}\n")
    with pytest.raises(AssertionError, match="DL3006"):
        lint(BIN / "hadolint", tmp_path / "Dockerfile")
    with pytest.raises(AssertionError, match="imagine"):
        lint(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", tmp_path / "compose.yaml")


def test_the_services_are_the_stages_of_the_dockerfile():
    assert {service["build"]["target"] for service in compose()["services"].values()} == {"cpu", "cuda"}
    for target in ("cpu", "cuda"):
        made = stages()[target]
        assert made[-1] == ("USER", "10001"), "the last word, so that the server runs as it"
        assert f"--from=build-{target} {VENV} {VENV}" in dict(made)["COPY"]


def ran(target: str, image: Path) -> dict[str, str]:
    """Runs a stage below `image`, and returns the environment that it leaves."""
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's spelling of yes
        "PIP_NO_COMPILE": "1",
        "PYTHONPYCACHEPREFIX": str(image / "pycache"),
    }
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    folder = image
    for word, rest in stages()[target]:
        rest = rest.replace(VENV, str(image / VENV[1:]))
        if word == "ENV":
            pairs = (pair.partition("=") for pair in rest.split())
            environment |= {name: value.replace("$PATH", environment["PATH"]) for name, _, value in pairs}
        elif word == "WORKDIR":
            folder = image / rest[1:]
            folder.mkdir(parents=True)
        elif word == "COPY":
            *names, place = rest.split()
            assert set(names) <= set(allowed), ".dockerignore keeps the rest out of the build"
            for name in names:
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
                options = {"dirs_exist_ok": True} if copy is shutil.copytree else {}
                copy(ROOT / name, folder / place / (name if place.endswith("./") else ""), **options)
        elif word == "RUN":
            done = subprocess.run(["sh", "-c", rest], cwd=folder, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{rest}\n{done.stdout}{done.stderr}"
            for packages in (image / VENV[1:]).glob("lib/*/site-packages"):
                (packages / "downloaded.pth").write_text(str(Path(pandas.__file__).parents[1]))
                shutil.rmtree(packages / "setuptools", ignore_errors=True)  # an old one, which Python 3.11 brings along
                for told in packages.glob("setuptools-*"):
                    shutil.rmtree(told)
    return environment


def test_the_steps_of_the_image_make_the_server_that_compose_starts(tmp_path):
    environment = ran("build-cpu", tmp_path) | {"HOME": "/nowhere", "COLUMNS": "200"}
    where = [sys.executable, "-c", "import bertforge; print(bertforge.__file__)"]
    where[0] = str(tmp_path / VENV[1:] / "bin" / "python")
    found = subprocess.run(where, env=environment, cwd="/", capture_output=True, text=True, check=True).stdout
    assert found.startswith(str(tmp_path)), "the package that was built, not the one under test"

    server = dict(stages()["cpu"])
    (program,), told = json.loads(server["ENTRYPOINT"]), json.loads(server["CMD"])
    assert told[-1] == "--help"
    program = tmp_path / VENV[1:] / "bin" / program
    said = subprocess.run([program, *told], env=environment, cwd="/", capture_output=True, text=True, check=True).stdout
    command, folder, *options = compose()["x-server"]["command"]
    assert (command, folder) == (told[0], "/models/${MODEL:?}")
    assert {option for option in options if option.startswith("--")} <= set(re.findall(r"--[a-z-]+", said))


def test_health_is_asked_where_the_server_answers(tmp_path):
    (check,) = (rest for word, rest in stages()["server"] if word == "HEALTHCHECK")
    python, option, program = json.loads(check.partition("CMD ")[2])
    assert (python, option) == ("python", "-c")
    asked = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", program)
    assert asked is not None
    assert asked[2] == "/readyz"
    assert dict(stages()["server"])["EXPOSE"] == asked[1] == compose()["x-server"]["ports"][0].rpartition(":")[2]
    assert subprocess.run([sys.executable, option, program.replace(asked[1], "9")], capture_output=True).returncode == 1

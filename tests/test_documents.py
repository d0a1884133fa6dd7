"""What the documents say is so: their tables are the records', and the commands they show exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bertforge.engines.registry import TARGETS
from bertforge.models import resolve
from bertforge.training.config import variants

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def test_tables_are_those_of_the_records():
    check = subprocess.run(
        [sys.executable, "benchmarks/documents.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stdout + check.stderr


def test_every_engine_has_a_row():
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (.+) \|$", (ROOT / "docs/engines.md").read_text(), re.MULTILINE))
    assert rows.keys() >= TARGETS.keys()
    for name, target in TARGETS.items():
        precisions, _, install = rows[name].split(" | ")
        assert set(re.findall(r"[a-z]+\d+", precisions)) == set(target.precisions)
        assert target.hint in install


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_and_variants_in_backticks_exist(document):
    text = document.read_text()
    for path in re.findall(r"`((?:src|tests|benchmarks|docs)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"--variant ([\w-]+)", text):
        assert name in variants(), name


def test_the_readmes_python_runs(runs, capsys):
    """With a model that is here for the Hub's, and a run of the tests for the reader's."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for name, here in {"bert-base-uncased": resolve("minilm"), "runs/first": runs["full"]}.items():
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', repr(str(here)))
    names = {}
    exec(code, names)
    assert names["logits"].shape == (1, 2)
    assert "p_closed" in capsys.readouterr().out

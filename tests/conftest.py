"""Settings for every test, made before torch, huggingface_hub and onnxruntime are imported, which read them then."""

import os
from pathlib import Path

import pytest

# Nothing may reach for a model hub, whatever the machine running the tests allows.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # some tests import onnxruntime themselves
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The tests' models are tiny: one thread runs them as fast as two. Where more are asked for, they sleep while they wait
# for one another: spinning, they take a core from the one that others wait for, and shared cores come to a standstill.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random pretrained encoder."""
    from tests.runs import make_base

    return make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """160 made-up questions, prepared; the table is the file of the same name with .csv."""
    from tests.runs import made_up, prepare_frame

    return prepare_frame(made_up(160), tmp_path_factory.mktemp("data") / "questions", base)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> dict[str, Path]:
    """One finished run of each kind; tests that change a folder copy it first."""
    from bertforge.training.finetune import finetune
    from tests.runs import KINDS, quick_recipe

    folder = tmp_path_factory.mktemp("runs")
    for kind in KINDS:
        finetune(data, folder / kind, quick_recipe(base, kind))
    return {kind: folder / kind for kind in KINDS}

"""The services that several files of tests ask."""

import shutil

import pytest

from tests.runs import reseal
from tests.serving.service import service


@pytest.fixture(scope="session")
def protocols(runs, tmp_path_factory):
    """`text` and then `columns`, behind a key that its client sends, with small limits."""
    folder, key = tmp_path_factory.mktemp("protocols"), "web-key-0123456789"
    (folder / "keys").write_text(f"web {key}\n")
    models = [f"text={runs['full']}", f"columns={runs['columns']}"]
    limits = ["--max-texts", 64, "--max-characters", 1000, "--max-body-mb", 0.0625]
    with service(folder / "log", *models, *limits, "--api-keys", folder / "keys", "--precision", "fp32") as found:
        found.http.headers["authorization"] = f"Bearer {key}"
        yield found


@pytest.fixture(scope="session")
def server(runs, data, tmp_path_factory):
    """Two models behind a key: `sure` reads columns, has mistakes to show and always wants a person; `plain` reads the
    text alone."""
    from bertforge.inference.evaluate import evaluate_run

    folder, key = tmp_path_factory.mktemp("served"), "not-a-secret-0123456789"
    sure = shutil.copytree(runs["columns"], folder / "sure")
    never = {"thresholds": {"open": 1.1, "closed": 1.1}, "prior": None}
    reseal(sure, temperature=0.15, decision=never)  # at this temperature words count: the model has seen few
    evaluate_run(sure, data, "train").write_mistakes(sure / "report-train.html")
    (folder / "keys.txt").write_text(f"page {key}\n")
    options = ("--fronts", 1, "--precision", "fp32", "--api-keys", folder / "keys.txt")
    with service(folder / "log", sure, f"plain={runs['full']}", *options) as found:
        found.http.headers["Authorization"] = f"Bearer {key}"
        found.key = key
        yield found

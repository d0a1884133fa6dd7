"""The services that several files of tests ask."""

import pytest

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

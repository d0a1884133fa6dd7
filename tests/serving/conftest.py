"""A service that runs while the tests of a file ask it."""

import json
import re
import shutil
import subprocess
import sys
import urllib.request

import pytest

KEY = "not-a-secret-0123456789"


class Server:
    """One that is started, and how to ask it."""

    key = KEY

    def __init__(self, url):
        self.url = url

    def post(self, path, **body):
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as response:
            return json.load(response)


@pytest.fixture(scope="session")
def server(runs, data, tmp_path_factory):
    from bertforge.inference.evaluate import evaluate_run
    from tests.runs import reseal

    folder = tmp_path_factory.mktemp("served")
    sure = shutil.copytree(runs["columns"], folder / "sure")
    reseal(sure, temperature=0.15)  # so that words count: the model has seen few
    evaluate_run(sure, data, "train").write_mistakes(sure / "report-train.html")
    (folder / "keys.txt").write_text(f"page {KEY}\n")
    models = [sure, f"plain={runs['full']}"]
    options = ["--port", 0, "--precision", "fp32", "--api-keys", folder / "keys.txt"]
    command = [sys.executable, "-m", "bertforge", "serve", *models, *options]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=log, text=True)
    said = process.stdout.readline()
    found = re.search(r"http://[\d.:]+", said)
    assert found, said + (folder / "log").read_text()
    yield Server(found[0])
    process.terminate()
    process.communicate()

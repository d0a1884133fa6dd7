"""Nothing calls home, and no command leaves a file outside the folders it was given: told by the kernel (`watch`).

The rule: no look-up and no connection, to this machine neither; and of what was made or opened for writing, nothing is
left outside the folder that the commands work in. Three things do not count:

- PyTorch's folder for compiled kernels, which PyTorch makes in the temporary folder and keeps; TORCHINDUCTOR_CACHE_DIR
  moves it. SECURITY.md says so.
- The clock of libuuid, a file of the system's, which onnx asks for a unique name.
- A socket that is made and connected to nothing, and so sends nothing: urllib3 makes one to see whether there is IPv6.

Python's byte code, which its first import writes beside a source, is off.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from bertforge import quiet
from tests.autofit.tables import mails
from tests.watch import Seen, watch

ROOT = Path(__file__).parent.parent
TRAIN = "--model base --variant lora-r8 --set epochs=1 max_length=48 tokens_per_step=1024 precision=fp32 lora.r=2"
# Every command but `demo`, which is `sample-data` and `fit`.
COMMANDS = f"""
doctor --json machine.json
sample-data questions.csv --rows 160 --seed 1
prepare questions.csv --out data --model base --folds 2
train --data data --out run {TRAIN}
cross-validate --data data --out folds {TRAIN}
evaluate run --data data --json metrics.json
threshold run --data data --precision 0.1 --prior closed=0.4 --json threshold.json
predict run questions.csv --out predictions.csv
merge run --out model
quantize model --data data --out quantized --calibration max --preset ffn
compile model --data data --target onnxruntime --precision int8 --out onnxruntime
compile model --data data --target openvino --precision fp32 --out openvino
predict openvino questions.csv --out predictions.parquet
predict onnxruntime questions.csv --out rechecked.csv --recheck openvino
serve openvino --port 0
export-triton onnxruntime --out repository
benchmark model --data data --targets openvino-fp32 --rows 32 --repeats 1 --out benchmark
fit mails.csv --label-column folder --minutes 1 --out fitted --model base
check fitted
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Holds `named`, which the commands work in, and `home` and `temporary`, which are to stay empty.

    Its own name is short, for `serve` makes a socket in `temporary`.
    """
    with TemporaryDirectory() as made:
        for name in ("named", "home", "temporary"):
            Path(made, name).mkdir()
        yield Path(made)


def run(folder: Path, program: str, *arguments: object, **environment: str) -> Seen:
    """A program, as on a machine that has never seen these libraries, and not in a CI job, where some send nothing."""
    plain = {
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "temporary"),
        "PATH": os.defpath,
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return watch([sys.executable, "-c", program, *arguments], plain | environment, folder / "named")


def left_outside(seen: Seen, folder: Path) -> list[str]:
    paths = seen.left_outside(folder / "named")
    return [path for path in paths if "/torchinductor_" not in path and not path.startswith("/var/lib/libuuid/")]


def test_no_command_calls_anybody_or_leaves_a_file_outside_the_named_folder(folder, base):
    shutil.copytree(base, folder / "named" / "base")
    mails(120)[["message", "folder"]].to_csv(folder / "named" / "mails.csv", index=False)
    program = """
import json, os, signal, sys
from bertforge.autofit import fit, search
from bertforge.benchmark import roofline
from bertforge.cli.main import main
from bertforge.engines import measure
from bertforge.engines.fastest import Candidate
from bertforge.terminal import Terminal
roofline._SECONDS = measure.PAUSE_S = 0
search.candidates = lambda columns: [search.Candidate(True, 0.2, False)]  # one of each is enough
fit.candidates = lambda *arguments: [Candidate("onnxruntime", "fp32")]
shown = Terminal.print
def end_when_ready(self, *said, **options):
    shown(self, *said, **options)
    if str(*said[:1]).startswith("curl "):  # the last line of `serve` when it answers
        os.kill(os.getpid(), signal.SIGTERM)
Terminal.print = end_when_ready
for command in json.loads(sys.argv[1]):
    sys.argv = ["bertforge", *command.split()]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, command
"""
    seen = run(folder, program, json.dumps(COMMANDS.strip().splitlines()))
    assert seen.code == 0, seen.said
    assert seen.calls == []
    assert left_outside(seen, folder) == []
    assert {folder / "named" / name for name in ("predictions.csv", "fitted/report.html")} <= set(
        (folder / "named").rglob("*")
    )


def test_a_process_that_does_is_seen(folder):
    """The test above can fail: a look-up and a file elsewhere, made in C and by a child process."""
    program = """
import os, socket
if os.fork() == 0:
    open(os.path.expanduser("~/.elsewhere"), "w").close()
    open("here", "w").close()
    os._exit(0)
os.wait()
try:
    socket.getaddrinfo("bertforge.invalid", 443)
except socket.gaierror:
    pass
datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
try:
    datagram.sendto(b"", ("127.0.0.1", 9))
finally:
    print("sent")
"""
    seen = run(folder, program)
    assert seen.said == "sent\n"
    looked_up, sent = seen.calls[0], seen.calls[-1]
    assert looked_up.startswith("connect "), "to a name server"
    assert sent == "sendto 127.0.0.1:9"
    assert left_outside(seen, folder) == [str(folder / "home" / ".elsewhere")]


HUB = """
from bertforge.errors import ArtifactError
from bertforge.models import resolve
try:
    resolve("nobody/has-this-model")
except ArtifactError as error:
    print(error)
"""
NO_HUB = "http://127.0.0.1:9"  # refuses at once


def test_only_a_hub_id_goes_online(folder):
    seen = run(folder, HUB, HF_ENDPOINT=NO_HUB)
    assert set(seen.calls) == {"connect 127.0.0.1:9"}
    assert "could not be downloaded (the Hugging Face Hub cannot be reached)" in seen.said


def test_hf_hub_offline_is_honoured(folder):
    seen = run(folder, HUB, HF_ENDPOINT=NO_HUB, HF_HUB_OFFLINE="1")
    assert seen.calls == []
    assert "could not be downloaded (HF_HUB_OFFLINE forbids it)" in seen.said


def test_what_the_user_has_set_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))
    for switch_off in quiet.LIBRARIES.values():
        with switch_off():
            assert os.environ["MPLCONFIGDIR"] == str(tmp_path)
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
    assert quiet.telemetry().startswith("ONNX Runtime calls home, for ORT_DISABLE_TELEMETRY=0 asks for it; `unset")


def test_openvinos_sender_can_be_imported_again_afterwards(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino_telemetry", sys)
    with quiet.LIBRARIES["openvino"](), pytest.raises(ImportError):
        import openvino_telemetry  # noqa: F401
    assert sys.modules["openvino_telemetry"] is sys


def test_a_library_that_is_not_installed_is_an_import_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError):
        quiet.load("onnxruntime")

"""A model repository for NVIDIA's Triton server: its configurations, its Python models, and the chain as a whole."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import openvino
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from bertforge.engines.base import TritonBackend
from bertforge.errors import ArtifactError, UsageError
from bertforge.evaluation.decisions import Policy
from bertforge.inference.predictor import Predictor
from bertforge.jobs.compile import compile_model
from bertforge.jobs.triton_repository import _Repository, export_triton
from bertforge.manifest import check_folder, read_manifest
from bertforge.triton_server.columns import TableReader
from bertforge.triton_server.decision import decide
from bertforge.triton_server.text import TextReader, cells_of
from tests.jobs.triton import needs_triton, run_engines_in_python, serving
from tests.runs import made_up, reseal, run_command

DOCUMENT = Path(__file__).parents[2] / "docs" / "deploy.md"
TYPES = {"TYPE_INT64": "int64", "TYPE_FP32": "float32"}
TEXTS = [
    "How do I sort a list?",
    "x",
    "naïve café 東京 \U0001f600",
    "a" * 5000,
    "why " * 400,
    "  [SEP] [MASK] \n",
    "\x00",
]


@pytest.fixture(scope="module")
def engines(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An engine of each backend; that of OpenVINO reads columns, and its thresholds are for other shares of labels."""
    folder = tmp_path_factory.mktemp("engines")
    compile_model(runs["full"], "onnxruntime", "fp32", None, folder / "text")
    compile_model(runs["columns"], "openvino", "fp32", None, folder / "columns")
    reseal(folder / "columns", decision=Policy(("open", "closed"), (0.5, 0.5), (0.8, 0.2)).to_dict())
    # Whose float32 Triton would not keep; bfloat16 rounds otherwise on each CPU, and takes longer to prove.
    shutil.copytree(folder / "columns", folder / "openvino")
    reseal(folder / "openvino", precision="bf16")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def repositories(
    engines: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, said: list[str]
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("repositories")
    for name in ("text", "openvino"):
        export_triton(engines[name], folder / name, name, said.append)
    return {path.name: path for path in folder.iterdir()}


def configs(repository):
    """Every configuration, read by Triton's published schema, by the last part of its model's name."""
    found = {}
    for path in repository.glob("*/config.pbtxt"):
        config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        assert config.name == path.parent.name, "as Triton demands"
        assert (path.parent / "1").is_dir()
        found[config.name.rpartition("_")[2]] = config
    return found


def declared(tensors):
    return {value.name: (model_config_pb2.DataType.Name(value.data_type), list(value.dims)) for value in tensors}


@pytest.mark.parametrize("name", ["text", "openvino"])
def test_the_ensemble_hands_each_model_what_another_made(repositories, name):
    made = configs(repositories[name])
    ensemble = made[name]
    known = {value: declared(ensemble.input)[value] for value in declared(ensemble.input)}
    for step in ensemble.ensemble_scheduling.step:
        model = made[step.model_name.rpartition("_")[2]]
        axis = [-1] if model.max_batch_size else []  # which Triton adds

        def whole(tensors, axis=axis):
            return {key: (dtype, axis + dims) for key, (dtype, dims) in declared(tensors).items()}

        assert {key: known[value] for key, value in step.input_map.items()} == whole(model.input)
        outputs = whole(model.output)
        assert step.output_map.keys() == outputs.keys()
        known |= {value: outputs[key] for key, value in step.output_map.items()}
    assert {key: known[key] for key in declared(ensemble.output)} == declared(ensemble.output)


def test_the_engine_is_the_proved_file_and_is_declared_as_it_is(repositories, engines):
    engine = repositories["text"] / "text_engine" / "1" / "model.onnx"
    assert engine.read_bytes() == (engines["text"] / "model.onnx").read_bytes()
    config = configs(repositories["text"])["engine"]
    assert (config.backend, config.max_batch_size, config.HasField("dynamic_batching")) == ("onnxruntime", 64, True)
    for told, real in (
        (config.input, onnxruntime.InferenceSession(engine).get_inputs()),
        (config.output, onnxruntime.InferenceSession(engine).get_outputs()),
    ):
        axes = {value.name: [axis if isinstance(axis, int) else -1 for axis in value.shape[1:]] for value in real}
        types = {
            value.name: {"tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32"}[value.type] for value in real
        }
        assert declared(told) == {name: (types[name], axes[name]) for name in axes}


def test_openvinos_engine_gets_no_batches_of_tritons(repositories, engines):
    place = repositories["openvino"] / "openvino_engine" / "1"
    for file in ("model.xml", "model.bin"):
        assert (place / file).read_bytes() == (engines["openvino"] / file).read_bytes()
    config = configs(repositories["openvino"])["engine"]
    assert (config.backend, config.max_batch_size, config.HasField("dynamic_batching")) == ("openvino", 0, False)
    assert config.parameters["NUM_STREAMS"].string_value == str(config.instance_group[0].count)
    real = {
        value.get_any_name(): [axis.get_length() if axis.is_static else -1 for axis in value.get_partial_shape()]
        for value in openvino.Core().read_model(place / "model.xml").inputs
    }
    assert {name: dims for name, (_, dims) in declared(config.input).items()} == real


def answered(repository, read, cells, infer):
    """The chain of an ensemble without the server; every tensor is as the configuration of the engine says."""
    tensors = read(cells)
    made = configs(repository)["engine"]
    axis = [-1] if made.max_batch_size else []
    for name, (dtype, dims) in declared(made.input).items():
        assert str(tensors[name].dtype) == TYPES[dtype]
        assert all(wanted in (-1, size) for wanted, size in zip(axis + dims, tensors[name].shape, strict=True))
    (place,) = repository.glob("*_decision/1")
    return decide(infer(tensors), **json.loads((place / "settings.json").read_text()))


def test_texts_are_answered_as_predictor_answers_them(repositories, engines):
    place = repositories["text"]
    read = TextReader(place / "text_reader" / "1")
    session = onnxruntime.InferenceSession(place / "text_engine" / "1" / "model.onnx")
    found, chances = answered(place, read, {"text": TEXTS}, lambda tensors: session.run(["logits"], tensors)[0])
    predictor = Predictor.load(engines["text"])
    expected = predictor.predict_proba(TEXTS).to_numpy()
    np.testing.assert_allclose(chances, expected, atol=1e-5)  # padded to other lengths
    assert [label.decode() for label in found] == predictor.predict(TEXTS)["label"].tolist()
    assert predictor.codec.temperature != 1, "or this would not show that it is used"


def test_rows_of_a_table_are_answered_as_predictor_answers_them(repositories, engines):
    place = repositories["openvino"]
    read = TableReader(place / "openvino_reader" / "1", declared(configs(place)["reader"].output))
    model = openvino.Core().compile_model(
        place / "openvino_engine" / "1" / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    frame = made_up(8, seed=3)[[value.name for value in configs(place)["openvino"].input]]
    frame.loc[3, "ReputationAtPostCreation"] = ""  # missing
    _, chances = answered(place, read, frame.to_dict("list"), lambda tensors: model(tensors)["logits"])
    expected = Predictor.load(engines["columns"]).predict_proba(frame).to_numpy()
    np.testing.assert_allclose(chances, expected, atol=1e-5)
    assert "OpenStatus" not in frame, "the label is not asked for"
    other = Predictor.load(engines["columns"]).predict_proba(frame.assign(Tag1="php", ReputationAtPostCreation="9"))
    assert np.abs(other.to_numpy() - expected).max() > 2e-4, "the columns count"


def test_rows_are_padded_to_few_lengths_where_requests_become_batches(repositories):
    read = TextReader(repositories["text"] / "text_reader" / "1")
    lengths = {read({"text": ["why " * words]})["input_ids"].shape[1] for words in range(1, 60)}
    assert lengths == {16, 32, 48}, "48 tokens is the most that this model reads"


@pytest.mark.parametrize(
    ("longest", "batches", "lengths"),
    [
        (128, True, [16, 32, 64, 128]),
        (130, True, [16, 32, 64, 128, 130]),
        (40, False, [16, 32, 40]),
        (64, False, [16, 32, 48, 64]),
        (9, True, [9]),
    ],
)
def test_the_last_length_is_the_largest(longest, batches, lengths):
    backend = TritonBackend("any", (), (), batches)
    assert _Repository("any", SimpleNamespace(max_length=longest), Path(), backend).lengths == lengths


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"text": ["fine", " \n"]}, "row 1 has no text, and so no label; leave it out"),
        ({"text": []}, "the request holds 0 rows; send 1 to 64"),
        ({"text": ["x"] * 65}, "the request holds 65 rows; send 1 to 64"),
    ],
)
def test_a_bad_row_of_text_is_told(repositories, cells, reason):
    with pytest.raises(ValueError, match=reason):
        TextReader(repositories["text"] / "text_reader" / "1")(cells)


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("ReputationAtPostCreation", "many", "row 1: unparsable number in ReputationAtPostCreation; mend it, or send"),
        ("PostCreationDate", "yesterday", "row 1: unparsable date in PostCreationDate; mend it, or send"),
    ],
)
def test_a_bad_cell_of_a_column_is_told(repositories, column, value, reason):
    frame = made_up(2)
    frame.loc[1, column] = value
    with pytest.raises(ValueError, match=reason):
        TableReader(repositories["openvino"] / "openvino_reader" / "1", ())(frame.to_dict("list"))


def test_bytes_that_are_no_text_are_told():
    with pytest.raises(ValueError, match="row 1 of input Title is not UTF-8"):
        cells_of({"Title": np.array([b"fine", b"\xff"], object)})
    with pytest.raises(ValueError, match="input Title holds 2 rows, but Tag1 holds 1"):
        cells_of({"Title": np.array([b"a", b"b"], object), "Tag1": np.array([b"c"], object)})


def test_the_folder_is_checked_like_any_other(repositories, tmp_path):
    shutil.copytree(repositories["text"], tmp_path / "repository")
    assert check_folder(tmp_path / "repository") == ("triton", [])
    (tmp_path / "repository" / "text_reader" / "1" / "settings.json").write_text("{}")
    (damage,) = check_folder(tmp_path / "repository")[1]
    assert f"then `bertforge export-triton ARTIFACT --out {tmp_path / 'repository'}`" in damage


def test_what_triton_would_run_otherwise_is_refused(engines, runs, tmp_path):
    with pytest.raises(
        ArtifactError, match="is of openvino in fp32, which Triton does not run as it was proved; export"
    ):
        export_triton(engines["columns"], tmp_path / "out")
    shutil.copytree(engines["text"], tmp_path / "native")
    reseal(tmp_path / "native", target="native", precision="fp8")
    with pytest.raises(ArtifactError, match="is of native in fp8, which Triton does not run"):
        export_triton(tmp_path / "native", tmp_path / "out")
    with pytest.raises(ArtifactError, match="merge first: bertforge merge"):
        export_triton(runs["lora"], tmp_path / "out")
    with pytest.raises(UsageError, match="--name 'a/b' cannot name a model"):
        export_triton(engines["text"], tmp_path / "out", "a/b")
    assert not (tmp_path / "out").exists()


def test_a_column_named_as_an_output_is_refused(engines, tmp_path):
    shutil.copytree(engines["openvino"], tmp_path / "engine")
    inputs = read_manifest(tmp_path / "engine", "engine")["inputs"]
    reseal(tmp_path / "engine", inputs=inputs | {"label": inputs["Title"]})
    with pytest.raises(ArtifactError, match="reads a column named label, as an output of the ensemble is named"):
        export_triton(tmp_path / "engine", tmp_path / "out")


def ask(server, *texts):
    return post(
        server, json.dumps({"inputs": [{"name": "text", "shape": [len(texts)], "datatype": "BYTES", "data": texts}]})
    )


def post(server, body):
    """The outputs of the ensemble by their names."""
    request = urllib.request.Request(f"{server}/v2/models/classifier/infer", body.encode())
    with urllib.request.urlopen(request, timeout=60) as response:
        return {output["name"]: output["data"] for output in json.load(response)["outputs"]}


def test_thresholds_stay_behind_and_that_is_told(repositories, engines, said):
    assert [line for line in said if "thresholds" in line] == [
        f"the thresholds of {engines['openvino']} stay behind: Triton answers with label and probabilities, and sends "
        "no row to a person"
    ]


@pytest.mark.parametrize("address", ["localhost:1", "http://127.0.0.1:1", "http://127.0.0.1:x", "ftp://127.0.0.1:1"])
def test_a_server_that_does_not_answer_is_one_clear_line(repositories, address):
    program = [sys.executable, repositories["text"] / "check.py"]
    found = subprocess.run([*program, address], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    (line,) = found.stderr.splitlines()
    assert f"{address} does not answer the golden rows: " in line
    if address.endswith(".1:1") and address.startswith("http"):
        assert "Connection refused; start the server, or name its address" in line
    assert "usage: check.py" in subprocess.run([*program, "--help"], capture_output=True, text=True, check=True).stdout


@needs_triton
def test_a_triton_server_answers_as_predictor_does(runs, tmp_path, capsys):
    repository = tmp_path / "repository"
    assert run_command("export-triton", runs["full"], "--out", repository) == 0
    assert f"next, once it runs: python {repository / 'check.py'} http://127.0.0.1:8000" in capsys.readouterr().out
    run_engines_in_python(repository)
    program = [sys.executable, repository / "check.py"]
    with serving(repository, tmp_path) as server:
        checked = subprocess.run([*program, server], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr
        assert checked.stdout.startswith("16 golden rows: probabilities differ by ")

        texts = [text for text in TEXTS if text != "\x00"]
        found, expected = ask(server, *texts), Predictor.load(runs["full"], "fp32").predict(texts)
        np.testing.assert_allclose(
            np.reshape(found["probabilities"], (len(texts), -1)), expected.iloc[:, 2:], atol=1e-4
        )
        assert found["label"] == expected["label"].tolist()

        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(server, "fine", " ")
        assert (refused.value.code, "row 1 has no text" in refused.value.read().decode()) == (400, True)

        (body,) = re.findall(r"^curl .*/classifier/infer -d '(.*?)'$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
        assert len(post(server, body)["label"]) == 2

        golden = json.loads((repository / "golden.json").read_text())
        golden["rows"][7]["probabilities"].reverse()
        (repository / "golden.json").write_text(json.dumps(golden))
        assert subprocess.run([*program, server], capture_output=True, check=False).returncode == 1
    gone = subprocess.run([*program, server], capture_output=True, text=True, check=False)
    assert (gone.returncode, f"{server} does not answer the golden rows" in gone.stderr) == (1, True)

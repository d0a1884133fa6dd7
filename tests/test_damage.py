"""Damage to any file of any folder is seen by whoever opens the folder, and by `bertforge check`."""

import shutil

import numpy as np
import pytest

from bertforge.cli.check import examine
from bertforge.data.prepared import PreparedData
from bertforge.data.tokens import Tokenizer
from bertforge.errors import ArtifactError
from bertforge.inference.predictor import Predictor
from bertforge.jobs.compile import compile_model
from bertforge.jobs.merge import merge_run
from tests.runs import run_command


@pytest.fixture(scope="module")
def folders(runs, data, tmp_path_factory):
    """One of each kind."""
    root = tmp_path_factory.mktemp("folders")
    shutil.copytree(data, root / "data")
    shutil.copytree(runs["columns"], root / "run")
    shutil.copytree(runs["lora"], root / "adapter")
    merge_run(runs["lora"], root / "model")
    compile_model(root / "model", "openvino", "fp32", None, root / "model" / "engines" / "openvino-fp32")
    return root


def open_data(folder, base):
    prepared = PreparedData.open(folder)
    prepared.tokens(Tokenizer.load(base))


def load(folder, base):
    Predictor.load(folder)


OPENED = {
    "data": ("data", open_data),
    "run": ("run", load),
    "adapter": ("adapter", load),
    "model": ("model", load),
    "engine": ("model/engines/openvino-fp32", load),
}


@pytest.mark.parametrize("kind", OPENED)
def test_a_flipped_bit_in_any_file_is_refused_by_name(folders, base, tmp_path, kind):
    place, open_folder = OPENED[kind]
    folder = tmp_path / "copy"
    shutil.copytree(folders / place, folder, ignore=shutil.ignore_patterns("engines", "baselines", ".*"))
    open_folder(folder, base)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    files = [path for path in files if "tensorboard" not in path.parts]  # curves for people
    assert len(files) > 4
    for path in files:
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :] if whole else b"1")
        with pytest.raises(ArtifactError, match=r"`bertforge \w+|rm -r ") as error:
            open_folder(folder, base)
        assert str(path) in str(error.value)
        assert [damage for _, _, damages in examine(folder) for damage in damages if str(path) in damage]
        path.write_bytes(whole)
    open_folder(folder, base)


def test_another_seeds_split_and_other_labels_of_the_same_size_are_refused(folders, base, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(folders / "data", folder)
    for name in ("splits/random.npy", "labels.npy"):
        kept = np.load(folder / name)
        np.save(folder / name, kept[::-1].copy())
        with pytest.raises(ArtifactError, match=rf"{name} is damaged"):
            PreparedData.open(folder)
        np.save(folder / name, kept)
    PreparedData.open(folder)


def test_a_cased_tokenizer_of_the_same_vocabulary_is_refused(folders, tmp_path):
    """By the digest; and where that was made to fit, by the golden rows' texts."""
    from bertforge.manifest import MANIFEST, read_manifest, write_manifest

    folder = tmp_path / "copy"
    shutil.copytree(folders / "run", folder)
    manifest = read_manifest(folder, "run")
    text = (folder / "tokenizer.json").read_text()
    cased = text.replace('"lowercase":true', '"lowercase":false').replace('"lowercase": true', '"lowercase": false')
    assert cased != text
    (folder / "tokenizer.json").write_text(cased)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is damaged"):
        Predictor.load(folder)
    again = {name: value for name, value in manifest.items() if name not in ("kind", "versions", "files")}
    (folder / MANIFEST).unlink()
    write_manifest(folder, "run", **again)
    with pytest.raises(ArtifactError, match="does not read its golden rows as it did"):
        Predictor.load(folder)


@pytest.mark.parametrize("change", ["schema", "tabular"])
def test_columns_that_come_to_mean_something_else_are_refused(folders, tmp_path, change):
    from bertforge.manifest import amend_manifest, read_manifest

    folder = tmp_path / "copy"
    shutil.copytree(folders / "run", folder)
    manifest = read_manifest(folder, "run")
    if change == "tabular":
        names = next(value for value in manifest["tabular"].values() if isinstance(value, dict) and value)
        words = next(words for words in names.values() if isinstance(words, list) and len(words) > 1)
        words.reverse()
    else:
        manifest["schema"]["text_columns"] = manifest["schema"]["text_columns"][::-1]
    amend_manifest(folder, manifest)
    with pytest.raises(ArtifactError, match="does not read its golden rows as it did"):
        Predictor.load(folder)


def test_check_says_what_is_whole_what_is_not_and_what_to_type(folders, tmp_path, capsys):
    root = tmp_path / "root"
    shutil.copytree(folders, root)
    assert run_command("check", root) == 0
    said = capsys.readouterr().out
    assert " folders checked: every file is as it was written" in said
    for kind in ("data", "tokens", "run", "model", "engine"):
        assert f"({kind})" in said
    graph = root / "model" / "engines" / "openvino-fp32" / "model.bin"
    graph.write_bytes(graph.read_bytes()[:-1])
    (root / "data" / "labels.npy").unlink()
    assert run_command("check", root) == 4
    said = capsys.readouterr()
    assert f"{graph} is damaged: it is not what was written" in said.out
    assert f"bertforge compile {root / 'model'} --target openvino --precision fp32" in said.out
    assert f"{root / 'data' / 'labels.npy'} is missing" in said.out
    assert "2 of " in said.err
    for manifest in ("data", next((root / "data" / "tokens").iterdir()), "run"):
        (root / manifest / "bertforge.json").unlink()
    assert run_command("check", root) == 4
    said = capsys.readouterr()
    assert said.out.count("bertforge.json is missing; make the folder again, after: rm -r ") == 3
    assert run_command("check", tmp_path / "nowhere") == 4
    assert "holds nothing that bertforge wrote" in capsys.readouterr().err

"""Manifests: what a folder is, and that every file in it is as it was written."""

import json
import os
import shutil
from pathlib import Path

import pytest

from bertforge import manifest as module
from bertforge.artifact import versions
from bertforge.digests import digest_file
from bertforge.errors import ArtifactError
from bertforge.manifest import (
    MANIFEST,
    amend_manifest,
    check_folder,
    compile_command,
    read_manifest,
    write_manifest,
)

FIELDS = dict.fromkeys(("recipe", "labels", "schema", "tabular", "data", "base", "golden", "inputs"), 3)
DATA = dict.fromkeys(("fingerprint", "source", "schema", "rows", "label_counts", "columns", "splits", "made_up"), 3)


@pytest.fixture
def folder(tmp_path):
    """A merged model's folder with a file, one below it, a hidden one, one that changes, and an engine within."""
    model = tmp_path / "model"
    (model / "below").mkdir(parents=True)
    for name, content in {"weights": b"w" * 100_000, "below/table": b"t" * 999, ".hidden": b"h", "log": b"l"}.items():
        (model / name).write_bytes(content)
    engine = model / "engines" / "openvino-bf16"
    engine.mkdir(parents=True)
    (engine / "graph").write_bytes(b"g" * 50)
    write_manifest(engine, "engine", **FIELDS, target="openvino", precision="bf16", spared=[])
    write_manifest(model, "model", leave_out=("log",), **FIELDS)
    return model


def flip(path, place=0):
    """One bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def test_a_manifest_comes_back_with_its_kind_versions_and_digests(folder):
    files = {name: digest_file(folder / name) for name in ("below/table", "weights")}
    assert read_manifest(folder, "model") == {"kind": "model", "versions": versions(), **FIELDS, "files": files}
    assert read_manifest(folder, "data", "model")["labels"] == 3


def test_a_folder_that_is_none_is_refused_with_those_that_may_be_meant(folder):
    place = folder.parent
    (place / "data").mkdir()
    write_manifest(place / "data", "data", **DATA)
    with pytest.raises(ArtifactError, match=rf"mdoel does not exist \(beside it: {folder}\); it should be"):
        read_manifest(place / "mdoel", "model", "engine")
    for number in range(5):
        shutil.copytree(folder, place / f"model{number}")
    with pytest.raises(ArtifactError, match=rf"holds no bertforge.json \(in it: {folder}, .*/model2 and others\); it"):
        read_manifest(place, "model")
    with pytest.raises(ArtifactError, match=r"nothing does not exist; it should be"):
        read_manifest(place / "far" / "nothing", "model")


def swap(path, other):
    """The contents of two files."""
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


DAMAGES = {
    "a bit flipped": lambda path: flip(path, 77),
    "a page zeroed": lambda path: path.write_bytes(bytes(512) + path.read_bytes()[512:]),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "swapped": lambda path: swap(path, path.parent / ("below/table" if path.name == "weights" else "../weights")),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["weights", "below/table"])
def test_damage_to_any_file_is_refused_with_its_name_and_the_command(folder, name, damage):
    read_manifest(folder, "model")
    DAMAGES[damage](folder / name)
    with pytest.raises(
        ArtifactError, match=r" (is|cannot be) .*; make it again: rm -r .*, then `bertforge merge"
    ) as error:
        read_manifest(folder, "model")
    assert "\n" not in str(error.value)
    kind, damages = check_folder(folder)
    assert kind == "model"
    assert any(name in line and "bertforge merge RUN --out" in line for line in damages)


def test_what_is_not_of_the_folder_may_change(folder):
    for name in (".hidden", "log", "engines/openvino-bf16/graph"):
        flip(folder / name)
    (folder / "report.html").write_text("new")
    read_manifest(folder, "model")
    assert check_folder(folder) == ("model", [])
    engine = folder / "engines" / "openvino-bf16"
    with pytest.raises(ArtifactError, match=r"graph is damaged.*bertforge compile .*model --target openvino"):
        read_manifest(engine, "engine")


@pytest.mark.parametrize("place", range(0, 1000, 50))
def test_a_flipped_bit_in_the_manifest_itself_is_refused(folder, place):
    path = folder / MANIFEST
    before = json.loads(path.read_bytes())
    flip(path, place % path.stat().st_size)
    try:
        changed = json.loads(path.read_bytes()) != before
    except ValueError:
        changed = True
    if changed:
        with pytest.raises(ArtifactError, match=r"bertforge merge RUN --out"):
            read_manifest(folder, "model")
    else:  # white space
        read_manifest(folder, "model")


def test_an_amended_manifest_keeps_the_digests_of_the_files(folder):
    amend_manifest(folder, read_manifest(folder, "model") | {"labels": 4})
    assert read_manifest(folder, "model")["labels"] == 4
    flip(folder / "weights")
    with pytest.raises(ArtifactError, match="weights is damaged"):
        read_manifest(folder, "model")


def test_a_manifest_without_digests_is_of_an_earlier_version(folder):
    (folder / MANIFEST).write_text(json.dumps({"kind": "model", **FIELDS}))
    with pytest.raises(ArtifactError, match=r"no digest: an earlier version wrote it.*bertforge merge"):
        read_manifest(folder, "model")


@pytest.fixture
def data(tmp_path):
    """Prepared data whose file was written long ago."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "labels").write_bytes(b"l" * 1000)
    write_manifest(folder, "data", **DATA)
    os.utime(folder / "labels", (1e9, 1e9))
    return folder


@pytest.fixture
def reads(monkeypatch):
    """Names of the files that are read whole, as if each time by another process and long after they were written."""
    found = []
    monkeypatch.setattr(module, "_settled", lambda stamp: True)
    monkeypatch.setattr(module, "_whole", {})
    monkeypatch.setattr(module, "digest_file", lambda path: found.append(path.name) or digest_file(path))
    return found


def test_prepared_data_is_read_once_and_again_when_its_stamp_changes(data, reads, monkeypatch):
    def names():
        reads.clear()
        module._whole.clear()
        read_manifest(data, "data")
        return list(reads)

    assert names() == ["labels"]
    assert names() == []
    os.utime(data / "labels", (2e9, 2e9))
    assert names() == ["labels"]
    flip(data / "labels")
    os.utime(data / "labels", (2e9, 2e9))  # the time of change tells
    with pytest.raises(ArtifactError, match="labels is damaged"):
        names()
    flip(data / "labels")
    assert names() == ["labels"]
    monkeypatch.setattr(module.platform, "node", lambda: "another machine")
    assert names() == ["labels"]
    flip(data / ".checked.json")
    assert names() == ["labels"]


def test_a_copy_is_read_again(data, reads, tmp_path):
    read_manifest(data, "data")
    shutil.copytree(data, tmp_path / "copy")
    reads.clear()
    read_manifest(tmp_path / "copy", "data")
    assert reads == ["labels"]


def test_a_model_is_read_by_each_process(folder, reads):
    read_manifest(folder, "model")
    module._whole.clear()
    read_manifest(folder, "model")
    assert reads.count("weights") == 2
    read_manifest(folder, "model")
    assert reads.count("weights") == 2, "a process reads it once"


def test_what_was_just_written_is_not_trusted_by_its_stamp(data):
    """Two writes within a tick of the clock leave one stamp."""
    for _ in range(20):
        read_manifest(data, "data")
        flip(data / "labels")
        with pytest.raises(ArtifactError, match="labels is damaged"):
            read_manifest(data, "data")
        flip(data / "labels")


def test_checking_a_folder_reads_every_file_whatever_its_stamp(data, reads):
    read_manifest(data, "data")
    reads.clear()
    assert check_folder(data) == ("data", [])
    assert reads == ["labels"]
    (data / MANIFEST).write_text("{")
    kind, damages = check_folder(data)
    assert kind == "damaged"
    assert "bertforge.json is damaged" in damages[0]


def test_a_manifest_without_a_field_that_readers_need_is_damaged(tmp_path):
    write_manifest(tmp_path, "model", recipe={}, labels=[])
    with pytest.raises(ArtifactError, match=r"is damaged \(it lacks 'schema'\); .*`bertforge merge RUN"):
        read_manifest(tmp_path, "model")


def test_the_command_that_builds_an_engine_again_names_its_folder_where_it_must():
    kind, command = ("openvino", "int8"), "bertforge compile {} --target openvino --precision int8 --data DATA"
    assert compile_command(Path("m/engines/openvino-int8"), *kind) == command.format("m")
    assert compile_command(Path("m/engines/auto"), *kind) == command.format("m") + " --out m/engines/auto"
    assert compile_command(Path("e"), *kind) == command.format("MODEL") + " --out e"


def test_a_wrong_kind_names_the_command_that_makes_the_right_one(tmp_path):
    write_manifest(tmp_path, "data")
    with pytest.raises(ArtifactError, match=r"is of kind 'data', but run is needed: .*`bertforge train --data DATA"):
        read_manifest(tmp_path, "run")
    with pytest.raises(ArtifactError, match=r"run or model is needed: .* or `bertforge merge RUN"):
        read_manifest(tmp_path, "run", "model")


def test_a_folder_that_is_none_of_ours_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"nowhere does not exist; .*`bertforge prepare TABLE"):
        read_manifest(tmp_path / "nowhere", "data")
    with pytest.raises(ArtifactError, match=r"holds no bertforge\.json; .*`bertforge prepare TABLE"):
        read_manifest(tmp_path, "data")


@pytest.mark.parametrize("content", [b"", b'{"kind": "da', b"[1]", b"{}", b"\xff\xfe", b"null"], ids=repr)
def test_a_damaged_manifest_is_one_line(tmp_path, content):
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"bertforge\.json is damaged .*`bertforge prepare TABLE") as error:
        read_manifest(tmp_path, "data")
    assert "\n" not in str(error.value)

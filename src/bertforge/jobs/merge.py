"""A LoRA run -> a plain Hugging Face folder, with the difference the merge makes measured and gated.

The run's own logits prove nothing: an adapter that trains adds (alpha / r) B A to its weight as the merge does, so both
would make the same mistake. The gate therefore runs golden rows through B (A x) beside the base, and through the merged
weights, both in float64: what is left is the rounding of the merged weights to float32, which is what is told.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bertforge.artifact import fresh_directory
from bertforge.data.tokens import Tokenizer
from bertforge.errors import ArtifactError
from bertforge.hardware import detect
from bertforge.inference.predictor import load_model, verified_model
from bertforge.locks import locked
from bertforge.lora.adapter_io import ADAPTER_CONFIG
from bertforge.lora.inject import merge, unmerged
from bertforge.manifest import identity, read_manifest, write_manifest
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.proof.golden import GoldenRows
from bertforge.proof.tolerances import MERGED

# One golden row in four goes through the gate, short ones and long ones: a wrong weight shows in any of them, and 16
# rows of 128 tokens through BERT-base took one core 27 s in float64.
_STRIDE = 4


def merge_run(run: Path, out: Path) -> dict[str, Any]:
    """Merges in float32 and writes `out`; returns the manifest's `merge`.

    That is `max_logit_difference` and `changed_labels` on `rows` golden rows: of the merged weights against the
    adapters computed apart, both in float64. Raises ArtifactError for a folder without adapters, and when the merged
    model is not the same function.
    """
    with locked(out):
        return _merge(run, out)


def _merge(run: Path, out: Path) -> dict[str, Any]:
    manifest = read_manifest(run, "run", "model")
    if not (run / ADAPTER_CONFIG).is_file():
        what = "is a merged model" if manifest["kind"] == "model" else "was trained in full"
        raise ArtifactError(f"{run} {what} and so a plain Hugging Face folder already: there is nothing to merge")
    model = verified_model(run, manifest, detect())
    merged = merge(model)
    assert isinstance(merged, BertForSequenceClassification)
    merged.eval()
    golden = GoldenRows.from_dict(manifest["golden"])
    measured = _gate(run, model, merged, golden)
    after = golden.of(merged)
    kept = {name: value for name, value in manifest.items() if name not in ("kind", "versions", "history", "files")}
    with fresh_directory(out) as folder:
        merged.save_pretrained(folder)
        Tokenizer.load(run).save(folder, manifest["recipe"]["max_length"])
        write_manifest(
            folder,
            "model",
            **{**kept, "golden": after.to_dict(), "merge": measured},
            parent=identity(run),
        )
        reloaded = load_model(folder, manifest)  # what is on disk, not what is in memory
        if after.difference(reloaded.to(next(merged.parameters()).device)) != 0:
            raise ArtifactError(f"the weights written to {out} do not reload as they were; nothing was kept")
        Tokenizer.load(folder)
    return measured


def _gate(
    run: Path, model: BertForSequenceClassification, merged: BertForSequenceClassification, golden: GoldenRows
) -> dict[str, Any]:
    """The manifest's `merge`; raises ArtifactError when `merged` does not compute what `model`'s adapters do."""
    apart = _float64_logits(unmerged(model), golden)
    found = _float64_logits(copy.deepcopy(merged).double(), golden)
    difference = float(np.abs(found - apart).max())
    allowed = MERGED * max(1.0, float(np.abs(apart).max()))
    if not difference <= allowed:  # NaN is refused too
        raise ArtifactError(
            f"the merged model differs by {difference:.3g} in a logit from {run} with its adapter computed apart, more "
            f"than {allowed:.2g}; nothing was written"
        )
    return {
        "max_logit_difference": difference,
        "changed_labels": int((found.argmax(1) != apart.argmax(1)).sum()),
        "rows": len(found),
    }


@torch.no_grad()
def _float64_logits(model: nn.Module, golden: GoldenRows) -> np.ndarray:
    """`[rows, labels]` from a float64 model in evaluation mode, of each row that the gate reads."""
    batch, _ = golden.examples.pack(np.arange(len(golden.logits))[::_STRIDE])
    logits: Tensor = model(batch.to(next(model.parameters()).device))
    return logits.cpu().numpy()

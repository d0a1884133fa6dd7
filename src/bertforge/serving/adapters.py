"""Several LoRA runs on one base, each chosen by name: their weights are merged, and what is equal is held once.

An adapter is served as the model that `bertforge merge` would make of its run: base and update are added in float32,
once, at load. So its answers are the merged model's, and neither the engine nor the queue knows of low ranks. An engine
that can take models beside its own (`engines.base.Host`) shares the base's weights between them, and a batch holds rows
of one adapter.

Labels, columns and tokenizer are each adapter's own, as far as the engine takes them: recorded graphs have one number
of labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bertforge.engines.base import Host
from bertforge.engines.registry import TARGETS
from bertforge.errors import UsageError
from bertforge.hardware import detect
from bertforge.inference.codec import Codec
from bertforge.inference.predictor import Predictor, plain, verified_model
from bertforge.lora.adapter_io import ADAPTER_CONFIG
from bertforge.manifest import served


def carriers(models: Mapping[str, str], adapters: Mapping[str, str]) -> dict[str, str]:
    """The model beside which each adapter is computed: the first of its base whose engine can.

    Raises UsageError for an adapter that is none, or that nothing carries.
    """
    bases = {name: served(Path(path))[1] for name, path in models.items()}
    found = {}
    for name, path in adapters.items():
        folder, manifest = served(Path(path))
        if not (folder / ADAPTER_CONFIG).is_file():
            raise UsageError(f"--adapter {name}={path} is no LoRA run; serve it as a model: {name}={path}")
        fitting = [own for own, base in bases.items() if _carries(base, manifest)]
        if not fitting:
            raise UsageError(
                f"--adapter {name}={path} was trained on {manifest['base']['model']}, and of that base none is served "
                "that carries adapters: name a LoRA run, a merged model, or its native engine in bf16, beside it"
            )
        found[name] = fitting[0]
    return found


def load_beside(base: Predictor, name: str, folder: Path, prior: Mapping[str, float] | None = None) -> Predictor:
    """The adapter in `folder` on the engine of `base`, checked as `Predictor.load` does; raises BertforgeError."""
    _, manifest = served(folder)
    assert isinstance(base.engine, Host), "the target says so"
    model = plain(verified_model(folder, manifest, detect()))
    try:
        engine = base.engine.beside(model)
    except UsageError as error:
        raise UsageError(f"--adapter {name}={folder} cannot be served beside the model: {error}") from error
    loaded = Predictor(engine, Codec.load(folder, manifest, prior))
    loaded.check_inputs(folder)
    return loaded


def _carries(manifest: dict[str, Any], adapter: dict[str, Any]) -> bool:
    if manifest["base"]["weights"] != adapter["base"]["weights"]:
        return False
    if manifest["kind"] != "engine":
        return bool(manifest["kind"] != "quantized")
    return manifest["precision"] in TARGETS[manifest["target"]].hosts

"""PEFT's adapter files: `adapter_config.json` and `adapter_model.safetensors`, the head included.

PEFT prefixes every name with `base_model.model.`; a module in `modules_to_save` is stored under its own name. So
`PeftModel.from_pretrained(AutoModelForSequenceClassification..., directory)` loads what is written here, and what PEFT
wrote is read here.
"""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from bertforge.artifact import write_atomic, write_json
from bertforge.errors import ArtifactError
from bertforge.lora.config import LoraConfig
from bertforge.lora.inject import find_targets, inject_lora, named

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# PEFT options that change the result and are not built here; an adapter that uses one is refused.
_UNSUPPORTED = (
    *("use_dora", "use_rslora", "use_qalora", "use_bdlora", "rank_pattern", "alpha_pattern", "lora_bias"),
    *("fan_in_fan_out", "alora_invocation_tokens", "kasa_config", "monteclora_config", "arrow_config"),
)
# Ways to begin that leave the base model's weights alone; the others (pissa, olora, loftq, ...) change them.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


def save_adapter(model: nn.Module, config: LoraConfig, directory: str | Path, base_model: str) -> None:
    """Writes what `inject_lora` made trainable; `base_model` is the name or folder the adapter belongs to."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"{_PREFIX}{name}": tensor for name, tensor in _adapter_state(model, config).items()}
    write_atomic(directory / ADAPTER_WEIGHTS, to_bytes(tensors, metadata={"format": "pt"}))
    described: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        **{
            name: list(value) if isinstance(value := getattr(config, name), tuple) else value
            for name in (field.name for field in fields(config))
        },
    }
    write_json(directory / ADAPTER_CONFIG, described)


def load_adapter(model: nn.Module, directory: str | Path) -> LoraConfig:
    """Injects the adapter in `directory` into the plain `model`, loads its weights and returns its configuration.

    Raises ArtifactError when a tensor is missing (a head, say), left over or of another shape; `model` is then as it
    was.
    """
    directory = Path(directory)
    config = read_adapter_config(directory)
    # PEFT lists the head under every name it may have, `classifier` and `score`, whatever the model calls it.
    heads = tuple(
        head for head in config.modules_to_save if any(named(name, head) for name, _ in model.named_modules())
    )
    config = replace(config, modules_to_save=heads)
    try:
        stored = load_file(directory / ADAPTER_WEIGHTS)
    except (FileNotFoundError, SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ArtifactError(f"{directory / ADAPTER_WEIGHTS} is missing or damaged ({reason})") from error
    found = {name.removeprefix(_PREFIX): tensor for name, tensor in stored.items()}
    wanted, given = _adapter_shapes(model, config), {name: tensor.shape for name, tensor in found.items()}
    if wrong := [name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name)]:
        raise ArtifactError(
            f"the adapter in {directory} does not fit this model: {len(wrong)} tensors are missing, left over or of "
            f"another shape, such as {min(wrong)}; load it on the base model it was trained on"
        )
    inject_lora(model, config)
    model.load_state_dict(found, strict=False)
    return config


def read_adapter_config(directory: Path) -> LoraConfig:
    """Reads `adapter_config.json`; raises ArtifactError for another method or for an option that is not built here."""
    path = directory / ADAPTER_CONFIG
    try:
        return _config_from(json.loads(path.read_text()), path)
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise ArtifactError(
            f"{path} is missing or not JSON; an adapter folder holds it beside {ADAPTER_WEIGHTS}"
        ) from error
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ArtifactError(f"{path} is damaged ({error!r}); save the adapter again") from error


def _config_from(values: dict[str, Any], path: Path) -> LoraConfig:
    if values.get("peft_type") != "LORA":
        raise ArtifactError(f"{path}: peft_type {values.get('peft_type')!r} is not supported, only LORA is")
    if used := [name for name in _UNSUPPORTED if values.get(name)]:
        raise ArtifactError(f"{path} uses {', '.join(used)}, which bertforge does not build; retrain without")
    if (start := values.get("init_lora_weights", True)) not in _PLAIN_INITS:
        raise ArtifactError(
            f"{path}: init_lora_weights {start!r} changes the base model's weights, which bertforge does not build; "
            "convert the adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    if values.get("bias", "none") != "none":
        raise ArtifactError(f"{path}: bias {values['bias']!r} is not supported, only 'none' is")
    if missing := [name for name in ("r", "lora_alpha", "target_modules") if name not in values]:
        raise ArtifactError(f"{path} lacks {', '.join(missing)}; save the adapter again")
    if not isinstance(values["target_modules"], list):
        raise ArtifactError(
            f"{path}: target_modules must be a list of names, not the pattern {values['target_modules']!r}"
        )
    layers = values.get("layers_to_transform")
    return LoraConfig(
        r=values["r"],
        lora_alpha=values["lora_alpha"],
        lora_dropout=values.get("lora_dropout", 0.0),
        target_modules=tuple(sorted(values["target_modules"])),
        layers_to_transform=(layers,) if isinstance(layers, int) else None if layers is None else tuple(layers),
        modules_to_save=tuple(values.get("modules_to_save") or ()),
    )


def _adapter_state(model: nn.Module, config: LoraConfig) -> dict[str, Tensor]:
    """Adapter weights and the modules trained in full, buffers included, by their names in `model`."""
    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if ".lora_A." in name or ".lora_B." in name or _trained_in_full(name, config)
    }


def _adapter_shapes(model: nn.Module, config: LoraConfig) -> dict[str, torch.Size]:
    """Names and shapes of what `_adapter_state` would hold once the plain `model` is adapted."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if _trained_in_full(name, config)}
    for name, linear in find_targets(model, config)[0].items():
        shapes[f"{name}.lora_A.weight"] = torch.Size([config.r, linear.in_features])
        shapes[f"{name}.lora_B.weight"] = torch.Size([linear.out_features, config.r])
    return shapes


def _trained_in_full(name: str, config: LoraConfig) -> bool:
    return any(f".{module}." in f".{name}" for module in config.modules_to_save)

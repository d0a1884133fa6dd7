"""Putting adapters into a model, merging them out of it, and computing them as branches to check the merge."""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor, nn

from bertforge.errors import ArtifactError, UsageError
from bertforge.lora.config import LoraConfig
from bertforge.lora.layer import LoraLinear


def inject_lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Wraps the targets of `model` in place, freezes all the rest but `modules_to_save`, and returns the model.

    Raises UsageError when a target, a layer number or a module to save matches nothing; the message lists what could.
    """
    targets, saved = find_targets(model, config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in saved:
        model.get_submodule(name).requires_grad_(True)
    for name, linear in targets.items():
        _replace(model, name, LoraLinear(linear, config))
    return model


def find_targets(model: nn.Module, config: LoraConfig) -> tuple[dict[str, nn.Linear], list[str]]:
    """The layers `inject_lora` would wrap and the modules it would leave trainable, by name; changes nothing."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if _adapted(model):
        raise UsageError("the model holds adapters already; merge them before injecting new ones")
    saved = _saved_modules(model, config)
    candidates = {name: module for name, module in linears.items() if not _within(name, saved)}
    return {name: linears[name] for name in _matching(candidates, config)}, saved


def merge(model: nn.Module) -> nn.Module:
    """A plain float32 copy of `model` with every update added to its weight; `model` itself stays adapted.

    Raises ArtifactError when there is nothing to merge or a merged weight is not finite.
    """
    merged = copy.deepcopy(model).float()  # whole: a layer alone would not fit its neighbours' bfloat16
    adapted = _adapted(merged)
    if not adapted:
        raise ArtifactError("the model holds no adapters, so there is nothing to merge")
    for name, module in adapted:
        total = module.base_layer.weight.detach() + module.delta().detach()
        if not torch.isfinite(total).all():
            raise ArtifactError(f"merging {name} gives weights that are not finite; the adapter is damaged")
        module.base_layer.weight = nn.Parameter(total)
        _replace(merged, name, module.base_layer)
    return merged.requires_grad_(True)


class Unmerged(nn.Module):
    """W x + b, and (alpha / r) B (A x) beside it, summed only as activations: no weight is merged on the way."""

    def __init__(self, adapted: LoraLinear) -> None:
        super().__init__()
        self.adapted = adapted

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        output: Tensor = self.adapted.base_layer(x)
        return output + self.adapted.branch(x)


def unmerged(model: nn.Module) -> nn.Module:
    """A float64 copy of `model` that computes each adapter as a branch of its own: what `merge` is checked against.

    `LoraLinear` itself adds the update to its weight where it can, by the code that `merge` runs, so a mistake in that
    code would be in both. The copy shares none of it.
    """
    copied = copy.deepcopy(model).double()
    for name, module in _adapted(copied):
        _replace(copied, name, Unmerged(module))
    return copied


def named(name: str, ending: str) -> bool:
    """Whether the module `name` is meant by `ending`, its last dotted parts: PEFT's rule."""
    return f".{name}".endswith(f".{ending}")


def _adapted(model: nn.Module) -> list[tuple[str, LoraLinear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear)]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _matching(linears: dict[str, nn.Linear], config: LoraConfig) -> list[str]:
    chosen: set[str] = set()
    for target in config.target_modules:
        matches = [name for name in linears if named(name, target)]
        if not matches:
            endings = sorted({_ending(name) for name in linears})
            raise UsageError(f"target_modules: {target!r} matches no linear layer; it could be {', '.join(endings)}")
        chosen.update(matches)
    if config.layers_to_transform is not None:
        layers = {int(number) for name in linears if (number := _layer_number(name))}
        if unknown := set(config.layers_to_transform) - layers:
            raise UsageError(
                f"layers_to_transform: {sorted(unknown)} are not layers of this model, "
                f"which has 0 to {max(layers, default=0)}"
            )
        wanted = set(config.layers_to_transform)
        chosen = {name for name in chosen if (number := _layer_number(name)) and int(number) in wanted}
        if not chosen:
            raise UsageError(
                f"target_modules {', '.join(config.target_modules)} match no linear layer within layers_to_transform "
                f"{sorted(wanted)}; leave layers_to_transform out or name other targets"
            )
    return sorted(chosen)


def _saved_modules(model: nn.Module, config: LoraConfig) -> list[str]:
    names = [name for name, _ in model.named_modules() if name]
    for wanted in config.modules_to_save:
        if not any(named(name, wanted) for name in names):
            top = ", ".join(name for name, _ in model.named_children())
            raise UsageError(f"modules_to_save: {wanted!r} is not a module of this model; its parts are {top}")
    return [name for name in names if any(named(name, wanted) for wanted in config.modules_to_save)]


def _within(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _layer_number(name: str) -> str | None:
    """The first number between dots, as PEFT reads it: `bert.encoder.layer.3.output.dense` is in layer 3."""
    found = re.search(r"\.(\d+)\.", name)
    return found[1] if found else None


def _ending(name: str) -> str:
    """The part of a name after its layer number, which is what a target usually names."""
    return re.split(r"\.\d+\.", name)[-1]

"""The branch of the model that reads columns beside the text, and the same as nodes of a graph, all in float32.

Each kind makes a vector of its array, and two hidden layers mix them. With `hidden_size = 0` the scaled numbers
themselves join the text's vector: the study's model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from bertforge.columns.kind import Nodes
from bertforge.columns.parts import Part, as_array
from bertforge.columns.registry import KINDS, flat, records
from bertforge.errors import ArtifactError

_WIDEST = 1 << 16  # of a layer


@dataclass(frozen=True)
class TabularConfig:
    """Shape of the branch; it stands in `config.json`."""

    kinds: dict[str, Any]
    """The `Shape` of each kind, by its name."""
    embedding_size: int = 16
    """Width of an embedded column."""
    hidden_size: int = 0
    """Width of the branch's hidden layers; 0 joins the columns to the text's vector directly, as the study did."""
    dropout: float = 0.1

    def __post_init__(self) -> None:
        """Raises ArtifactError naming the field that is wrong, its value and what is allowed."""
        for name, least in (("embedding_size", 1), ("hidden_size", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= _WIDEST:
                raise ArtifactError(
                    f"{name} of the columns is {value!r:.60}; it must be a whole number from {least} to {_WIDEST:,}"
                )
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ArtifactError(f"dropout of the columns is {self.dropout!r:.60}; it must be from 0 to below 1")
        if self.hidden_size == 0 and not all(KINDS[name].is_plain(shape) for name, shape in self.kinds.items()):
            raise ArtifactError("columns joined directly (hidden_size = 0) can only be plain numbers; set hidden_size")

    @classmethod
    def of(cls, **values: Any) -> Self:
        """From the table in `config.json`, the shapes of all kinds side by side."""
        kinds, shared = records("Shape", values)
        return cls(kinds, **shared)

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `of`."""
        return {**flat(self.kinds), **{name: value for name, value in vars(self).items() if name != "kinds"}}


class TabularEncoder(nn.Module):
    """Columns -> one vector a sequence, `[sequences, out_features]`."""

    def __init__(self, config: TabularConfig) -> None:
        super().__init__()
        self.widths: dict[str, int | str] = {}  # of the arrays of the kinds that have columns
        self.chains: dict[str, list[str]] = {}  # their modules, in the order in which they run
        width = 0
        for name, shape in config.kinds.items():
            kind = KINDS[name]
            modules = kind.modules(shape, config.embedding_size)
            for child, module in modules.items():
                self.add_module(child, module)
            if array_width := kind.width(shape):
                self.widths[name], self.chains[name] = array_width, list(modules)
                width += list(modules.values())[-1].out_features
        self.mix = (
            nn.Sequential(
                nn.Linear(width, config.hidden_size),
                nn.ReLU(),
                nn.Dropout(config.dropout),
                nn.Linear(config.hidden_size, config.hidden_size),
                nn.ReLU(),
                nn.Dropout(config.dropout),
            )
            if config.hidden_size
            else nn.Identity()
        )
        self.out_features = config.hidden_size or width

    @torch.no_grad()
    def learn(self, buffers: Mapping[str, Sequence[Any]]) -> None:
        """Takes over what the train rows taught, `TabularTransform.buffers`."""
        for name, values in buffers.items():
            self.get_buffer(name).copy_(torch.tensor(values))

    def forward(self, columns: Mapping[str, Tensor]) -> Tensor:
        """The array of each kind, one row a sequence -> `[sequences, out_features]`."""
        parts = []
        for kind, chain in self.chains.items():
            value = columns[kind]  # [sequences, width]
            for name in chain:
                value = self.get_submodule(name)(value)
            parts.append(value)
        mixed: Tensor = self.mix(torch.cat(parts, dim=1))
        return mixed

    def onnx(self, graph: Nodes) -> str:
        """Declares an input for each kind that has columns, adds the nodes and returns the name of the vector.

        Inputs are `[batch, width]` in the type of the kind's array; the vector is `[batch, out_features]`.
        """
        parts = []
        for kind, chain in self.chains.items():
            value = graph.input(kind, KINDS[kind].dtype, ("batch", self.widths[kind]))
            for name in chain:
                module = self.get_submodule(name)
                assert isinstance(module, Part)
                value = module.onnx(graph, value)
            parts.append(value)
        value = graph.add("Concat", *parts, axis=1)
        for place, layer in enumerate(self.mix.children()):
            if isinstance(layer, nn.Linear):
                value = graph.dense(value, f"tabular.mix.{place}", as_array(layer.weight), as_array(layer.bias))
            elif isinstance(layer, nn.ReLU):
                value = graph.add("Relu", value)
        return value

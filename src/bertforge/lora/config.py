"""What to adapt, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bertforge.errors import UsageError


@dataclass(frozen=True)
class LoraConfig:
    """Field names are PEFT's."""

    r: int = 8
    """Rank of the update (Hu et al. 2021, section 4.1)."""
    lora_alpha: float = 16
    """The update is scaled by lora_alpha / r; above 0."""
    lora_dropout: float = 0.0
    """Probability with which an input of the adapter is dropped in training."""
    target_modules: tuple[str, ...] = ("query", "value")
    """Linear layers to adapt, by the end of their names: `query` or `attention.output.dense`. The default is the
    paper's (section 4.2)."""
    layers_to_transform: tuple[int, ...] | None = None
    """Numbers of the encoder layers to adapt, from 0; None for all."""
    modules_to_save: tuple[str, ...] = ("classifier",)
    """Modules trained in full and saved with the adapter: the head."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UsageError(f"r={self.r} is not a rank; use 1 or more")
        if not 0 < self.lora_alpha < math.inf:  # NaN is refused too
            raise UsageError(
                f"lora_alpha={self.lora_alpha} is not a finite number above 0; twice r is usual, here {2 * self.r}"
            )
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"lora_dropout={self.lora_dropout} is not a probability below 1")
        if not self.target_modules:
            raise UsageError("target_modules is empty, so nothing would be adapted; name layers such as query,value")

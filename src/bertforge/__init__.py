"""bertforge: fine-tune BERT on text and optional columns, then compile it for fast inference.

The names below load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bertforge.autofit.fit import fit
    from bertforge.batch import PackedBatch, PaddedBatch, pack
    from bertforge.inference.predictor import Predictor
    from bertforge.lora.adapter_io import load_adapter, save_adapter
    from bertforge.lora.config import LoraConfig
    from bertforge.lora.inject import inject_lora, merge
    from bertforge.model.classifier import BertForSequenceClassification
    from bertforge.model.config import BertConfig

_HOME = {
    "BertConfig": "bertforge.model.config",
    "BertForSequenceClassification": "bertforge.model.classifier",
    "LoraConfig": "bertforge.lora.config",
    "PackedBatch": "bertforge.batch",
    "PaddedBatch": "bertforge.batch",
    "Predictor": "bertforge.inference.predictor",
    "fit": "bertforge.autofit.fit",
    "inject_lora": "bertforge.lora.inject",
    "load_adapter": "bertforge.lora.adapter_io",
    "merge": "bertforge.lora.inject",
    "pack": "bertforge.batch",
    "save_adapter": "bertforge.lora.adapter_io",
}

__all__ = [
    "BertConfig",
    "BertForSequenceClassification",
    "LoraConfig",
    "PackedBatch",
    "PaddedBatch",
    "Predictor",
    "fit",
    "inject_lora",
    "load_adapter",
    "merge",
    "pack",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bertforge' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

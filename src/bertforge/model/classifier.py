"""BERT with a classification head: of the text alone, or of the text and the columns beside it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from bertforge.batch import PackedBatch, PaddedBatch
from bertforge.errors import UsageError
from bertforge.model import weights
from bertforge.model.bert import BertModel
from bertforge.model.config import BertConfig, TabularConfig
from bertforge.model.tabular import TabularEncoder
from bertforge.models import resolve

log = logging.getLogger(__name__)


class BertForSequenceClassification(nn.Module):
    """pooled -> dropout -> classifier; columns, where there are any, stand beside the pooled vector."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config)
        self.tabular = TabularEncoder(config.tabular) if config.tabular else None
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        columns = self.tabular.out_features if self.tabular else 0
        self.classifier = nn.Linear(config.hidden_size + columns, len(config.labels))

    def forward(self, batch: PaddedBatch | PackedBatch) -> Tensor:
        """Logits `[sequences, labels]`."""
        _, pooled = self.bert(batch)  # [sequences, hidden]
        features = self.dropout(pooled)
        if self.tabular is not None:
            if batch.tabular is None:
                raise UsageError("this model reads columns beside the text, but the batch has none; set batch.tabular")
            features = torch.cat([features, self.tabular(batch.tabular)], dim=1)  # [sequences, hidden + columns]
        logits: Tensor = self.classifier(features)
        return logits

    @classmethod
    def from_config(cls, config: BertConfig) -> Self:
        """A model with random weights; the text's part is drawn as BERT's was, see `_initialise`."""
        model = cls(config)
        for module in (model.bert, model.classifier):
            module.apply(lambda part: _initialise(part, config.initializer_range))
        return model

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        labels: tuple[str, ...] | None = None,
        tabular: TabularConfig | None = None,
        attention_dropout: float | None = None,
    ) -> Self:
        """Loads `minilm`, a folder, or a Hub id; weights are float32 whatever the file holds.

        A checkpoint without a head (a pretrained encoder) gets a new one, and a warning that names it. Every other
        missing, unexpected or misshapen key raises ArtifactError. `labels` and `tabular` describe a new head; None
        keeps what the checkpoint says.
        """
        directory = resolve(str(name))
        config = BertConfig.load(directory)
        config = replace(
            config,
            labels=labels or config.labels,
            tabular=tabular or config.tabular,
            attention_probs_dropout_prob=(
                config.attention_probs_dropout_prob if attention_dropout is None else attention_dropout
            ),
        )
        model = cls(config)
        for module in (model.bert.pooler, model.classifier):
            module.apply(lambda part: _initialise(part, config.initializer_range))
        new = weights.load(model, directory)
        if new and labels is None:  # who names the labels knows that the head is new
            log.warning("%s of %s is new and random: fine-tune it before predicting", " and ".join(new), directory)
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`; transformers.AutoModelForSequenceClassification reads them."""
        weights.save(self, Path(directory))
        self.config.save(Path(directory))


def _initialise(module: nn.Module, std: float) -> None:
    """Normal weights with deviation `std`, biases and the padding token's embedding zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        elif module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()

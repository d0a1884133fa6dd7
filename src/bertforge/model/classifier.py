"""BERT with a classification head: of the text alone, or of the text and the columns beside it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from bertforge.batch import PackedBatch, PaddedBatch
from bertforge.columns.encoder import TabularConfig, TabularEncoder
from bertforge.errors import ArtifactError, UsageError
from bertforge.model import weights
from bertforge.model.bert import BertModel
from bertforge.model.config import BertConfig
from bertforge.models import resolve, weights_file

log = logging.getLogger(__name__)
_LARGE = 1 << 28  # numbers: a gigabyte of them


class BertForSequenceClassification(nn.Module):
    """pooled -> dropout -> classifier; columns, where there are any, stand beside the pooled vector."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.new_heads: tuple[str, ...] = ()  # what `from_pretrained` drew at random: `bert.pooler`, `classifier`, ...
        self.bert = BertModel(config)
        self.tabular = TabularEncoder(config.tabular) if config.tabular else None
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        columns = self.tabular.out_features if self.tabular else 0
        self.classifier = nn.Linear(config.hidden_size + columns, len(config.labels))

    def forward(self, batch: PaddedBatch | PackedBatch) -> Tensor:
        """Logits `[sequences, labels]`."""
        pooled = self.bert.pooled(batch)  # [sequences, hidden]
        features = self.dropout(pooled).to(self.classifier.weight.dtype)  # the encoder may be a bfloat16 copy
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
        missing, unexpected or misshapen key raises ArtifactError. None for `labels` and `tabular` keeps what the
        checkpoint says; other ones than the checkpoint's describe a new head, which takes the place of a stored one.
        """
        directory = resolve(str(name))
        stored = BertConfig.load(directory)
        check_size(stored, directory, weights_file(directory))
        config = replace(
            stored,
            labels=labels or stored.labels,
            tabular=tabular or stored.tabular,
            attention_probs_dropout_prob=(
                stored.attention_probs_dropout_prob if attention_dropout is None else attention_dropout
            ),
        )
        model = cls(config)
        for module in (model.bert.pooler, model.classifier):
            module.apply(lambda part: _initialise(part, config.initializer_range))
        same = (config.labels, config.tabular) == (stored.labels, stored.tabular)
        new, dropped = weights.load(model, directory, drop=() if same else weights.TASK_HEADS)
        model.new_heads = tuple(new)
        if dropped:
            log.warning(
                "%s of %s was made for other labels or columns: a new one takes its place",
                " and ".join(dropped),
                directory,
            )
        # Who names the labels knows that the classifier and the columns' branch are new.
        if unexpected := [head for head in new if labels is None or f"{head}." not in weights.TASK_HEADS]:
            log.warning(
                "%s of %s is new and random: fine-tune it before predicting", " and ".join(unexpected), directory
            )
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`; transformers.AutoModelForSequenceClassification reads them."""
        weights.save(self, Path(directory))
        self.config.save(Path(directory))


def check_size(config: BertConfig, directory: Path, *files: Path) -> None:
    """Raises ArtifactError when the config.json in `directory` describes a large model, of more numbers than `files`,
    which hold its weights, have bytes: before it takes memory for what is not there.

    Heads that a checkpoint may lack do not count.
    """
    numbers = config.numbers
    if config.tabular:
        with torch.device("meta"):  # shapes without memory
            numbers += sum(tensor.numel() for tensor in TabularEncoder(config.tabular).state_dict().values())
    size = sum(file.stat().st_size for file in files if file.is_file())
    if numbers > max(size, _LARGE):
        raise ArtifactError(
            f"{directory / 'config.json'} describes a model of {numbers:,} numbers, but its weights have {size:,} "
            "bytes; make or download the model again"
        )


def _initialise(module: nn.Module, std: float) -> None:
    """Normal weights with deviation `std`, biases and the padding token's embedding zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        elif module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()

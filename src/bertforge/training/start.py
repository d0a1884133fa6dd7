"""Where a new classifier starts: a linear probe of the pretrained model, and not random weights.

A random classifier sends random gradients into the encoder until it has learnt something itself, and spoils the very
features it is to read. So the classifier is fitted first, on features that stay as they are, and then all is trained
(linear probing, then fine-tuning: Kumar et al. 2022, arXiv 2202.10054; for LoRA: Tomihari and Sato 2024, arXiv
2405.16747). The fit is a logistic regression with an L2 penalty, by L-BFGS; validation rows choose the penalty.

BERT's classifier reads tanh(pooler([CLS])). A pretrained pooler is of no use here: of sentence encoders it was never
trained, and where its outputs hardly vary the classifier's weights have to be huge (a norm of 440 on 77 classes of
all-MiniLM-L6-v2), so that one step of training undoes the fit. The pooler is therefore set to standardise the [CLS]
vector, each of its numbers to a deviation of `_SPREAD`, where tanh is nearly linear. The model stays a plain
`BertForSequenceClassification`: only values change, and they are saved with the run, adapters included.

Mean pooling makes the better probe, but after fine-tuning it scores no higher (docs/engineering-log.md), and
transformers' BERT has none.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertforge.batch import PackedBatch
from bertforge.data.loader import Split
from bertforge.determinism import generator
from bertforge.errors import DataError
from bertforge.evaluation.logits import predict_logits
from bertforge.model.bert import BertModel
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.training.config import Recipe

PENALTIES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # strongest first: each fit starts from the one before
MOST_ROWS = 10_000  # of each part: more rows move a linear classifier little, and a pass over them takes its time
PROBE_SHARE = 0.1  # of a run's `minutes`, that reading rows may take besides
_PIECE = 512  # rows between two looks at the clock
_SPREAD = 0.5
_LEAST_DEVIATION = 1e-3  # of a number that hardly varies: it is not blown up to noise. LayerNorm's outputs are about 1
_ITERATIONS = 100


def is_probed(recipe: Recipe, model: BertForSequenceClassification) -> bool:
    """Whether a run of `recipe` starts with a probe: unless it says otherwise, when the classifier is new."""
    return recipe.start == "probe" or (not recipe.start and "classifier" in model.new_heads)


def probe(
    model: BertForSequenceClassification, split: Split, precision: str, seed: int, seconds: float | None = None
) -> dict[str, Any]:
    """Sets the pooler and the classifier of `model`; returns what was found, JSON-ready.

    It reads as many rows as it can in `seconds`, at most MOST_ROWS of each part; None sets no limit of time. The part
    of the classifier that reads columns becomes zero: training starts from what the text says. Raises DataError when
    the pretrained model gives values that are no numbers.
    """
    began = time.perf_counter()
    device = next(model.parameters()).device
    parts = [_at_most(rows, seed) for rows in (split.train, split.validation)]
    shares = [None if seconds is None else seconds * len(rows) / sum(map(len, parts)) for rows in parts]
    read = [_read(model, split, *part, precision, seed) for part in zip(parts, shares, strict=True)]
    hidden = [torch.from_numpy(values).to(device) for _, values in read]  # [rows, hidden]
    if not all(torch.isfinite(values).all() for values in hidden):
        raise DataError(f"the pretrained model gives values that are no numbers in {precision}; set precision=fp32")
    train, validation = (torch.from_numpy(split.examples.labels[rows]).to(device) for rows, _ in read)  # [rows]
    mean, std = hidden[0].mean(dim=0), hidden[0].std(dim=0, correction=0).clamp_min(_LEAST_DEVIATION)  # [hidden]
    scale = _SPREAD / std
    features = [torch.tanh((h - mean) * scale) for h in hidden]  # [rows, hidden]
    width = features[0].shape[1]
    best = weight = torch.zeros(len(model.config.labels), width + 1, device=device)  # the last column: bias
    least, chosen = float("inf"), 0.0
    for penalty in PENALTIES:
        weight = _logistic_regression(features[0], train, weight, penalty)
        loss = float(F.cross_entropy(_logits(features[1], weight), validation))
        if loss < least:
            best, least, chosen = weight, loss, penalty
    with torch.no_grad():
        model.bert.pooler.dense.weight.copy_(torch.diag(scale))
        model.bert.pooler.dense.bias.copy_(-mean * scale)
        model.classifier.weight.zero_()
        model.classifier.weight[:, :width] = best[:, :-1]
        model.classifier.bias.copy_(best[:, -1])
    right = (_logits(features[1], best).argmax(dim=1) == validation).double().mean()
    return {
        "rows": len(train),
        "penalty": chosen,
        "validation_loss": least,
        "validation_accuracy": float(right),
        "seconds": time.perf_counter() - began,
    }


class _FirstTokens(nn.Module):
    """What the pooler reads, for `predict_logits` to collect."""

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, batch: PackedBatch) -> Tensor:
        """`[sequences, hidden]`."""
        return self.bert.first(batch)


def _read(
    model: BertForSequenceClassification,
    split: Split,
    rows: np.ndarray,
    seconds: float | None,
    precision: str,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Those of `rows` that were read, and what the pooler reads of each `[rows, hidden]`."""
    first = _FirstTokens(model.bert)
    if seconds is None:
        return rows, predict_logits(first, split.examples, rows, precision)
    end, pieces, found = time.perf_counter() + seconds, [], []
    for piece in np.array_split(generator(seed, "probe", 1).permutation(rows), math.ceil(len(rows) / _PIECE)):
        pieces.append(piece)
        found.append(predict_logits(first, split.examples, piece, precision))
        if time.perf_counter() > end:
            break
    return np.concatenate(pieces), np.concatenate(found)


def _at_most(rows: np.ndarray, seed: int) -> np.ndarray:
    """`rows`, or MOST_ROWS of them drawn at random."""
    if len(rows) <= MOST_ROWS:
        return rows
    return np.sort(generator(seed, "probe", 0).choice(rows, MOST_ROWS, replace=False))


def _logits(features: Tensor, weight: Tensor) -> Tensor:
    """`[rows, labels]`; `weight` is `[labels, hidden + 1]`."""
    return F.linear(features, weight[:, :-1], weight[:, -1])


def _logistic_regression(features: Tensor, labels: Tensor, start: Tensor, penalty: float) -> Tensor:
    """`[labels, hidden + 1]` that minimises mean loss + penalty / 2 |weights|^2, the biases left free."""
    weight = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(_logits(features, weight), labels) + penalty / 2 * weight[:, :-1].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[arg-type,no-untyped-call]
    return weight.detach()

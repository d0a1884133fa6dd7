"""The peer's training loop: transformers, and PEFT's LoRA, as their documentation shows them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from bertforge.data.tokens import TokenStore
from bertforge.evaluation.temperature import fit_temperature

BATCH = 32
TARGETS = {
    "lora-r8": ["query", "value"],
    "lora-r8-all": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
}


@dataclass(frozen=True)
class Trained:
    """What a peer's run came to."""

    logits: dict[str, np.ndarray]
    """Of the best epoch, by part of the split."""
    best_epoch: int
    trainable_parameters: int


def make_model(directory: Path, kind: str, labels: int = 2, **config: Any) -> torch.nn.Module:
    """`full`, or a key of TARGETS; `config` changes the checkpoint's configuration."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        directory, num_labels=labels, dtype=torch.float32, **config
    )
    return model if kind == "full" else adapt(model, kind)


def adapt(model: Any, kind: str, layers: list[int] | None = None) -> torch.nn.Module:
    """PEFT's LoRA of rank 8 in `layers`, None for all."""
    config = LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=TARGETS[kind], layers_to_transform=layers
    )
    return get_peft_model(model, config)


def train(
    directory: Path,
    tokens: TokenStore,
    labels: np.ndarray,
    parts: dict[str, np.ndarray],
    *,
    kind: str,
    lr: float,
    epochs: int,
    seed: int,
) -> Trained:
    """Trains on `parts["train"]` and returns the other parts' logits at the epoch of the lowest validation loss.

    The loss is taken after temperature scaling, as bertforge takes it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = make_model(directory, kind).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.01)
    total = epochs * -(-len(parts["train"]) // BATCH)
    step, best, best_loss, best_epoch = 0, {}, float("inf"), 0
    for epoch in range(1, epochs + 1):
        model.train()
        for rows in batches(rng.permutation(parts["train"]), tokens.lengths, rng):
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / (0.06 * total), (total - step) / (0.94 * total))
            train_step(model, optimizer, collate(tokens, rows, device), torch.from_numpy(labels[rows]).to(device))
            step += 1
        logits = predict(model, tokens, parts["validation"], device)
        target = labels[parts["validation"]]
        scaled = torch.from_numpy(logits / fit_temperature(logits, target))
        loss = float(F.cross_entropy(scaled, torch.from_numpy(target)))
        if loss < best_loss:
            best_loss, best_epoch = loss, epoch
            best = {"validation": logits, "test": predict(model, tokens, parts["test"], device)}
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Trained(best, best_epoch, parameters)


def train_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: dict[str, Tensor],
    labels: Tensor,
    precision: str = "bf16",
) -> None:
    """Forward, backward, clipping, AdamW."""
    with torch.autocast(labels.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        logits = model(**inputs).logits
    F.cross_entropy(logits.float(), labels).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def batches(rows: np.ndarray, lengths: np.ndarray, rng: np.random.Generator, size: int = BATCH) -> list[np.ndarray]:
    """Batches of like length, as transformers' `group_by_length` makes them: sorted within windows of 50 batches."""
    found = []
    for start in range(0, len(rows), 50 * size):
        window = rows[start : start + 50 * size]
        window = window[np.argsort(-lengths[window], kind="stable")]
        found += [window[i : i + size] for i in range(0, len(window), size)]
    return [found[i] for i in rng.permutation(len(found))]


def collate(tokens: TokenStore, rows: np.ndarray, device: torch.device, width: int | None = None) -> dict[str, Tensor]:
    """Cut to 512 tokens, padded on the right to `width` or the longest row."""
    lengths = np.minimum(tokens.lengths[rows], 512)
    ids = np.zeros((len(rows), width or lengths.max()), np.int64)
    for row, (source, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[row, :length] = tokens[int(source)][:length]
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    return {
        "input_ids": torch.from_numpy(ids).to(device),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)).to(device),
    }


@torch.no_grad()
def predict(model: torch.nn.Module, tokens: TokenStore, rows: np.ndarray, device: torch.device) -> np.ndarray:
    """Logits `[rows, labels]` in the order of `rows`, in batches of like length."""
    model.eval()
    order = np.argsort(-tokens.lengths[rows], kind="stable")
    logits = np.zeros((len(rows), model.config.num_labels), np.float32)
    for start in range(0, len(rows), 2 * BATCH):
        places = order[start : start + 2 * BATCH]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits[places] = model(**collate(tokens, rows[places], device)).logits.float().cpu().numpy()
    return logits

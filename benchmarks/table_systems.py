"""The systems of the suite: each learns the train rows of prepared data and answers its validation and test rows.

Ours are called as the commands call them. The others are what their own documentation shows, on the same rows, with the
same pretrained weights in float32:

- a linear probe on sentence embeddings: mean-pooled and normalised, texts cut to 256 tokens, as the model card of
  all-MiniLM-L6-v2 has it, with scikit-learn's logistic regression, its C chosen on validation rows;
- AutoGluon's TabularPredictor with its defaults, on every column of the table, in an environment of its own, whose
  interpreter AUTOGLUON_PYTHON names: pip install "autogluon.tabular[lightgbm,catboost]";
- transformers' Trainer with TrainingArguments as they come (5e-5, 3 epochs, batches of 8, float32), texts cut to 512
  tokens and padded to the longest of a batch; the weights after the last step, as the Trainer leaves them.

No system sees a test label. Seconds are of a process that may share its device with others.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bertforge.autofit.columns import choose_columns
from bertforge.autofit.fit import FitOptions, fit_table
from bertforge.columns.transform import TabularSpec
from bertforge.data.prepared import PreparedData
from bertforge.evaluation.baselines import baselines
from bertforge.inference.predictor import Predictor
from bertforge.inference.scoring import score
from bertforge.manifest import read_manifest
from bertforge.models import resolve
from bertforge.training.config import load_recipe
from bertforge.training.finetune import finetune
from public_tables import PublicTable

PARTS = ("validation", "test")
EMBEDDED_TOKENS = 256
PENALTIES = (1.0, 10.0, 100.0)  # C of scikit-learn: the inverse of the penalty's weight

# Our runs ask for deterministic algorithms; torch looks once, at its first product, whether cuBLAS is set up for them.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@dataclass(frozen=True)
class Task:
    """What a system is to learn."""

    table: PublicTable
    file: Path
    prepared: Path
    model: str
    """The pretrained checkpoint, as `--model` names it."""
    seed: int
    minutes: float
    """That `fit` may take."""

    @property
    def data(self) -> PreparedData:
        return PreparedData.open(self.prepared)

    @property
    def columns(self) -> TabularSpec | None:
        """What `fit` would read beside the text."""
        if not self.table.columns:
            return None
        return choose_columns(self.file, self.table.label, self.table.text, self.seed).beside


@dataclass(frozen=True)
class Answers:
    """What a system says of the rows of each of PARTS, and what it took."""

    system: str
    logits: dict[str, np.ndarray]
    """[rows, labels] by part, the rows ascending."""
    facts: dict[str, Any]
    """Seconds and the like, for the record."""


def default(task: Task) -> list[Answers]:
    """`bertforge train`, nothing said."""
    return _train(task, "bertforge", None)


def full(task: Task) -> list[Answers]:
    """`bertforge train --variant bert-base`: every weight."""
    return _train(task, "bertforge, full", "bert-base")


def lora(task: Task) -> list[Answers]:
    """`bertforge train --variant lora-r8`."""
    return _train(task, "bertforge, lora-r8", "lora-r8")


def columns(task: Task) -> list[Answers]:
    """The columns beside the text as well: the flagship's recipe for them, or those that `fit` finds."""
    if task.table.label is None:
        return _train(task, "bertforge, columns", "columns")
    return _train(task, "bertforge, columns", None, task.columns)


def _train(task: Task, system: str, variant: str | None, beside: TabularSpec | None = None) -> list[Answers]:
    recipe = replace(load_recipe(variant), model=task.model, seed=task.seed)
    if beside:
        recipe = replace(recipe, tabular=beside)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        manifest = finetune(task.prepared, Path(folder) / "run", recipe)
        predictor = Predictor.load(Path(folder) / "run")
        logits = {part: score(predictor, task.prepared, part).logits for part in PARTS}
    metrics, settings = manifest["metrics"], manifest["recipe"]
    facts = {
        "train_seconds": round(metrics["seconds"], 2),
        "seconds": round(time.perf_counter() - began, 2),
        "precision": manifest["precision"],
        "epochs": metrics["epochs"],
        "best_epoch": metrics["best_epoch"],
        "steps": next(point["step"] for point in reversed(manifest["history"]) if "epoch" in point),
        "learning_rate": settings["lr"],
        "trainable_parameters": manifest["trainable_parameters"],
        "probe": manifest["probe"],
    }
    return [Answers(system, logits, facts)]


def fit(task: Task) -> list[Answers]:
    """`bertforge fit`: columns, settings and variant found within the minutes."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model"
        options = FitOptions(task.table.label, task.table.text, task.minutes, task.model, task.seed)
        fit_table(task.file, out, options, say=lambda line: None)
        seconds = time.perf_counter() - began
        run = read_manifest(out / "run", "run")
        predictor = Predictor.load(out / "run")
        logits = {part: score(predictor, out / "data", part).logits for part in PARTS}
    facts = {
        "train_seconds": round(run["metrics"]["seconds"], 2),
        "seconds": round(seconds, 2),
        "minutes": task.minutes,
        "precision": run["precision"],
        "epochs": run["metrics"]["epochs"],
        "trainable_parameters": run["trainable_parameters"],
        "columns": run["recipe"]["tabular"] is not None,
    }
    return [Answers("bertforge fit", logits, facts)]


def simple(task: Task) -> list[Answers]:
    """The baselines that `train` shows beside a model, kept with the data."""
    data, split = task.data, task.data.split_name()
    found = []
    for baseline in baselines(data, split, task.columns):
        places = {part: np.searchsorted(baseline.rows, data.rows(split, part)) for part in PARTS}
        log = np.log(baseline.probabilities.clip(1e-9))
        logits = {part: log[rows] for part, rows in places.items()}
        facts = {"train_seconds": round(baseline.seconds, 2), "seconds": round(baseline.seconds, 2)}
        found.append(Answers(baseline.name, logits, facts))
    return found


def embeddings(task: Task) -> list[Answers]:
    """Logistic regression on sentence embeddings."""
    from sklearn.linear_model import LogisticRegression

    data, split = task.data, task.data.split_name()
    rows = {part: data.rows(split, part) for part in ("train", *PARTS)}
    labels = np.asarray(data.labels)
    began = time.perf_counter()
    embedded = embed(resolve(task.model), data.texts(np.concatenate(list(rows.values()))))
    ends = np.cumsum([len(found) for found in rows.values()])
    features = dict(zip(rows, np.split(embedded, ends[:-1]), strict=True))
    best, least = LogisticRegression(), np.inf
    for penalty in PENALTIES:
        model = LogisticRegression(C=penalty, max_iter=1000).fit(features["train"], labels[rows["train"]])
        log = model.predict_log_proba(features["validation"])
        loss = -log[np.arange(len(log)), labels[rows["validation"]]].mean()
        if loss < least:
            best, least = model, loss
    seconds = round(time.perf_counter() - began, 2)
    logits = {part: best.predict_log_proba(features[part]).clip(-100) for part in PARTS}
    facts = {"train_seconds": seconds, "seconds": seconds, "precision": "fp32", "C": best.C}
    return [Answers("linear probe on embeddings", logits, facts)]


@torch.no_grad()
def embed(directory: Path, texts: list[str]) -> np.ndarray:
    """[texts, hidden] float32: mean-pooled over the tokens of a text and scaled to length 1."""
    from transformers import AutoModel, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).to(device).eval()
    order = np.argsort([-len(text) for text in texts], kind="stable")
    found = np.empty((len(texts), model.config.hidden_size), np.float32)
    for start in range(0, len(texts), 32):
        places = order[start : start + 32]
        batch = tokenizer(
            [texts[place] for place in places],
            truncation=True,
            max_length=EMBEDDED_TOKENS,
            padding=True,
            return_tensors="pt",
        ).to(device)
        hidden = model(**batch).last_hidden_state  # [texts, tokens, hidden]
        mask = batch["attention_mask"].unsqueeze(-1).float()
        pooled = (hidden * mask).sum(1) / mask.sum(1)  # [texts, hidden]
        found[places] = torch.nn.functional.normalize(pooled).cpu().numpy()
    return found


def trainer(task: Task) -> list[Answers]:
    """transformers' Trainer, its arguments as they come."""
    import transformers

    torch.use_deterministic_algorithms(False)  # as it comes; a run of ours in this process asked for them
    transformers.utils.logging.set_verbosity_error()
    transformers.set_seed(task.seed)
    data, split, directory = task.data, task.data.split_name(), resolve(task.model)
    labels = np.asarray(data.labels)
    began = time.perf_counter()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    examples: dict[str, list[dict[str, Any]]] = {}
    for part in ("train", *PARTS):
        rows = data.rows(split, part)
        encoded = tokenizer(data.texts(rows), truncation=True, max_length=512)
        examples[part] = [
            {"input_ids": ids, "attention_mask": mask, "labels": int(label)}
            for ids, mask, label in zip(encoded["input_ids"], encoded["attention_mask"], labels[rows], strict=True)
        ]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, num_labels=len(data.label_names), dtype=torch.float32
    )
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
        arguments = transformers.TrainingArguments(output_dir=folder, seed=task.seed, **quiet)
        loop = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=examples["train"],
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
        )
        outcome = loop.train()
        logits = {part: np.asarray(loop.predict(examples[part]).predictions, np.float32) for part in PARTS}
    facts = {
        "train_seconds": round(outcome.metrics["train_runtime"], 2),
        "seconds": round(time.perf_counter() - began, 2),
        "precision": "fp32",
        "epochs": int(arguments.num_train_epochs),
        "steps": outcome.global_step,
        "learning_rate": arguments.learning_rate,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    return [Answers("transformers Trainer", logits, facts)]


def autogluon(task: Task) -> list[Answers]:
    """AutoGluon on text and columns, for as many minutes as `fit` may take."""
    python = os.environ["AUTOGLUON_PYTHON"]
    data, split = task.data, task.data.split_name()
    labels, schema = np.asarray(data.labels), data.schema
    frame = data.columns([name for name in data.manifest["columns"] if name != schema.label_column])
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for part in ("train", *PARTS):
            rows = data.rows(split, part)
            frame.iloc[rows].assign(label=labels[rows]).to_parquet(Path(folder) / f"{part}.parquet")
        script = str(Path(__file__).with_name("autogluon_peer.py"))
        subprocess.run([python, script, folder, str(60 * task.minutes)], check=True, stdout=subprocess.DEVNULL)
        logits = {part: np.log(np.load(Path(folder) / f"{part}.npy").clip(1e-9)) for part in PARTS}
        version = (Path(folder) / "version").read_text()
    seconds = round(time.perf_counter() - began, 2)
    facts = {"train_seconds": seconds, "seconds": seconds, "minutes": task.minutes, "version": version}
    return [Answers("AutoGluon", logits, facts)]


@dataclass(frozen=True)
class System:
    """A system by the name that commands give it."""

    run: Callable[[Task], list[Answers]]
    fixed_s: float
    """Seconds on a GPU that nine others share, whatever the rows; with `thousand_s` it says what to start first."""
    thousand_s: float
    """Seconds more for a thousand rows."""
    first: bool = False
    """Starts before the others, which wait for what it leaves."""


SYSTEMS = {
    "simple": System(simple, 2, 1.5, first=True),
    "default": System(default, 20, 1),
    "full": System(full, 20, 1),
    "lora-r8": System(lora, 20, 1),
    "columns": System(columns, 20, 1),
    "fit": System(fit, 0, 0),
    "embeddings": System(embeddings, 5, 0.5),
    "trainer": System(trainer, 10, 11),
    "autogluon": System(autogluon, 0, 0),
}

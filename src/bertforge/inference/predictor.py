"""A run, a merged model or an engine, loaded whole: text and columns in, labels and probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import pandas as pd
import torch

from bertforge.artifact import hash_file
from bertforge.columns.kind import stacked
from bertforge.columns.transform import TabularTransform
from bertforge.data.loader import Examples
from bertforge.data.prepared import PreparedData
from bertforge.data.sample import is_made_up
from bertforge.data.schema import STACK_OVERFLOW, Schema
from bertforge.data.streaming import ahead
from bertforge.data.tokens import Tokenizer, TokenStore
from bertforge.engines.base import Engine
from bertforge.engines.pytorch import PyTorchEngine
from bertforge.engines.registry import TARGETS, open_engine
from bertforge.engines.run import run, run_each
from bertforge.errors import ArtifactError, DataError, MachineError, UsageError
from bertforge.hardware import Hardware, choose_precision, detect
from bertforge.inference.cascade import Recheck, margin_between
from bertforge.inference.codec import Codec
from bertforge.inference.inputs import Given
from bertforge.lora.adapter_io import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapter
from bertforge.lora.inject import merge
from bertforge.lora.layer import LoraLinear
from bertforge.manifest import compile_command, remake, served
from bertforge.model import weights
from bertforge.model.classifier import BertForSequenceClassification, check_size
from bertforge.model.config import BertConfig
from bertforge.models import resolve, weights_file
from bertforge.proof.golden import GoldenRows
from bertforge.proof.tolerances import SAVED
from bertforge.scales import Scales

_FIRST_ROWS, _MOST_ROWS = 2048, 8192  # texts tokenized at once while the engine computes others
K = TypeVar("K")


@dataclass(frozen=True)
class Predictor:
    """`Predictor.load("runs/closed").predict(["How do I ...?"])`."""

    engine: Engine
    codec: Codec
    """What comes before the engine and after it."""
    recheck: Recheck | None = None
    """What answers close rows again."""

    @classmethod
    def load(
        cls,
        directory: str | Path,
        precision: str = "auto",
        *,
        recheck: str | Path | None = None,
        prior: Mapping[str, float] | None = None,
    ) -> Self:
        """Loads a folder made by `bertforge fit`, `train`, `merge`, `quantize` or `compile` on the best device here.

        `precision` is that of a run or merged model: fp32, bf16, or auto; an engine has its own. `recheck`, beside an
        engine in 8 bits, is the model that it was compiled from, which then answers close rows again in float32, or
        another engine of that model. `prior` gives labels the shares that they have where the model is used, such as
        `{"closed": 0.06}`: probabilities are corrected for them.

        Raises ArtifactError when a file is missing or damaged, when an adapter's base model is not the one it was
        trained on, when the golden rows do not give the logits they gave when the model was saved, when an engine was
        not verified where that counts, or when `recheck` has other weights; UsageError for a precision that the engine
        was not compiled in, for a `recheck` beside a model, or in 8 bits, and for a `prior` that the folder's
        thresholds were not chosen for.
        """
        directory, manifest = served(Path(directory))
        again = None
        if recheck is not None:
            folder, other = served(Path(recheck))
            margin = margin_between(directory, manifest, folder, other)
            again = Recheck(cls.load(folder, "auto" if other["kind"] == "engine" else "fp32").engine, margin)
        hardware = detect()
        engine: Engine
        if manifest["kind"] == "engine":
            if precision not in ("auto", manifest["precision"]):
                raise UsageError(f"{directory} was compiled in {manifest['precision']}, not in {precision}")
            _check_verified(directory, manifest, hardware)
            engine = open_engine(directory, manifest["target"], manifest["precision"], hardware)
        else:
            model = plain(verified_model(directory, manifest, hardware))
            if manifest["kind"] == "quantized":
                if precision not in ("auto", "fp32"):
                    raise UsageError(
                        f"{directory} simulates its 8 bits in float32, which alone is exact, not {precision}"
                    )
                precision = "fp32"
            engine = PyTorchEngine(model, hardware, choose_precision(hardware, precision))
        loaded = cls(
            engine=engine,
            codec=Codec.load(directory, manifest, prior),
            recheck=again,
        )
        loaded.check_inputs(directory)
        return loaded

    @property
    def manifest(self) -> dict[str, Any]:
        """Of the folder that was loaded."""
        return self.codec.manifest

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self.codec.tokenizer

    @property
    def schema(self) -> Schema:
        """What the columns of the training table mean."""
        return self.codec.schema

    @property
    def transform(self) -> TabularTransform | None:
        """What makes arrays of columns; None for a model that reads the text alone."""
        return self.codec.transform

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names in the order of the logits."""
        return self.codec.label_names

    @property
    def temperature(self) -> float:
        """What logits are divided by before they become probabilities."""
        return self.codec.temperature

    @property
    def precision(self) -> str:
        """What the matrix products run in."""
        return self.engine.precision

    @property
    def max_length(self) -> int:
        """Tokens a text is cut to."""
        return self.codec.max_length

    def close(self) -> None:
        """Gives the engine's memory and threads back, and those of the one that answers close rows again."""
        for engine in (self.engine, *([self.recheck.engine] if self.recheck else [])):
            engine.close()

    def made_up(self, frame: pd.DataFrame) -> bool:
        """Whether rows of `frame`, or those the model learnt from, come from `bertforge sample-data`."""
        return bool(self.manifest["data"]["made_up"]) or (self.schema.kind == STACK_OVERFLOW and is_made_up(frame))

    def predict(self, rows: Given, columns: pd.DataFrame | None = None) -> pd.DataFrame:
        """`label`, `probability` (of that label) and `p_<label>` for each label; see `predict_proba` for the rest.

        Where `bertforge threshold` chose thresholds, there is a last column, `decision`: a label, or "abstain".
        Labels are of the type they had in the table that the model learnt from: text, int or bool, and None for a row
        without text.
        """
        given = self.codec.read(rows, columns)
        given.warn()
        return self.codec.labelled(
            self.codec.probabilities(given.texts, self.logits(given.texts, given.columns)), given.index
        )

    def predict_each(
        self, lots: Iterable[tuple[K, list[str], pd.DataFrame | None]]
    ) -> Generator[tuple[K, pd.DataFrame], None, None]:
        """`predict` of each lot of texts and their columns, in turn, beside what the caller knows the lot by.

        While the caller works on one lot, the engine computes the next and the one after it is tokenized. `lots`, each
        of a row at least, are drawn in another thread; an exception of theirs is raised here.
        """
        known = (((key, texts), texts, columns) for key, texts, columns in lots)
        with closing(self._each(known)) as found:
            for (key, texts), logits in found:
                yield key, self.codec.labelled(self.codec.probabilities(texts, logits), pd.RangeIndex(len(texts)))

    def predict_proba(self, rows: Given, columns: pd.DataFrame | None = None) -> pd.DataFrame:
        """`[rows, labels]` float32: a column of probability for each label, under the label's name.

        `rows` are a list of texts, a Series of them, or a frame with the columns of the table that the model was
        trained on, the label aside. Its index is kept. `columns`, beside texts alone, holds the columns that the model
        reads, as `PreparedData.columns` gives them. A row without text has no label and no probabilities: NaN.

        Raises UsageError for something else, and DataError for a row that is no text or a column that is missing.
        """
        given = self.codec.read(rows, columns)
        given.warn()
        chances = self.codec.probabilities(given.texts, self.logits(given.texts, given.columns))
        return pd.DataFrame(chances, index=given.index, columns=list(self.label_names))

    def logits(
        self,
        texts: Sequence[str],
        columns: pd.DataFrame | None = None,
        advance: Callable[[int], None] = lambda rows: None,
    ) -> np.ndarray:
        """Logits `[rows, labels]` float32, in the order of `texts`."""
        if len(texts) == 0:
            return np.zeros((0, len(self.label_names)), np.float32)
        if len(texts) <= _FIRST_ROWS:
            store = TokenStore(*self.tokenizer.encode(texts))
            return self.token_logits(store, np.arange(len(texts)), self.codec.arrays(columns), advance)
        lots = [(None, texts[part], None if columns is None else columns.iloc[part]) for part in _parts(len(texts))]
        with closing(self._each(lots, advance)) as found:
            return np.concatenate([logits for _, logits in found])

    def _each(
        self,
        lots: Iterable[tuple[K, Sequence[str], pd.DataFrame | None]],
        advance: Callable[[int], None] = lambda rows: None,
    ) -> Generator[tuple[K, np.ndarray], None, None]:
        """Logits of each lot, in turn; the next one is tokenized in a thread."""

        def read(
            lot: tuple[K, Sequence[str], pd.DataFrame | None],
        ) -> tuple[tuple[K, Examples], Examples, np.ndarray]:
            key, texts, columns = lot
            examples = self._examples(TokenStore(*self.tokenizer.encode(texts)), self.codec.arrays(columns))
            return (key, examples), examples, np.arange(len(texts))

        with (
            closing(ahead(map(read, lots))) as ready,
            closing(run_each(self.engine, ready, advance=advance)) as found,
        ):
            for (key, examples), logits in found:
                yield key, self._settled(logits, examples, np.arange(len(logits)))

    def check_inputs(self, directory: Path) -> None:
        """Raises ArtifactError when the golden rows, as the table had them, are not read as they were when the model
        was saved: the schema, the tokenizer or the columns have come to mean something else.
        """
        golden = GoldenRows.from_dict(self.manifest["golden"]).examples
        given = self.codec.read(pd.DataFrame(self.manifest["inputs"]))
        rows = np.arange(len(golden.tokens))
        store = TokenStore(*self.tokenizer.encode(given.texts))
        found = Examples(store, golden.labels, self.tokenizer.sep_id, self.max_length, self.codec.arrays(given.columns))
        (expected, _), (batch, _) = golden.pack(rows), found.pack(rows)
        same = torch.equal(expected.input_ids, batch.input_ids) and torch.equal(expected.cu_seqlens, batch.cu_seqlens)
        for name, array in (golden.tabular or {}).items():
            same = same and _equal(array, (found.tabular or {})[name])
        if not same:
            raise ArtifactError(
                f"{directory} does not read its golden rows as it did when it was saved: its tokenizer or its columns "
                f"were changed; {remake(directory, self.manifest['kind'], self.manifest)}"
            )

    def examples(self, prepared: PreparedData, rows: np.ndarray) -> Examples:
        """Prepared data as this model reads it; of the columns, if it reads any, `rows` alone.

        Raises DataError for data with other labels.
        """
        if prepared.label_names != self.label_names:
            raise DataError(
                f"the data is labelled {', '.join(prepared.label_names)}, "
                f"but the model knows {', '.join(self.label_names)}"
            )
        columns, tabular = self.columns(prepared, rows), None
        if self.transform is not None and columns is not None:
            arrays = self.transform(columns)
            tabular = {name: _among(array, rows, len(prepared)) for name, array in arrays.items()}
        store = prepared.tokens(self.tokenizer)
        return Examples(store, prepared.labels, self.tokenizer.sep_id, self.max_length, tabular)

    def columns(self, prepared: PreparedData, rows: np.ndarray) -> pd.DataFrame | None:
        """The columns this model reads beside the text, of some rows; None when it reads the text alone."""
        return None if self.transform is None else prepared.columns(self.transform.spec.columns).iloc[rows]

    def token_logits(
        self,
        store: TokenStore,
        rows: np.ndarray,
        tabular: dict[str, np.ndarray] | None,
        advance: Callable[[int], None] = lambda rows: None,
    ) -> np.ndarray:
        """Logits `[rows, labels]` of tokenised rows."""
        return self.example_logits(self._examples(store, tabular), rows, advance)

    def example_logits(
        self, examples: Examples, rows: np.ndarray, advance: Callable[[int], None] = lambda rows: None
    ) -> np.ndarray:
        """Logits `[rows, labels]` of some rows of `examples`, in their order; close ones are asked again."""
        return self._settled(run(self.engine, examples, rows, advance=advance), examples, rows)

    def _settled(self, logits: np.ndarray, examples: Examples, rows: np.ndarray) -> np.ndarray:
        return logits if self.recheck is None else self.recheck.settle(logits, examples, rows)

    def _examples(self, store: TokenStore, tabular: dict[str, np.ndarray] | None) -> Examples:
        return Examples(store, np.full(len(store), -1), self.tokenizer.sep_id, self.max_length, tabular)


def _parts(rows: int) -> Iterator[slice]:
    """`rows` in parts that double up to _MOST_ROWS: the engine soon has work, and then packs of like length."""
    start, most = 0, _FIRST_ROWS
    while start < rows:
        yield slice(start, start + most)
        start, most = start + most, min(2 * most, _MOST_ROWS)


def _equal(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether `[rows, width]` arrays are the same but for zeros on the right: a table's longest row sets the width."""
    both = stacked([first, second])
    return bool(np.array_equal(both[: len(first)], both[len(first) :], equal_nan=first.dtype.kind == "f"))


def _among(array: np.ndarray, rows: np.ndarray, total: int) -> np.ndarray:
    """`[total, width]` with `array` at `rows`; the others are zeros, which take no memory."""
    table = np.zeros((total, array.shape[1]), array.dtype)
    table[rows] = array
    return table


def verified_model(directory: Path, manifest: dict[str, Any], hardware: Hardware) -> BertForSequenceClassification:
    """`load_model` on the device here, once it has given its golden rows' logits; raises ArtifactError otherwise."""
    model = load_model(directory, manifest).to(hardware.device).eval()
    difference = GoldenRows.from_dict(manifest["golden"]).difference(model)
    if not difference <= SAVED:  # NaN is refused too
        raise ArtifactError(
            f"{directory} does not compute what it did when it was saved: logits differ by {difference:.3g} on its "
            "golden rows; its weights were changed or damaged, so make it again"
        )
    return model


def plain(model: BertForSequenceClassification) -> BertForSequenceClassification:
    """Without adapters: they are added to the weights once, and not at each batch."""
    if not any(isinstance(module, LoraLinear) for module in model.modules()):
        return model
    merged = merge(model)
    assert isinstance(merged, BertForSequenceClassification)
    return merged.eval()


def load_model(directory: Path, manifest: dict[str, Any]) -> BertForSequenceClassification:
    """The model of a run or merged folder, with its adapter where it has one."""
    if not (directory / ADAPTER_CONFIG).is_file():
        model = BertForSequenceClassification.from_pretrained(directory, labels=tuple(manifest["labels"]))
        if model.new_heads:
            raise ArtifactError(
                f"{directory} holds no trained {' and '.join(model.new_heads)}; fine-tune it first: bertforge train"
            )
        return with_quantizers(model, directory) if manifest["kind"] == "quantized" else model
    base = resolve(manifest["base"]["model"])
    if (found := hash_file(weights_file(base))) != manifest["base"]["weights"]:
        raise ArtifactError(
            f"the adapter in {directory} was trained on {manifest['base']['model']} with weights "
            f"{manifest['base']['weights']}, but {base} holds {found}"
        )
    config = BertConfig.load(directory)
    check_size(config, directory, weights_file(base), directory / ADAPTER_WEIGHTS)
    model = BertForSequenceClassification(config)
    weights.load(model, base, drop=weights.TASK_HEADS)  # the adapter brings its own
    load_adapter(model, directory)
    return model.eval()


def with_quantizers(model: BertForSequenceClassification, directory: Path) -> BertForSequenceClassification:
    """The model of a quantized folder, simulating its 8 bits; raises MachineError without ModelOpt."""
    if not util.find_spec("modelopt"):
        raise MachineError(f"{directory} is simulated with NVIDIA ModelOpt; pip install 'bertforge[quantize]'")
    from bertforge.quantize.fake import with_scales

    return with_scales(model, Scales.load(directory)).eval()


def check_merged(directory: Path) -> None:
    """Raises ArtifactError for a run whose adapter still stands beside its base."""
    if (directory / ADAPTER_CONFIG).is_file():
        raise ArtifactError(
            f"{directory} still has its adapter beside the base; merge first: bertforge merge {directory} --out DIR"
        )


def _check_verified(directory: Path, manifest: dict[str, Any], hardware: Hardware) -> None:
    """Raises ArtifactError for an engine that was not shown to compute what its model does, naming what shows it.

    Where kernels are compiled anew for each device, what was shown on one says nothing of another.
    """
    target = manifest["target"]
    here = TARGETS.get(target)
    verify = f"{compile_command(directory, target, manifest['precision'])} --verify"
    if manifest.get("verified") is False:
        raise ArtifactError(f"{directory} is not verified ({manifest['not_verified']}); where it runs: {verify}")
    if here and here.compiles_at_load and manifest["device"] != hardware.name and not here.unfit(hardware):
        raise ArtifactError(
            f"{directory} was verified on {manifest['device']}, and this is {hardware.name}; prove it here: {verify}"
        )


def plain_model(predictor: Predictor) -> BertForSequenceClassification:
    """The PyTorch model behind a predictor that is no engine."""
    assert isinstance(predictor.engine, PyTorchEngine)
    return predictor.engine.model

"""A merged model -> the model with 8-bit ranges, what they cost layer by layer, in a folder that reloads as it was.

Calibration reads train rows; every choice (of a method, of what is spared, of an epoch) is made on validation rows; the
test rows decide nothing. The folder holds the plain model's files, which transformers still reads, and beside them
`scales.safetensors`; an engine compiled from it computes with these ranges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.torch import save as to_bytes

from bertforge.artifact import fresh_directory, write_atomic
from bertforge.data.loader import Examples, spread
from bertforge.data.prepared import PreparedData
from bertforge.errors import ArtifactError, MachineError, UsageError
from bertforge.evaluation.compare import compare
from bertforge.evaluation.logits import predict_logits
from bertforge.inference.predictor import Predictor, check_merged, load_model, plain_model
from bertforge.locks import locked
from bertforge.manifest import carried, identity, read_manifest, write_manifest
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.model.points import Unit
from bertforge.model.weights import WEIGHTS
from bertforge.proof.golden import GoldenRows
from bertforge.proof.rows import RANKING_ROWS, calibrating, check_classes, proving, tuning
from bertforge.scales import FORMATS

if TYPE_CHECKING:
    from bertforge.quantize.sensitivity import Judge

METHODS = ("best", "max", "entropy", "mse", "percentile")
"""Of calibration; see `quantize.calibrate`."""
Say = Callable[[str], object]
Tune = Callable[
    [BertForSequenceClassification, Examples, np.ndarray, np.ndarray, dict[str, Any], Path, Say], dict[str, Any]
]
"""Fine-tunes a model on train rows and tells the validation loss before and after: `training.qat.tune`."""


@dataclass(frozen=True)
class QuantizeOptions:
    """How a model is quantized."""

    precision: str = "int8"
    """int8 or fp8."""
    preset: str = "projections"
    """ffn, projections (+ query, key, value and attention's output) or attention (+ attention's own products)."""
    calibration: str = "best"
    """max, entropy, mse, percentile, or best: the one of the lowest divergence on validation rows."""
    smooth: float = 0.0
    """SmoothQuant's alpha, 0 to 1; 0 leaves channels as they are."""
    rows: int = 300
    """Train rows that calibrate."""
    validation_rows: int = 1000
    """Validation rows that judge what came of it."""
    max_drop: float | None = None
    """Accuracy that may be lost on the rows that choose, a fraction: units are taken back until it holds."""

    def __post_init__(self) -> None:
        from bertforge.model.points import PRESETS

        for name, allowed in (("precision", tuple(FORMATS)), ("preset", tuple(PRESETS)), ("calibration", METHODS)):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} {getattr(self, name)!r} does not exist; choose one of {', '.join(allowed)}")
        if not 0 <= self.smooth <= 1:
            raise UsageError(f"smooth is {self.smooth}; SmoothQuant's alpha lies between 0 (off) and 1")
        if self.rows < 1 or self.validation_rows < 1:
            raise UsageError(f"rows={self.rows}, validation_rows={self.validation_rows}; both must be above 0")
        if self.max_drop is not None and not self.max_drop >= 0:
            raise UsageError(f"max_drop is {self.max_drop}; accuracy that may be lost is 0 or more")
        if self.calibration == "entropy" and self.precision == "fp8":
            raise UsageError("entropy calibration is defined for int8 alone; choose --calibration best")


@dataclass(frozen=True)
class _Rows:
    """The rows of one job."""

    examples: Examples
    calibration: np.ndarray
    tuned: np.ndarray
    """Validation rows that choose: a method, what is spared, whether fine-tuning is kept."""
    judged: np.ndarray
    """Others, which choose nothing and say what came of it."""
    train: np.ndarray
    validation: np.ndarray

    def logits(self, model: Any, rows: np.ndarray) -> np.ndarray:
        """`[rows, labels]` in float32 arithmetic."""
        return predict_logits(model, self.examples, rows, "fp32")


def quantize_model(
    model: Path, data: Path, out: Path, options: QuantizeOptions, tune: Tune | None, say: Say
) -> dict[str, Any]:
    """Writes `out` and returns what was measured: the manifest's `quantization`.

    `tune` fine-tunes the quantized model; None leaves the weights as they are. `say` is told each stage. Raises
    ArtifactError for a run with adapters, MachineError without ModelOpt, DataError for calibration rows of one class.
    """
    with locked(out):
        return _quantize(model, data, out, options, tune, say)


def _quantize(
    model: Path, data: Path, out: Path, options: QuantizeOptions, tune: Tune | None, say: Say
) -> dict[str, Any]:
    manifest = read_manifest(model, "run", "model")
    check_merged(model)
    if not util.find_spec("modelopt"):
        raise MachineError("quantization needs NVIDIA ModelOpt; pip install 'bertforge[quantize]'")
    from bertforge.quantize import fake
    from bertforge.quantize.sensitivity import Judge

    predictor, prepared = Predictor.load(model, "fp32"), PreparedData.of(data, model, manifest)
    rows = _choose(predictor, prepared, options)
    network = plain_model(predictor)

    def judge(part: np.ndarray) -> Judge:
        plain = rows.logits(network, part)  # now, before anything is quantized
        return Judge(lambda: rows.logits(network, part), plain, rows.examples.labels[part])

    judges = judge(spread(rows.tuned, RANKING_ROWS)), judge(rows.tuned), judge(rows.judged)
    job = _Job(network, rows, *judges, options, say)
    with fresh_directory(out) as folder:
        found, chosen = job.calibrate()
        if tune:
            found["qat"] = job.fine_tune(tune, manifest["recipe"], folder / "tuning")
        write_atomic(folder / WEIGHTS, to_bytes(fake.plain_state(network), metadata={"format": "pt"}))
        fake.read_scales(network, options.precision, chosen).save(folder)
        network.config.save(folder)
        predictor.tokenizer.save(folder, predictor.max_length)
        golden = GoldenRows.from_dict(manifest["golden"]).of(network)
        of = {**carried(manifest), "golden": golden.to_dict(), "parent": identity(model)}
        write_manifest(folder, "quantized", **of, quantization=found)
        reloaded = load_model(folder, read_manifest(folder, "quantized")).to(next(network.parameters()).device)
        if golden.difference(reloaded) != 0:
            raise ArtifactError(f"the quantized model written to {out} does not reload as it was; nothing was kept")
    return found


def _choose(predictor: Predictor, prepared: PreparedData, options: QuantizeOptions) -> _Rows:
    split = predictor.manifest["recipe"]["split"]
    train, validation = prepared.rows(split, "train"), prepared.rows(split, "validation")
    calibration, tuned = calibrating(train, options.rows), tuning(validation)
    judged = np.sort(proving(validation)[: options.validation_rows])
    examples = predictor.examples(prepared, np.concatenate([train, validation]))
    check_classes(examples.labels[calibration])
    return _Rows(examples, calibration, tuned, judged, train, validation)


@dataclass(frozen=True)
class _Job:
    """A model on its way to 8 bits."""

    network: BertForSequenceClassification
    rows: _Rows
    ranking: Judge
    """Of methods and layers, by some of the rows that tune, for it takes many passes."""
    budget: Judge
    """Of what is spared and kept, by all of them."""
    verdict: Judge
    """Of what came of it, by rows that choose nothing."""
    options: QuantizeOptions
    say: Say

    def calibrate(self) -> tuple[dict[str, Any], list[Unit]]:
        """Quantizes the network in place; returns the measurements and the units that are in 8 bits."""
        from bertforge.model.points import share_of_work, units
        from bertforge.quantize import calibrate, fake, sensitivity

        network, rows, options, say = self.network, self.rows, self.options, self.say
        chosen = units(network.config, options.preset)
        length = float(rows.examples.lengths(rows.judged).mean())
        ranking = self.ranking

        def loop(model: Any) -> None:
            rows.logits(model, rows.calibration)

        say(f"calibrating on {len(rows.calibration):,} train rows")
        fake.insert(network, options.precision, options.preset)
        if options.smooth:
            fake.smooth(network, chosen, loop, options.smooth)
        fake.calibrate_weights(network, chosen)
        ways = calibrate.ranges(network, options.precision, chosen, options.calibration, loop)
        costs = {}
        for name, found in ways.items():
            say(f"judging {name} on {len(ranking.labels):,} validation rows")
            fake.set_activations(network, found)
            fake.quantize_only(network, chosen)
            costs[name] = ranking.cost()
        best = min(costs, key=lambda name: costs[name].divergence)
        fake.set_activations(network, ways[best])
        table = sensitivity.table(
            network, chosen, ranking, length, lambda i, n: say(f"measuring sensitivity: {i} of {n}")
        )
        frontier = []
        if options.max_drop is not None:
            frontier = sensitivity.search(
                network,
                chosen,
                (ranking, self.budget),
                length,
                options.max_drop,
                lambda i, n: say(f"ranking layers and components: {i} of {n}"),
            )
            chosen = list(frontier[-1].quantized)
            if not chosen:
                raise ArtifactError(
                    f"no part of the model in {options.precision} keeps the accuracy within {options.max_drop:.2%} of "
                    f"{len(rows.tuned):,} validation rows; raise --max-drop, or prepare more validation rows"
                )
        fake.quantize_only(network, chosen)
        measured = {
            **asdict(options),
            "calibration_rows": len(rows.calibration),
            "ranking_rows": len(ranking.labels),
            "chosen_calibration": best,
            "calibrations": {name: cost.to_dict() for name, cost in costs.items()},
            "sensitivity": [row.to_dict() for row in table],
            "frontier": [step.to_dict() for step in frontier],
            "quantized_share_of_work": share_of_work(network.config, chosen, length),
            "ptq": self.quality(),
        }
        return measured, chosen

    def fine_tune(self, tune: Tune, recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Fine-tunes the network; it is left as it was unless the validation loss falls and the budget still holds."""
        before = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        rows, most = self.rows, self.options.max_drop
        found = tune(self.network, rows.examples, rows.train, rows.tuned, recipe, folder, self.say)
        found |= self.quality() | {"tuning_drop": self.budget.cost().accuracy_drop}
        found["kept"] = found["validation_loss"] < found["validation_loss_before"] and (
            most is None or found["tuning_drop"] <= most
        )
        if not found["kept"]:
            self.network.load_state_dict(before)
        return found

    def quality(self) -> dict[str, Any]:
        """The paired comparison with the plain model, and accuracy as a share of its: `recovery`."""
        verdict = self.verdict
        self.say(f"judging on {len(verdict.labels):,} validation rows")
        compared = compare(verdict.reference, verdict.logits(), verdict.labels, names=("float32", "quantized"))
        return {**compared.to_dict(), "recovery": compared.second_accuracy / compared.first_accuracy}

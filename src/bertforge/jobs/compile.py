"""A merged or quantized model -> an engine in a folder that proves itself before it counts as built.

The engine is written, loaded again from what was written, and proved (see `proof`). It is kept when it is shown to be
the model up to what its precision does to it; otherwise nothing is left behind. Where 8 bits cost too much, the layers
that they cost most in are spared, more of them each time, until the proof holds.

Calibration reads train rows, sparing some validation rows, the proof the others, and nothing the test rows.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from bertforge.artifact import fresh_directory, versions
from bertforge.data.loader import spread
from bertforge.data.prepared import PreparedData
from bertforge.engines.base import Order, Rows, Target
from bertforge.engines.fastest import Candidate, fastest
from bertforge.engines.measure import throughput
from bertforge.engines.registry import TARGETS, check_target
from bertforge.errors import ArtifactError, MachineError, UsageError
from bertforge.evaluation.logits import predict_logits
from bertforge.hardware import Hardware, detect
from bertforge.inference.predictor import Predictor, check_merged, plain_model
from bertforge.locks import locked
from bertforge.manifest import (
    MANIFEST,
    amend_manifest,
    carried,
    compile_command,
    identity,
    peek_manifest,
    read_manifest,
    weights_of,
    write_manifest,
)
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.model.points import Unit, linears
from bertforge.proof.gate import PROOF, PrecisionError, Reference, prove
from bertforge.proof.golden import GoldenRows
from bertforge.proof.rows import RANKING_ROWS, calibrating, check_classes, proving, tuning
from bertforge.proof.simulation import layers_of, rounded, row_shifts, shifts_alone
from bertforge.scales import FORMATS, SCALES, Scales

TIMED_ROWS, REPEATS = 200, 3
Say = Callable[[str], object]


@dataclass(frozen=True)
class _Source:
    """What an engine is built from."""

    model: Path
    predictor: Predictor
    prepared: PreparedData | None
    say: Say
    until: float = math.inf
    """By the monotonic clock: no more rows are asked after it, where those that were cannot tell."""
    known: dict[int, np.ndarray] = field(default_factory=dict)
    """The model's logits of the first rows that prove, by their number: for the next engine too."""
    found: dict[str, Scales] = field(default_factory=dict)
    """Ranges that were found for an engine, by their format: for the next one too."""

    @classmethod
    def open(cls, model: Path, data: Path | None, say: Say, seconds: float = math.inf) -> Self:
        """Raises ArtifactError for a run with adapters, DataError for other data than the model's."""
        manifest = read_manifest(model, "run", "model", "quantized")
        check_merged(model)
        prepared = None if data is None else PreparedData.of(data, model, manifest)
        say("loading the model")
        return cls(model, Predictor.load(model, "fp32"), prepared, say, time.monotonic() + seconds)

    @cached_property
    def scales(self) -> Scales | None:
        """Of a quantized model."""
        return Scales.load(self.model) if self.predictor.manifest["kind"] == "quantized" else None

    @cached_property
    def network(self) -> BertForSequenceClassification:
        """The plain model, without simulated quantization."""
        if self.scales is None:
            return plain_model(self.predictor)
        return BertForSequenceClassification.from_pretrained(self.model).eval()

    def part(self, part: str) -> np.ndarray:
        """Row numbers of a part of the data."""
        assert self.prepared is not None
        return self.prepared.rows(self.predictor.manifest["recipe"]["split"], part)

    def rows(self, rows: np.ndarray) -> Rows:
        """With what the model reads of them."""
        assert self.prepared is not None
        return Rows(self.predictor.examples(self.prepared, rows), rows)

    def ranges(self, form: str) -> Scales:
        """Of int8 or fp8, from train rows of more than one class."""
        from bertforge.quantize.ranges import find_ranges

        if form in self.found:
            return self.found[form]
        train, tuned = calibrating(self.part("train")), self.tuning
        examples = self.rows(np.concatenate([train, tuned])).examples
        check_classes(examples.labels[train])
        self.say(f"finding ranges on {len(train)} train rows")
        self.found[form] = find_ranges(self.network, form, examples, train, tuned)
        return self.found[form]

    def scales_for(self, kind: Target, precision: str) -> Scales | None:
        """The 8-bit ranges that stand in the graph of an engine."""
        if precision not in FORMATS:
            return None
        return self.scales or (None if kind.dynamic else self.ranges(precision))

    @property
    def tuning(self) -> np.ndarray:
        """Rows that choose alphas and layers to spare, few enough to ask them often."""
        return spread(tuning(self.part("validation")), RANKING_ROWS)

    @cached_property
    def proof(self) -> Rows | None:
        """Rows that choose nothing."""
        return None if self.prepared is None else self.rows(proving(self.part("validation")))

    def spare(self, precision: str, layers: list[str], share: float) -> dict[Unit, float]:
        """The parts of the encoder to take out of 8 bits, with what each alone costs, so that in simulation on the rows
        that tune no more than a share of the whole shift is left; those that cost most, as few as do."""
        tuned = self.rows(self.tuning)
        self.say(f"measuring on {len(tuned)} validation rows where 8 bits cost most")
        found = shifts_alone(self.network, precision, tuned.examples, tuned.rows, layers)
        ranked = sorted(found, key=lambda unit: -found[unit])
        plain = predict_logits(self.network, tuned.examples, tuned.rows, "fp32")

        def left(count: int) -> float:
            out = linears(ranked[:count])
            with rounded(self.network, precision, [name for name in layers if name not in out]):
                logits = predict_logits(self.network, tuned.examples, tuned.rows, "fp32")
            return float(row_shifts(plain, logits).mean())

        whole = left(0)
        count = next((count for count in range(1, len(ranked)) if left(count) <= share * whole), len(ranked))
        return {unit: found[unit] for unit in ranked[:count]}

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every train row, as the model reads it."""
        return self.rows(np.zeros(0, np.int64)).examples.lengths(self.part("train"))

    def reference(self, kind: Target, precision: str, scales: Scales | None, spared: Collection[Unit]) -> Reference:
        """What an engine is held against."""
        layers = layers_of(self.network, scales) if precision in FORMATS else []
        return Reference(
            model=self.network,
            golden=GoldenRows.from_dict(self.predictor.manifest["golden"]),
            precision=precision,
            rest=kind.rest(detect()) if precision in FORMATS else precision,
            layers=tuple(name for name in layers if name not in linears(spared)),
            scales=scales,
            stores=kind.stores,
            known=self.known,
        )


def compile_model(
    model: Path,
    target: str,
    precision: str,
    data: Path | None,
    out: Path,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Builds an engine in `out` and returns its receipt; `say` is told each stage as it begins.

    Where nothing here runs what was built, `verified` is false in the receipt, `not_verified` says why, and nothing
    serves the engine until `verify_engine` has proved it. Raises ArtifactError for a run with adapters and for an
    engine that does not compute what the model does, UsageError for INT8 without data, DataError for other data than
    the model's.
    """
    hardware = detect()
    kind = check_target(target, precision, hardware)
    _check_precision(model, kind, precision, data)
    with locked(out):
        return _compile(_Source.open(model, data, say), kind, precision, out, hardware)


def _compile(source: _Source, kind: Target, precision: str, out: Path, hardware: Hardware) -> dict[str, Any]:
    """See `compile_model`."""
    target, reason = kind.name, kind.unfit(hardware)
    if reason and kind.builds_where_it_runs:
        anywhere = [name for name, other in TARGETS.items() if other.compiles_at_load]
        raise MachineError(
            f"{target} builds an engine where it will run, but {reason}; run this command there, or take "
            f"--target {anywhere[0]}, which builds anywhere"
        )
    renewable = kind.renewable and (out / MANIFEST).is_file() and peek_manifest(out, "engine")["target"] == target
    start = time.monotonic()
    with fresh_directory(out, replace=renewable) as folder:
        built, spared = _build(source, kind, precision, folder, out, hardware, prove_it=reason is None)
        receipt = {
            "target": target,
            "precision": precision,
            "device": hardware.name,
            "build_seconds": round(time.monotonic() - start, 1),
            "bytes": sum(path.stat().st_size for path in folder.iterdir()),
            "versions": versions(*kind.libraries),
            "spared": [asdict(unit) | {"shift": shift} for unit, shift in spared.items()],
            **({"verified": True} if reason is None else {"verified": False, "not_verified": reason}),
            **built,
        }
        model = source.predictor.manifest
        kept = {**carried(model), "golden": model["golden"]}
        source.predictor.tokenizer.save(folder, source.predictor.max_length)
        of = {"parent": identity(source.model), "weights": weights_of(model)}
        write_manifest(folder, "engine", leave_out=kind.changing, **receipt, **of, **kept)
    return receipt


def _build(
    source: _Source,
    kind: Target,
    precision: str,
    folder: Path,
    older: Path,
    hardware: Hardware,
    *,
    prove_it: bool,
) -> tuple[dict[str, Any], dict[Unit, float]]:
    """Builds in `folder` and proves; where 8 bits cost too much, spares what costs half of it and builds again.

    Returns what the receipt says of the build and the proof, and the parts that were spared, with what each cost.
    """
    whole, share = source.scales_for(kind, precision), 1.0
    spared: dict[Unit, float] = {}
    while True:
        scales = whole and whole.without([point for unit in spared for point in unit.points])
        order = Order(
            precision=precision,
            model=source.network,
            longest=source.predictor.max_length,
            scales=scales,
            spared=tuple(linears(spared)),
            lengths=None if source.prepared is None else source.lengths,
            older=older,
            say=source.say,
        )
        built = kind.build(folder, order, hardware)
        if scales:
            scales.save(folder)  # whoever proves the engine again needs them
        if not prove_it:
            return built, spared
        try:
            return built | _proof(source, kind, folder, source.reference(kind, precision, scales, spared)), spared
        except PrecisionError as error:
            if precision not in FORMATS or source.prepared is None:
                hint = "with --data DIR, layers can be spared" if precision in FORMATS else "take another --precision"
                raise ArtifactError(f"{error}; nothing was written; {hint}") from error
            layers, share = layers_of(source.network, whole), share / 2
            spared = source.spare(precision, layers, share)
            if set(layers) <= set(linears(spared)):
                raise ArtifactError(f"{error}; no layer is left to spare, and nothing was written") from error
            source.say(f"{error}; sparing {', '.join(map(str, spared))}")
        except ArtifactError as error:
            raise ArtifactError(f"{error}; nothing was written") from error
        for path in folder.iterdir():
            path.unlink()


def _proof(source: _Source, kind: Target, folder: Path, reference: Reference) -> dict[str, Any]:
    """See `prove`; of the engine in `folder`."""
    source.say("proving that it computes what the model does")
    with ExitStack() as stack:
        opened = []
        for way in (kind.open, kind.exact):
            if (engine := way(folder, reference.precision, detect())) is not None:
                stack.callback(engine.close)
            opened.append(engine)
        engine, exact = opened
        assert engine is not None
        return prove(reference, engine, exact, source.proof, source.say, source.until)


def verify_engine(model: Path, engine: Path, data: Path | None, say: Say = lambda text: None) -> dict[str, Any]:
    """Proves an engine that was built where nothing could run it, and returns its receipt, which now says so.

    Raises ArtifactError for an engine of another model and for one that does not compute what the model does, which is
    not served from then on, whatever was shown before; MachineError where it cannot run.
    """
    with locked(engine):
        return _verify(model, engine, data, say)


def _verify(model: Path, engine: Path, data: Path | None, say: Say) -> dict[str, Any]:
    manifest = read_manifest(engine, "engine")
    target, precision = manifest["target"], manifest["precision"]
    again = compile_command(engine, target, precision)
    if manifest["parent"] != identity(model):
        raise ArtifactError(
            f"{engine} was compiled from other weights than those of {model}; compile it again: {again}"
        )
    hardware = detect()
    kind = check_target(target, precision, hardware)
    if reason := kind.unfit(hardware):
        raise MachineError(f"{engine} cannot run here: {reason}")
    source = _Source.open(model, data, say)
    scales = Scales.load(engine) if (engine / SCALES).is_file() else None
    spared = [Unit(unit["layer"], unit["component"]) for unit in manifest["spared"]]
    kept = {name: value for name, value in manifest.items() if name not in PROOF}
    try:
        proof = _proof(source, kind, engine, source.reference(kind, precision, scales, spared))
    except ArtifactError as error:
        amend_manifest(engine, kept | {"verified": False, "not_verified": str(error)})
        raise
    of = {"weights": weights_of(source.predictor.manifest)}  # which an older version did not tell
    verified = kept | {"verified": True, "device": hardware.name, **of, **proof}
    amend_manifest(engine, verified)
    return verified


def compile_fastest(
    model: Path, wanted: Sequence[Candidate], data: Path, out: Path, say: Say, seconds: float = math.inf
) -> list[Candidate]:
    """Builds and times `wanted`, keeps the fastest that proved itself as `out`; returns all, the kept one first.

    See `fastest`. Raises what is wrong with the model or the data before anything is written.
    """
    hardware = detect()
    with fresh_directory(out) as folder:
        source = _Source.open(model, data, say, seconds)
        source.rows(np.zeros(0, np.int64))  # which refuses data with other labels

        def attempt(candidate: Candidate) -> Candidate:
            place, precision = folder / candidate.name, candidate.precision
            kind = check_target(candidate.target, precision, hardware)
            _check_precision(model, kind, precision, data)
            receipt = _compile(source, kind, precision, place, hardware)
            return replace(candidate, questions_per_s=_timed(place, data, say), receipt=receipt)

        tried = fastest(list(wanted), attempt, say, seconds)
        for path in (folder / tried[0].name).iterdir():
            path.rename(folder / path.name)
        for candidate in tried:
            shutil.rmtree(folder / candidate.name, ignore_errors=True)
    return tried


def _timed(folder: Path, data: Path, say: Say) -> float:
    """Questions a second of the engine in `folder` on validation rows."""
    predictor = Predictor.load(folder)  # which refuses an engine that this machine can build but not run
    with closing(predictor.engine) as engine:
        prepared = PreparedData.open(data)
        rows = spread(prepared.rows(predictor.manifest["recipe"]["split"], "validation"), TIMED_ROWS)
        say(f"timing {len(rows)} validation rows")
        return throughput(engine, predictor.examples(prepared, rows), rows, engine.shape, REPEATS).median


def default_folder(model: Path, target: str, precision: str) -> Path:
    """Where an engine of `model` lies unless told otherwise."""
    return model / "engines" / f"{target}-{precision}"


def _check_precision(model: Path, kind: Target, precision: str, data: Path | None) -> None:
    """Raises UsageError when `precision` is not to be had from what is given."""
    if read_manifest(model, "run", "model", "quantized")["kind"] == "quantized":
        if precision in FORMATS and precision != (form := Scales.load(model).format):
            raise UsageError(f"{model} was quantized to {form}, not to {precision}; --precision {form}")
    elif precision in FORMATS and precision not in kind.calibrates:
        raise UsageError(
            f"{kind.name} takes {precision} from a quantized model: "
            f"bertforge quantize {model} --precision {precision} --data DIR --out Q, then compile Q"
        )
    elif precision in FORMATS and data is None:
        raise UsageError(f"{precision} is calibrated on train rows; say where they are: --data DIR")

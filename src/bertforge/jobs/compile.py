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
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from bertforge.artifact import (
    MANIFEST,
    compile_command,
    fresh_directory,
    hash_file,
    read_manifest,
    versions,
    write_json,
    write_manifest,
)
from bertforge.data.loader import Examples, spread
from bertforge.data.prepared import PreparedData
from bertforge.engines.base import Order, Rows, Target
from bertforge.engines.fastest import Candidate, fastest
from bertforge.engines.measure import throughput
from bertforge.engines.registry import TARGETS, check_target
from bertforge.engines.run import run
from bertforge.errors import ArtifactError, MachineError, UsageError
from bertforge.hardware import Hardware, detect
from bertforge.inference.predictor import Predictor, check_merged, plain_model
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.model.points import Unit, linears
from bertforge.proof.gate import PrecisionError, Reference, prove
from bertforge.proof.golden import GoldenRows
from bertforge.proof.rows import calibrating, check_classes, proving, tuning
from bertforge.proof.simulation import costs, layers_of
from bertforge.scales import FORMATS, SCALES, Scales

TIMED_ROWS, REPEATS = 200, 3
TUNING_ROWS = 250
_KEPT = ("recipe", "labels", "schema", "tabular", "data", "base", "temperature", "golden")
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

    @classmethod
    def open(cls, model: Path, data: Path | None, say: Say, seconds: float = math.inf) -> Self:
        """Raises ArtifactError for a run with adapters, DataError for other data than the model's."""
        manifest = read_manifest(model, "run", "model", "quantized")
        check_merged(model)
        say("loading the model")
        prepared = None if data is None else PreparedData.of(data, model, manifest)
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

    @cached_property
    def ranges(self) -> Scales:
        """Of INT8, from train rows of more than one class."""
        from bertforge.quantize.ranges import find_ranges

        train, tuned = calibrating(self.part("train")), self.tuning
        examples = self.rows(np.concatenate([train, tuned])).examples
        check_classes(examples.labels[train])
        self.say(f"finding ranges on {len(train)} train rows")
        return find_ranges(self.network, examples, train, tuned)

    def scales_for(self, kind: Target, precision: str) -> Scales | None:
        """The 8-bit ranges that stand in the graph of an engine."""
        if precision not in FORMATS:
            return None
        return self.scales or (None if kind.dynamic else self.ranges)

    @property
    def tuning(self) -> np.ndarray:
        """Rows that choose alphas and layers to spare, few enough to ask them often."""
        return spread(tuning(self.part("validation")), TUNING_ROWS)

    @cached_property
    def proof(self) -> Rows | None:
        """Rows that choose nothing."""
        return None if self.prepared is None else self.rows(proving(self.part("validation")))

    def costliest(self, precision: str, scales: Scales | None) -> list[Unit]:
        """The parts of the encoder in 8 bits, that which costs most on the rows that tune first."""
        rows = self.rows(self.tuning)
        self.say(f"measuring on {len(rows)} validation rows where 8 bits cost most")
        found = costs(self.network, precision, rows.examples, rows.rows, scales)
        return sorted(found, key=lambda unit: -found[unit])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every train row, as the model reads it."""
        return self.rows(np.zeros(0, np.int64)).examples.lengths(self.part("train"))

    def reference(self, precision: str, scales: Scales | None, spared: list[Unit]) -> Reference:
        """What an engine with these ranges in its graph is held against."""
        layers = [name for name in layers_of(self.network, scales) if name not in linears(spared)]
        golden = GoldenRows.from_dict(self.predictor.manifest["golden"])
        simulation = None
        if scales and set(scales.activations) - set(layers_of(self.network, scales)):  # attention's products too

            def simulation(examples: Examples, rows: np.ndarray) -> np.ndarray:
                return run(self.predictor.engine, examples, rows)

        return Reference(self.network, golden, precision, tuple(layers), scales, simulation, self.known)


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
    renewable = kind.renewable and (out / MANIFEST).is_file() and read_manifest(out, "engine")["target"] == target
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
            # Some files change as the engine is used.
            "hashes": {
                path.name: hash_file(path) for path in sorted(folder.iterdir()) if path.name not in kind.changing
            },
            "spared": [asdict(unit) for unit in spared],
            **({"verified": True} if reason is None else {"verified": False, "not_verified": reason}),
            **built,
        }
        kept = {name: source.predictor.manifest[name] for name in _KEPT if name in source.predictor.manifest}
        source.predictor.tokenizer.save(folder, source.predictor.max_length)
        write_manifest(folder, "engine", **receipt, parent=hash_file(source.model / MANIFEST), **kept)
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
) -> tuple[dict[str, Any], list[Unit]]:
    """Builds in `folder` and proves; where 8 bits cost too much, spares twice as many parts and builds again.

    Returns what the receipt says of the build and the proof, and the parts that were spared.
    """
    whole = source.scales_for(kind, precision)
    ranked: list[Unit] | None = None
    spared: list[Unit] = []
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
        source.say("proving that it computes what the model does")
        try:
            with closing(kind.open(folder, precision, hardware)) as engine:
                exact = kind.exact(folder, precision, hardware)
                reference = source.reference(precision, scales, spared)
                proof = prove(reference, engine, exact, source.proof, source.say, source.until)
                return built | proof, spared
        except PrecisionError as error:
            if precision not in FORMATS or source.prepared is None:
                raise ArtifactError(f"{error}; nothing was written") from error
            ranked = source.costliest(precision, whole) if ranked is None else ranked
            if (count := max(1, 2 * len(spared))) >= len(ranked):
                raise ArtifactError(f"{error}, with {len(spared)} parts spared; nothing was written") from error
            source.say(f"{error}; sparing {', '.join(map(str, ranked[len(spared) : count]))}")
            spared = ranked[:count]
        except ArtifactError as error:
            raise ArtifactError(f"{error}; nothing was written") from error
        for path in folder.iterdir():
            path.unlink()


def verify_engine(model: Path, engine: Path, data: Path | None, say: Say = lambda text: None) -> dict[str, Any]:
    """Proves an engine that was built where nothing could run it, and returns its receipt, which now says so.

    Raises ArtifactError for an engine of another model and for one that does not compute what the model does, which is
    not served from then on, whatever was shown before; MachineError where it cannot run.
    """
    manifest = read_manifest(engine, "engine")
    target, precision = manifest["target"], manifest["precision"]
    again = compile_command(engine, target, precision)
    if manifest["parent"] != hash_file(model / MANIFEST):
        raise ArtifactError(
            f"{engine} was compiled from other weights than those of {model}; compile it again: {again}"
        )
    hardware = detect()
    kind = check_target(target, precision, hardware)
    source = _Source.open(model, data, say)
    scales = Scales.load(engine) if (engine / SCALES).is_file() else None
    if "spared" not in manifest or (precision in FORMATS and scales is None and not kind.dynamic):
        raise ArtifactError(
            f"{engine} was compiled by an earlier bertforge and lacks what proves it; compile it again: {again}"
        )
    with closing(kind.open(engine, precision, hardware)) as opened:
        try:
            exact = kind.exact(engine, precision, hardware)
            reference = source.reference(precision, scales, [Unit(**unit) for unit in manifest["spared"]])
            proof = prove(reference, opened, exact, source.proof, say, source.until)
        except ArtifactError as error:
            write_json(engine / MANIFEST, manifest | {"verified": False, "not_verified": str(error)})
            raise
    manifest.pop("not_verified", None)
    manifest |= {"verified": True, "device": hardware.name, **proof}
    write_json(engine / MANIFEST, manifest)
    return manifest


def compile_fastest(
    model: Path, wanted: Sequence[Candidate], data: Path, out: Path, say: Say, seconds: float = math.inf
) -> list[Candidate]:
    """Builds and times `wanted`, keeps the fastest that proved itself as `out`; returns all, the kept one first.

    See `fastest`. Raises what is wrong with the model or the data before anything is written.
    """
    hardware = detect()
    source = _Source.open(model, data, say, seconds)
    source.rows(np.zeros(0, np.int64))  # which refuses data with other labels
    with fresh_directory(out) as folder:

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
    elif precision == "fp8" or (precision == "int8" and not kind.calibrates):
        raise UsageError(
            f"{kind.name} takes {precision} from a quantized model: "
            f"bertforge quantize {model} --precision {precision} --data DIR --out Q, then compile Q"
        )
    elif precision == "int8" and data is None:
        raise UsageError("int8 is calibrated on train rows; say where they are: --data DIR")

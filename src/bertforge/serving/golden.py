"""Golden rows through a loaded engine, exactly as requests go: nothing is served that does not give what was proved.

`Predictor.load` checks a folder's files, and a model's logits in float32. What serves is the engine, in its precision,
behind the tokenizer, the columns, the frames and the queue; so the rows take that way, as they stood in the table, each
by itself and then all at once.

How far logits may lie from the model's own is what the proof allows (`proof.tolerances`): in float32 what another order
of sums does; for an engine what its receipt says of these rows, in simulation or when it was proved; for a model that
is computed in bfloat16 what bfloat16 does to it in simulation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bertforge.errors import ArtifactError
from bertforge.inference.codec import Codec
from bertforge.inference.predictor import load_model, plain
from bertforge.manifest import remake
from bertforge.proof.gate import Reference, Shift
from bertforge.proof.golden import GoldenRows
from bertforge.proof.simulation import row_shifts
from bertforge.proof.tolerances import SAVED, SHIFT_FLOOR, SHIFT_RATIO, WORST_FLOOR, WORST_RATIO
from bertforge.serving.channel import Ask, Frames, frame


def replay(folder: Path, codec: Codec, precision: str, ask: Callable[[Ask], np.ndarray]) -> None:
    """Raises ArtifactError when `ask`, which gives logits `[rows, labels]`, does not give what the folder's model does.

    The message names the difference and how to make the folder again.
    """
    wanted = GoldenRows.from_dict(codec.manifest["golden"]).logits
    each, together = _asks(codec)
    for found in (np.concatenate([ask(row) for row in each]), ask(together)):
        if told := _mismatch(folder, codec.manifest, precision, wanted, found):
            again = remake(folder, codec.manifest["kind"], codec.manifest)
            raise ArtifactError(f"{folder} does not compute what it did when it was saved: {told}; {again}")


def _asks(codec: Codec) -> tuple[list[Ask], Ask]:
    """Each row by itself, and all of them at once."""
    given = codec.read(pd.DataFrame(codec.manifest["inputs"]))
    ids, offsets = codec.tokenizer.encode(given.texts)
    columns, lengths = codec.arrays(given.columns), np.diff(offsets)

    def ask(part: slice) -> Ask:
        tokens = ids[offsets[part.start] : offsets[part.stop]]
        own = None if columns is None else {name: array[part] for name, array in columns.items()}
        (read,) = Frames().read(frame(Ask(0, "", "", "golden rows", tokens, lengths[part], own)))
        assert isinstance(read, Ask)
        return read

    rows = len(lengths)
    return [ask(slice(row, row + 1)) for row in range(rows)], ask(slice(0, rows))


def _mismatch(
    folder: Path, manifest: dict[str, Any], precision: str, wanted: np.ndarray, found: np.ndarray
) -> str | None:
    """What is wrong with the logits `found`; None when nothing is."""
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return (
            f"logits of its golden rows are {found.shape}, with {int((~np.isfinite(found)).sum())} that are no number"
        )
    if manifest["kind"] != "engine" and precision == "fp32":
        off = float(np.abs(found - wanted).max())
        return f"logits differ by {off:.3g} on its golden rows, more than {SAVED:g}" if off > SAVED else None
    shifts = row_shifts(wanted, found)
    if manifest["kind"] != "engine":
        moved = Shift.of(shifts, row_shifts(wanted, _simulated(folder, manifest, precision)))
        return None if moved.holds else str(moved)
    mean, worst = float(shifts.mean()), float(shifts.max())
    proved = [manifest[name] for name in ("golden_shift", "crowd_shift")]
    most_mean = max(max(SHIFT_RATIO * shift["simulated"], shift["found"]) for shift in proved) + SHIFT_FLOOR
    most_worst = max(max(WORST_RATIO * shift["worst_simulated"], shift["worst"]) for shift in proved) + WORST_FLOOR
    if mean <= most_mean and worst <= most_worst:
        return None
    return (
        f"probabilities of its golden rows move by {mean:.4f} on average and {worst:.4f} at most, "
        f"more than {most_mean:.4f} or {most_worst:.4f}"
    )


def _simulated(folder: Path, manifest: dict[str, Any], precision: str) -> np.ndarray:
    model, golden = plain(load_model(folder, manifest)), GoldenRows.from_dict(manifest["golden"])
    return Reference(model, golden, precision, precision).simulated(golden.examples, np.arange(len(golden.logits)))

"""AutoGluon in a process of its own, for it needs other versions of pandas and numpy: `table_systems.py` starts it.

    python autogluon_peer.py FOLDER SECONDS

FOLDER has `train.parquet`, `validation.parquet` and `test.parquet`, each with the table's columns and the numbered
`label`. TabularPredictor's defaults learn from the first and choose by the second. Probabilities `[rows, labels]` are
left beside them, as `validation.npy` and `test.npy`, and the version in `version`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd


def main() -> None:
    """Fits and answers."""
    import autogluon.tabular as autogluon

    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    tables = {part: pd.read_parquet(folder / f"{part}.parquet") for part in ("train", "validation", "test")}
    predictor = autogluon.TabularPredictor(label="label", path=str(folder / "models"), verbosity=1)
    predictor.fit(tables["train"], tuning_data=tables["validation"], time_limit=seconds)
    for part in ("validation", "test"):
        chances = predictor.predict_proba(tables[part].drop(columns="label"))
        np.save(folder / f"{part}.npy", chances[sorted(chances.columns)].to_numpy())
    (folder / "version").write_text(autogluon.__version__)


if __name__ == "__main__":
    main()

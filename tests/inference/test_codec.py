import subprocess
import sys

import numpy as np
import torch

from bertforge.inference.codec import Codec
from bertforge.manifest import served

PROGRAM = """
import sys
from pathlib import Path
import pandas as pd
from bertforge.inference.codec import Codec
from bertforge.manifest import served
codec = Codec.load(*served(Path(sys.argv[1])))
given = codec.read(pd.DataFrame(codec.manifest["inputs"]))
codec.tokenizer.encode(given.texts)
print(sorted(codec.arrays(given.columns)), "torch" in sys.modules)
import bertforge.columns.parts
print("torch" in sys.modules)
"""


def test_rows_are_read_without_torch(runs):
    command = [sys.executable, "-c", PROGRAM, str(runs["columns"])]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.split("\n")[:2] == ["['categorical', 'multi', 'numeric'] False", "True"]


def test_probabilities_are_the_softmax_of_scaled_logits(runs):
    codec = Codec.load(*served(runs["full"]))
    logits = np.array([[1.5, -2.0], [800.0, -800.0], [0.0, 0.0]], np.float32)
    found = codec.probabilities(["a", "b", " \n"], logits)
    expected = (torch.from_numpy(logits) / codec.temperature).softmax(1).numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:2], expected[:2], rtol=1e-6)
    assert np.isnan(found[2]).all(), "a row without text"

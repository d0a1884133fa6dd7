import subprocess
import sys

import numpy as np
import torch

from bertforge.inference.codec import Codec, served

PROGRAM = """
import sys
from pathlib import Path
from bertforge.inference.codec import Codec, served
codec = Codec.load(*served(Path(sys.argv[1])))
codec.arrays(codec.read(["How do I sort a list?"]).columns) if codec.transform is None else None
print("torch" in sys.modules)
"""


def loads_torch(folder) -> bool:
    found = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, check=True)
    return {"True": True, "False": False}[found.stdout.strip()]


def test_rows_of_text_are_read_without_torch(runs):
    assert not loads_torch(runs["full"])
    assert loads_torch(runs["columns"]), "or this test sees nothing"


def test_probabilities_are_the_softmax_of_scaled_logits(runs):
    codec = Codec.load(*served(runs["full"]))
    logits = np.array([[1.5, -2.0], [800.0, -800.0], [0.0, 0.0]], np.float32)
    found = codec.probabilities(["a", "b", " \n"], logits)
    expected = (torch.from_numpy(logits) / codec.temperature).softmax(1).numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:2], expected[:2], rtol=1e-6)
    assert np.isnan(found[2]).all(), "a row without text"

"""Memory is counted from a mark on, and by the same reader whoever asks."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from bertforge.peak_memory import PeakMemory, resident_gb

CPU = torch.device("cpu")


def test_the_peak_is_that_since_the_mark():
    first = PeakMemory(CPU)
    if (low := first.gb()) is None:
        pytest.skip("this system does not tell")
    np.ones(300_000_000, dtype=np.uint8)
    assert first.gb() > low + 0.25
    assert first.gb() == first.taken_gb() == resident_gb()
    assert PeakMemory(CPU).gb() < low + 0.15


def test_a_process_without_torch_is_read_without_it():
    program = "import sys, bertforge.peak_memory as m; print(m.resident_gb() or 0.02, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    held, with_torch = done.stdout.split()
    assert 0.005 < float(held) < 0.1, "a bare Python"
    assert with_torch == "False"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_tells_what_tensors_took_and_what_the_process_did():
    memory = PeakMemory(torch.device("cuda", 0))
    torch.ones(300_000_000, dtype=torch.uint8, device="cuda")
    assert 0.29 < memory.gb() < 0.31
    assert 0.29 < memory.taken_gb() < 1

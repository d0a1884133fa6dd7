"""Right rounding to e4m3 in Triton's interpreter (3.9), whose own loses the carry: it makes 2.0 of 3.99."""

import numpy as np
import torch


def round_as_hardware_does(monkeypatch):
    """For a fixture of tests that may run in the interpreter; where kernels are compiled it changes nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    own = interpreter._convert_float

    def convert(data, source, target, mode):
        if target != tl.float8e4nv:
            return own(data, source, target, mode)
        exact = np.ascontiguousarray(data).view(np.float32)
        # Hardware and torch round to even; beyond the range Triton's code for Hopper gives 448, torch's may give NaN.
        return torch.from_numpy(exact).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)

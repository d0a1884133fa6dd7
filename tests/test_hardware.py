"""What the machine can do decides the precision, unless one is asked for."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bertforge import hardware as module
from bertforge.errors import MachineError, UsageError
from bertforge.hardware import (
    Hardware,
    autocast,
    choose_precision,
    choose_training_precision,
    detect,
    free_host_bytes,
)

PLAIN = Hardware(torch.device("cpu"), "Plain CPU", memory_gb=8.0, cores=2, bf16=False)
GPU = replace(PLAIN, device=torch.device("cuda"), bf16=True)


def test_this_machine_is_described():
    found = detect()
    assert found.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found.name
    assert found.memory_gb > 0.1
    assert found.cores >= 1


def test_instructions_that_onednn_may_not_use_are_not_there():
    program = "from bertforge.hardware import detect; print(detect().bf16)"
    without = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run([sys.executable, "-c", program], env=without, capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_free_memory_is_some_of_what_there_is():
    assert 0 < free_host_bytes() <= module._host_memory_gb() * 1e9


def test_what_is_asked_for_is_what_is_chosen():
    assert choose_precision(GPU, "fp32") == "fp32"
    assert choose_precision(GPU, "bf16") == "bf16"
    with pytest.raises(MachineError, match="Plain CPU has no bfloat16 arithmetic; set precision=fp32"):
        choose_precision(PLAIN, "bf16")


def test_auto_takes_bf16_where_it_is_in_hardware_and_on_a_cpu_only_when_it_is_faster(monkeypatch):
    assert choose_precision(PLAIN) == "fp32"
    assert choose_precision(GPU) == "bf16"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for bf16_seconds, chosen in ((1.0, "bf16"), (3.0, "fp32")):
        seconds = {"fp32": 2.0, "bf16": bf16_seconds}
        monkeypatch.setattr(
            module, "product_seconds", lambda device, precision, *rest, seconds=seconds: seconds[precision]
        )
        assert choose_precision(replace(PLAIN, bf16=True)) == chosen
    # Slower at this moment, as on a busy machine: with tile registers nothing is timed.
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert choose_precision(replace(PLAIN, bf16=True)) == "bf16"
    with pytest.raises(UsageError, match="precision=fp8 is not one of auto, fp32, bf16"):
        choose_precision(GPU, "fp8")


def test_training_may_ask_for_fp8_where_it_is_in_hardware():
    for capability in ((8, 9), (9, 0), (12, 0)):
        assert choose_training_precision(replace(GPU, capability=capability), "fp8") == "fp8"
    for machine in (PLAIN, replace(GPU, name="NVIDIA A100", capability=(8, 0))):
        with pytest.raises(MachineError, match=f"precision=fp8, but {machine.name} has no FP8 .*; set precision=auto"):
            choose_training_precision(machine, "fp8")
    assert choose_training_precision(GPU) == "bf16", "never on its own"
    assert choose_training_precision(PLAIN, "fp32") == "fp32"


def test_autocast_computes_in_the_precision_and_leaves_weights_alone():
    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp8", torch.bfloat16), ("fp32", torch.float32)):
        with autocast(torch.device("cpu"), precision):
            assert layer(x).dtype == dtype
    assert layer.weight.dtype == torch.float32


def test_each_process_of_torchrun_takes_the_gpu_of_its_number(monkeypatch):
    assert module._local_gpu(8) == 0
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert module._local_gpu(4) == 3
    with pytest.raises(MachineError, match="4 processes on this machine, but 2 GPUs; torchrun --nproc-per-node 2"):
        module._local_gpu(2)

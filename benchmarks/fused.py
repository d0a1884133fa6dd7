"""Fused kernels on a GPU beside the same written with PyTorch's operators, in bfloat16.

    python benchmarks/fused.py [--tokens 32768] [--json FILE]

`norm` is LayerNorm(residual + dropout(x)), its weights frozen as LoRA has them, or trained. `gelu` is the first half of
a feed-forward, GELU(x W' + b), whose backward pass is the product with the second half's weight times GELU's slope.
`adapt` is W + s B A for query and value. Time is that of all layers of a model; a graph of calls is replayed, so
launching is left out. The ceiling is a device-to-device copy of the bytes a pass must move for `norm`, a product of
8,192-cubed matrices for `gelu`, both measured in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bertforge.artifact import write_json
from bertforge.benchmark.roofline import product_rate
from bertforge.hardware import detect
from bertforge.kernels.layer_norm_triton import Norm, residual_layer_norm, residual_layer_norm_backward
from bertforge.kernels.linear_gelu_triton import linear_gelu, linear_gelu_backward
from bertforge.kernels.low_rank_triton import AdaptedWeight
from gpu_time import attempt
from record import record

SEED = 42
MODELS = {"bert-base": (12, 768), "minilm": (6, 384)}  # layers, hidden
DROPOUT = 0.1
BOTH = "forward + backward"
Calls = dict[tuple[str, str, str], Callable[[], Any]]  # kernel, pass, system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768, help="tokens a pack")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    copied, flops = attempt("copy", lambda: target.copy_(source)), product_rate(detect(), "bf16")
    if copied is None or flops is None:
        raise SystemExit("the ceilings could not be measured")
    bytes_per_s = 2 * source.nbytes / copied
    rows: list[dict[str, Any]] = []
    for model, (layers, hidden) in MODELS.items():
        for (kernel, name, system), call in calls(args.tokens, hidden).items():
            time_s = attempt(f"{model} {kernel} {name} {system}", call)
            if time_s is None:
                continue
            row = {"model": model, "tokens": args.tokens, "kernel": kernel, "pass": name, "system": system}
            row["us_all_layers"] = time_s * 1e6 * layers * (1 if kernel == "gelu" else 2)
            if kernel == "gelu":
                row["share_of_ceiling"] = 2 * args.tokens * 4 * hidden**2 / time_s / flops
            elif kernel.startswith("norm"):
                moved = 2 * hidden * args.tokens * (3 if name == "forward" else 7)
                row["share_of_ceiling"] = moved / time_s / bytes_per_s
            rows.append(row)
    if args.json:
        frame = record("fused", rows, SEED, "triton")
        write_json(args.json, frame | {"copy_tb_per_s": bytes_per_s * 1e-12, "product_tflops": flops * 1e-12})


def calls(tokens: int, hidden: int) -> Calls:
    """What is timed."""
    x, residual, grad = (torch.randn(tokens, hidden, device="cuda").bfloat16() for _ in range(3))
    return norms(x, residual, grad) | gelus(x, grad) | adapters(hidden)


def norms(x: Tensor, residual: Tensor, grad: Tensor) -> Calls:
    """Frozen and trained; backward beside forward, as a graph records them."""
    weight, bias = torch.ones(x.shape[1], device="cuda"), torch.zeros(x.shape[1], device="cuda")
    seed = torch.ones(1, dtype=torch.int32, device="cuda")
    found: Calls = {}
    for kernel, trained in (("norm", False), ("norm, trained", True)):
        norm = Norm(weight, bias, 1e-12, DROPOUT, seed, trained)
        inputs = [part.clone().requires_grad_() for part in (x, residual)]
        own = [part.bfloat16().requires_grad_(trained) for part in (weight, bias)]

        def fused(norm: Norm = norm) -> Any:
            return residual_layer_norm_backward(grad, *residual_layer_norm(x, residual, norm), norm)

        def plain(inputs: list[Tensor] = inputs, own: list[Tensor] = own) -> Tensor:
            return F.layer_norm(F.dropout(inputs[0], DROPOUT) + inputs[1], own[0].shape, *own, 1e-12)

        found[kernel, "forward", "bertforge"] = lambda norm=norm: residual_layer_norm(x, residual, norm)
        found[kernel, BOTH, "bertforge"] = fused
        found[kernel, "forward", "torch"] = plain
        found[kernel, BOTH, "torch"] = both(plain, inputs + (own if trained else []), grad)
    return found


def both(forward: Callable[[], Tensor], wanted: list[Tensor], grad: Tensor) -> Callable[[], Any]:
    """The result and the gradients of `wanted`: a graph records a backward pass only with its forward pass."""
    return lambda: torch.autograd.grad(forward(), wanted, grad)


def gelus(x: Tensor, grad: Tensor) -> Calls:
    """The products with GELU inside them, and apart."""
    hidden = x.shape[1]
    first, second = (torch.randn(*shape, device="cuda").bfloat16() / 30 for shape in ((4 * hidden, hidden),) * 2)
    second, bias = second.T.contiguous(), torch.zeros(4 * hidden, device="cuda").bfloat16()
    before = F.linear(x, first, bias)
    _, slope = linear_gelu(x, first, bias, keep=True)
    assert slope is not None
    return {
        ("gelu", "forward", "bertforge"): lambda: linear_gelu(x, first, bias, keep=True),
        ("gelu", "forward, inference", "bertforge"): lambda: linear_gelu(x, first, bias, keep=False),
        ("gelu", "backward", "bertforge"): lambda: linear_gelu_backward(grad, second, slope, sums=False),
        ("gelu", "forward", "torch"): lambda: F.gelu(F.linear(x, first, bias)),
        ("gelu", "backward", "torch"): lambda: torch.ops.aten.gelu_backward(grad @ second, before),
    }


def adapters(hidden: int) -> Calls:
    """W + s B A in bfloat16, and the gradients of A and B."""
    weight, grad = torch.randn(hidden, hidden, device="cuda"), torch.randn(hidden, hidden, device="cuda").bfloat16()
    a, b = (torch.randn(*shape, device="cuda").requires_grad_() for shape in ((8, hidden), (hidden, 8)))

    def ours() -> Tensor:
        return AdaptedWeight.apply(weight, a, b, 2.0, torch.bfloat16)

    def plain() -> Tensor:
        return (weight + (b @ a) * 2.0).bfloat16()

    return {
        ("adapt", "forward", "bertforge"): ours,
        ("adapt", BOTH, "bertforge"): both(ours, [a, b], grad),
        ("adapt", "forward", "torch"): plain,
        ("adapt", BOTH, "torch"): both(plain, [a, b], grad),
    }


if __name__ == "__main__":
    main()

"""LayerNorm(x + residual) on a GPU: our fused Triton kernels beside plain PyTorch, in bfloat16 and under autocast.

    python benchmarks/fused.py [--tokens 32768] [--json FILE]

Time is that of every LayerNorm of a model (two a layer), its weights frozen as LoRA has them, or trained. The share of
the ceiling counts the bytes a fused pass must move (three rows of bfloat16 a token forward, four more backward) against
a device-to-device copy measured in the same run. Under autocast plain PyTorch keeps the residual and the result in
float32; the casts to bfloat16 in the linear layers that follow are not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from bertforge.artifact import write_json
from bertforge.kernels.layer_norm_triton import Tiling, backward, forward, fused_layer_norm
from gpu_time import attempt
from record import record

SEED = 42
EPS = 1e-12
MODELS = {"bert-base": (12, 768), "minilm": (6, 384)}  # layers, hidden
TRIED = [Tiling(1, 1), Tiling(2, 2), Tiling(4, 4), Tiling(8, 4), Tiling(1, 4), Tiling(8, 8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768, help="tokens a pack")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    copied = attempt("copy of 1 GiB", lambda: target.copy_(source))
    bytes_per_s = 2 * source.nbytes / copied if copied else float("nan")
    rows: list[dict[str, Any]] = []
    for model, (layers, hidden) in MODELS.items():
        for (system, trained, name), call in systems(args.tokens, hidden).items():
            time_s = attempt(f"{model} {system} {name} trained={trained}", call)
            if time_s is None:
                continue
            moved = 2 * hidden * args.tokens * (3 if name == "forward" else 7)
            rows.append(
                {
                    "system": system,
                    "model": model,
                    "tokens": args.tokens,
                    "pass": name,
                    "trained": trained,
                    "us_per_token_all_layers": 2 * layers * time_s * 1e6 / args.tokens,
                    "share_of_ceiling": moved / time_s / bytes_per_s,
                }
            )
    print(f"\ncopy {bytes_per_s * 1e-12:.2f} TB/s")
    for row in rows:
        system = f"{row['system']:26} {row['model']:10} {row['pass']:18} trained={row['trained']!s:5}"
        print(f"{system} {row['us_per_token_all_layers']:.4f} us a token, {row['share_of_ceiling']:.2f} of the copy")
    if args.json:
        write_json(args.json, record("fused", rows, SEED, "triton"))


def systems(tokens: int, hidden: int) -> dict[tuple[str, bool, str], Callable[[], Any]]:
    """What is timed, by system, whether the LayerNorm is trained, and pass."""
    torch.manual_seed(SEED)
    x, residual, grad = (torch.randn(tokens, hidden, device="cuda").bfloat16() for _ in range(3))
    norm = nn.LayerNorm(hidden, eps=EPS, device="cuda")
    check(norm, hidden)
    weight, bias = norm.weight.detach(), norm.bias.detach()
    found: dict[tuple[str, bool, str], Callable[[], Any]] = {}
    for tiling in TRIED:
        name = f"bertforge {tiling.rows} rows {tiling.warps} warps"
        found[name, False, "forward"] = lambda tiling=tiling: forward(x, residual, weight, bias, EPS, tiling)
        for trained in (False, True):
            found[name, trained, "forward + backward"] = lambda tiling=tiling, trained=trained: (
                forward(x, residual, weight, bias, EPS, tiling),
                backward(grad, (x, residual, weight), EPS, trained, tiling),
            )
    for name, kept in (("torch, bfloat16", residual), ("torch, autocast", residual.float())):
        plain = nn.LayerNorm(hidden, eps=EPS, device="cuda", dtype=kept.dtype)
        step = Plain(x, kept, plain, grad.to(kept.dtype))
        found[name, False, "forward"] = step.once
        for trained in (False, True):
            found[name, trained, "forward + backward"] = partial(step.both, trained)
    return found


@dataclass(frozen=True)
class Plain:
    """PyTorch's own; a float32 `residual` means autocast."""

    x: Tensor
    residual: Tensor
    norm: nn.LayerNorm
    grad: Tensor

    def once(self) -> Tensor:
        with torch.no_grad():
            return self._normalize(self.x, self.residual)

    def both(self, trained: bool) -> Any:
        inputs = [self.x.detach().requires_grad_(), self.residual.detach().requires_grad_()]
        self.norm.requires_grad_(trained)
        wanted = [*inputs, *(self.norm.parameters() if trained else ())]
        return torch.autograd.grad(self._normalize(*inputs), wanted, self.grad)

    def _normalize(self, x: Tensor, residual: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=residual.dtype is torch.float32):
            return cast(Tensor, self.norm(x + residual))


def check(norm: nn.LayerNorm, hidden: int) -> None:
    """Prints the largest differences from float64, relative to the largest entry."""
    torch.manual_seed(SEED)
    x, residual, grad = (torch.randn(1001, hidden, device="cuda").bfloat16() for _ in range(3))
    results = []
    for function in (
        lambda a, b, w, c: fused_layer_norm(a, b, w, c, EPS),
        lambda a, b, w, c: nn.functional.layer_norm(a.double() + b.double(), (hidden,), w.double(), c.double(), EPS),
    ):
        inputs = [part.detach().clone().requires_grad_() for part in (x, residual, norm.weight, norm.bias)]
        output = function(*inputs)
        results.append([output.detach(), *torch.autograd.grad(output, inputs, grad.to(output.dtype))])
    errors = [float((ours - other).abs().max() / other.abs().max()) for ours, other in zip(*results, strict=True)]
    print(
        f"hidden {hidden}: error of output and of x, residual, weight and bias gradients:",
        *map("{:.1e}".format, errors),
    )


if __name__ == "__main__":
    main()

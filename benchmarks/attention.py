"""Packed attention on a GPU: our Triton kernels beside torch's varlen_attn, at the lengths of real questions.

    python benchmarks/attention.py [--tokens 32768 65536] [--json FILE]

Lengths are the quantiles, in random order, of a log-normal with median 136 and sigma 0.93 clipped to [8, 512]: mean
184, and 298 when every token counts its own sequence. A pack's last one is cut to fit, and eight empty ones end it. A
call is recorded into a CUDA graph ten times over and replayed, so launching from Python costs nothing; a time is the
median of 20 replays. Operations are those of the real lengths, 4 * length^2 * head_dim a head forward and 2.5 times
that backward (five matrix products against two), whatever a kernel computes besides.

Our tilings are chosen on the first pack, kernel by kernel, and every one tried is printed: a tiling that the GPU
refuses is a line, not the end. Errors are the largest difference from float64 over odd lengths, of values and of
gradients, relative to the largest entry of each.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from bertforge.artifact import write_json
from bertforge.kernels.attention import Bounds
from bertforge.kernels.attention_triton import TILINGS, Tiling, Tilings, backward, forward
from gpu_time import attempt
from record import record

SEED = 42
MODELS = {"bert-base": (12, 12, 64), "minilm": (6, 12, 32)}  # layers, heads, head_dim
TRIED = {
    "forward": [
        *(Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 3), Tiling(64, 32, 4, 3), Tiling(128, 64, 8, 2)),
        *(Tiling(128, 64, 8, 3), Tiling(128, 64, 4, 2), Tiling(128, 32, 4, 3)),
    ],
    "query_gradient": [
        *(Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 3), Tiling(64, 32, 4, 2), Tiling(64, 32, 4, 3)),
        *(Tiling(128, 64, 8, 2), Tiling(128, 32, 8, 2)),
    ],
    "key_value_gradients": [
        *(Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 1), Tiling(64, 32, 4, 2), Tiling(64, 32, 4, 3)),
        *(Tiling(128, 64, 8, 2), Tiling(128, 32, 8, 2)),
    ],
}
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # query, key, value, cu_seqlens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 65536], help="tokens a pack")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model, (layers, heads, dim) in MODELS.items():
        tilings = tune(model, pack(draw(args.tokens[0]), heads, dim))
        for tokens in args.tokens:
            lengths = draw(tokens)
            inputs, grad = pack(lengths, heads, dim)
            for system, step in (("bertforge", Ours(inputs, grad, tilings)), ("torch", Torch(inputs, grad))):
                for name, products, call in (("forward", 2, step.forward), ("forward + backward", 7, step.both)):
                    time_s = attempt(f"{system} {model} {tokens} {name}", call)
                    if time_s is None:
                        continue
                    rows.append(
                        {
                            "system": system,
                            "model": model,
                            "tokens": tokens,
                            "sequences": len(lengths),
                            "pass": name,
                            "us_per_token_all_layers": layers * time_s * 1e6 / tokens,
                            "tflops": 2 * products * dim * heads * float((lengths**2).sum()) / time_s * 1e-12,
                            "error": step.error(name),
                            "tilings": str(tilings) if system == "bertforge" else None,
                        }
                    )
    print("\nsystem    model      tokens pass                us a token  TFLOP/s   error")
    for row in rows:
        name = f"{row['system']:9} {row['model']:10} {row['tokens']:6} {row['pass']:18}"
        print(f"{name} {row['us_per_token_all_layers']:11.4f} {row['tflops']:8.0f} {row['error']:7.4f}")
    for tilings_used in sorted({f"{row['model']}: {row['tilings']}" for row in rows if row["tilings"]}):
        print(tilings_used)
    if args.json:
        write_json(args.json, record("attention", rows, SEED, "triton"))


def draw(tokens: int) -> np.ndarray:
    """Lengths that add up to `tokens`, eight of them zero."""
    wanted = -(-tokens // 184)
    normal = [NormalDist(np.log(136), 0.93).inv_cdf((place + 0.5) / wanted) for place in range(wanted)]
    drawn = np.random.default_rng(SEED).permutation(np.exp(normal).clip(8, 512).astype(np.int64))
    ends = np.append(drawn.cumsum().clip(max=tokens), tokens)
    return np.diff(ends, prepend=0, append=[tokens] * 8)


def pack(lengths: np.ndarray, heads: int, dim: int) -> tuple[Inputs, Tensor]:
    """Query, key, value `[tokens, heads, dim]` bfloat16 and `cu_seqlens`; the gradient of the result."""
    torch.manual_seed(SEED)
    parts = [torch.randn(int(lengths.sum()), heads, dim, device="cuda").bfloat16() for _ in range(4)]
    bounds = torch.from_numpy(np.concatenate([[0], lengths.cumsum()])).int().cuda()
    return (parts[0], parts[1], parts[2], bounds), parts[3]


def bounded(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Bounds]:
    """`inputs` as our kernels take them: every token asks."""
    return *inputs[:3], Bounds(inputs[3], inputs[3])


class Ours:
    def __init__(self, inputs: Inputs, grad: Tensor, tilings: Tilings) -> None:
        self.inputs, self.grad, self.tilings = inputs, grad, tilings

    def forward(self) -> Tensor:
        return forward(*bounded(self.inputs), self.tilings)[0]

    def both(self) -> list[Tensor]:
        results = forward(*bounded(self.inputs), self.tilings)
        gradients = [torch.empty_like(part) for part in self.inputs[:3]]
        backward(self.grad, bounded(self.inputs), results, gradients, self.tilings)
        return [results[0], *gradients]

    def error(self, name: str) -> float:
        return largest_error(type(self), self.inputs[0].shape[1:], name, self.tilings)


class Torch:
    def __init__(self, inputs: Inputs, grad: Tensor) -> None:
        self.parts = [part.clone().requires_grad_() for part in inputs[:3]]
        self.bounds, self.grad = inputs[3], grad

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self._attend()

    def both(self) -> list[Tensor]:
        output = self._attend()
        return [output.detach(), *torch.autograd.grad(output, self.parts, self.grad)]

    def _attend(self) -> Tensor:
        query, key, value = self.parts
        return cast(Tensor, varlen_attn(query, key, value, self.bounds, self.bounds, 512, 512))

    def error(self, name: str) -> float:
        return largest_error(type(self), self.parts[0].shape[1:], name)


def largest_error(system: type[Ours] | type[Torch], shape: torch.Size, name: str, *options: Any) -> float:
    """The largest difference from attention in float64, relative to each result's largest entry."""
    inputs, grad = pack(np.array([1, 512, 129, 0, 64, 300, 7]), *shape)
    exact = [part.double().requires_grad_() for part in inputs[:3]]
    bounds = inputs[3].tolist()
    outputs = []
    for begin, end in itertools.pairwise(bounds):
        q, k, v = (part[begin:end] for part in exact)
        weights = torch.einsum("qhd,khd->hqk", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    output = torch.cat(outputs)
    expected = [output.detach(), *torch.autograd.grad(output, exact, grad.double())]
    results = system(inputs, grad, *options).both()
    pairs = list(zip(results, expected, strict=True))[: 1 if name == "forward" else None]
    return max(float((ours.double() - other).abs().max() / other.abs().max()) for ours, other in pairs)


def tune(model: str, packed: tuple[Inputs, Tensor]) -> Tilings:
    """The fastest tiling of each kernel, the others held."""
    inputs, grad = packed
    chosen = TILINGS[inputs[0].shape[-1]]
    for kernel, tried in TRIED.items():
        times: dict[Tiling, float] = {}
        for tiling in tried:
            step = Ours(inputs, grad, replace(chosen, **{kernel: tiling}))
            time_s = attempt(f"{model} {kernel} {tiling}", step.forward if kernel == "forward" else step.both)
            if time_s is not None:
                times[tiling] = time_s
        if times:
            chosen = replace(chosen, **{kernel: min(times, key=lambda tiling: times[tiling])})
    return chosen


if __name__ == "__main__":
    main()

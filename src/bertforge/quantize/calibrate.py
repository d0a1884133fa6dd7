"""Ranges of activations from calibration rows, by ModelOpt's calibrators, and the choice among them on other rows.

`max` takes the largest value seen; the others look at a histogram: `entropy` keeps the distribution close
(TensorRT's method), `mse` the values, `percentile` clips a share of them. What is clipped is lost for outliers and
gained in resolution for everything else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from modelopt.torch.quantization.calib import HistogramCalibrator
from modelopt.torch.quantization.tensor_quant import scaled_e4m3

from bertforge.model.classifier import BertForSequenceClassification
from bertforge.model.points import Unit, shared
from bertforge.quantize.fake import Loop, activation_quantizers, quantize_only

PERCENTILES = (99.9, 99.99, 99.999, 99.9999)
_FIRST = 128  # bin from which on they try: 128 bins are all that 8 bits tell apart
_STRIDE = 16  # of the 2,048 bins of a histogram, how far apart `entropy` and `mse` try to clip

Ranges = dict[str, float]


def ranges(
    model: BertForSequenceClassification, form: str, chosen: list[Unit], method: str, loop: Loop
) -> dict[str, Ranges]:
    """Name of a way to calibrate -> point -> amax, from one run of `loop` over calibration rows.

    `method` is one of `jobs.quantize.METHODS`; percentile gives four ways and best all of them. There is no entropy
    in fp8: it is defined for integers.
    """
    points = [point for unit in chosen for point in unit.points]
    quantizers = activation_quantizers(model, points)
    histograms = {point: HistogramCalibrator(quantizers[point].num_bits, None, False) for point in points}
    quantize_only(model, [])
    hooks = [quantizers[point].register_forward_hook(_collect(histogram)) for point, histogram in histograms.items()]
    loop(model)
    for hook in hooks:
        hook.remove()
    ways = _ways(method, form)
    return {
        name: shared(chosen, {point: float(amax(histogram)) for point, histogram in histograms.items()})
        for name, amax in ways.items()
    }


def _collect(histogram: HistogramCalibrator) -> Callable[..., None]:
    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        histogram.collect(output)  # behind the smoothing; a quantizer that is off changes nothing else

    return hook


def _ways(method: str, form: str) -> dict[str, Callable[[HistogramCalibrator], torch.Tensor]]:
    ways: dict[str, Callable[[HistogramCalibrator], torch.Tensor]] = {
        "max": lambda histogram: histogram._calib_bin_edges[-1],
        "entropy": lambda histogram: histogram.compute_amax("entropy", stride=_STRIDE),
        "mse": lambda histogram: histogram.compute_amax("mse", stride=_STRIDE) if form == "int8" else _mse(histogram),
        **{f"percentile {share}": _percentile(share) for share in PERCENTILES},
    }
    if form == "fp8":
        del ways["entropy"]
    return {name: way for name, way in ways.items() if method == "best" or name.startswith(method)}


def _mse(histogram: HistogramCalibrator) -> torch.Tensor:
    """In fp8, for which ModelOpt 0.47's own calls its rounding with too few arguments."""
    edges, counts = histogram._calib_bin_edges.cpu(), histogram._calib_hist.cpu()  # they may lie on two devices
    centers = (edges[1:] + edges[:-1]) / 2  # [bins]
    tried: torch.Tensor = centers[_FIRST::_STRIDE]
    errors = [((scaled_e4m3(centers, amax, None, 4, 3) - centers) ** 2 * counts).sum() for amax in tried]
    return tried[torch.stack(errors).argmin()]


def _percentile(share: float) -> Callable[[HistogramCalibrator], torch.Tensor]:
    return lambda histogram: histogram.compute_amax("percentile", percentile=share)

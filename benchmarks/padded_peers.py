"""One peer in a process of its own: padded batches in, logits and seconds out. `inference_cpu.py` starts it.

    python padded_peers.py SYSTEM PRECISION MODEL WORK THREADS

WORK is a folder with `ids.npy` (the rows' tokens end to end), `lengths.npy` and `calibration.csv` (train texts). Then
every line of standard input is a list of batches, each a list of rows; every answer a line of JSON with the seconds of
each batch, padding included, and its logits. A process each, for sentence-transformers' ONNX and OpenVINO need other
versions of transformers than one another; the interpreter that runs this file says which.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Infer = Callable[[dict[str, np.ndarray]], np.ndarray]


def main() -> None:
    """Loads the peer, says so, and answers until standard input ends."""
    system, precision, model, work, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print must not stand among the answers
    infer, libraries = PEERS[system](Path(model), precision, Path(work), int(threads))
    ids, lengths = np.load(Path(work) / "ids.npy"), np.load(Path(work) / "lengths.npy")
    starts = np.concatenate([[0], np.cumsum(lengths)])
    print(json.dumps({"libraries": _versions(libraries)}), file=answers, flush=True)
    for line in sys.stdin:
        seconds, logits = [], []
        for batch in json.loads(line):
            start = time.perf_counter()
            logits += infer(_padded(ids, starts, lengths, batch)).tolist()
            seconds.append(time.perf_counter() - start)
        print(json.dumps({"seconds": seconds, "logits": logits}), file=answers, flush=True)


def _padded(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, rows: list[int]) -> dict[str, np.ndarray]:
    """`[rows, longest]`, padding on the right."""
    mask = np.arange(lengths[rows].max()) < lengths[rows][:, None]
    found = np.zeros(mask.shape, np.int64)
    found[mask] = np.concatenate([ids[starts[row] : starts[row + 1]] for row in rows])
    return {"input_ids": found, "attention_mask": mask.astype(np.int64)}


def _transformers(model: Path, precision: str, work: Path, threads: int) -> tuple[Infer, list[str]]:
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    network: Any = AutoModelForSequenceClassification.from_pretrained(model, dtype=dtype).eval()

    @torch.inference_mode()
    def infer(arrays: dict[str, np.ndarray]) -> np.ndarray:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        found: np.ndarray = network(**tensors).logits.float().numpy()
        return found

    return infer, ["torch", "transformers"]


def _onnxruntime(model: Path, precision: str, work: Path, threads: int) -> tuple[Infer, list[str]]:
    """torch's export of transformers' model, then `quantize_dynamic` as ONNX Runtime's documentation has it."""
    import onnxruntime
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from transformers import AutoModelForSequenceClassification

    network: Any = AutoModelForSequenceClassification.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    names = ["input_ids", "attention_mask"]
    example = {name: torch.ones(2, 16, dtype=torch.int64) for name in names}
    axes = {name: {0: "batch", 1: "seq"} for name in names} | {"logits": {0: "batch"}}
    graph, quantized = str(work / "peer.onnx"), str(work / "peer-int8.onnx")
    torch.onnx.export(
        network.eval(),
        (),
        graph,
        kwargs=example,
        input_names=names,
        output_names=["logits"],
        dynamic_axes=axes,
        opset_version=18,
        dynamo=False,
    )
    quantize_dynamic(graph, quantized, weight_type=QuantType.QInt8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(quantized, options, providers=["CPUExecutionProvider"])
    return lambda arrays: session.run(["logits"], arrays)[0], ["onnxruntime", "transformers"]


def _sentence_onnx(model: Path, precision: str, work: Path, threads: int) -> tuple[Infer, list[str]]:
    """`CrossEncoder(backend="onnx")`, in INT8 by `export_dynamic_quantized_onnx_model`."""
    import onnxruntime
    from sentence_transformers import CrossEncoder, export_dynamic_quantized_onnx_model

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    settings: dict[str, Any] = {"session_options": options, "provider": "CPUExecutionProvider"}
    folder = str(work / f"sentence-onnx-{precision}")
    encoder = CrossEncoder(str(model), backend="onnx", model_kwargs={**settings, "export": True})
    if precision == "int8":
        encoder.save_pretrained(folder)
        export_dynamic_quantized_onnx_model(encoder, "avx512_vnni", folder)
        file = {"file_name": "onnx/model_qint8_avx512_vnni.onnx"}
        encoder = CrossEncoder(folder, backend="onnx", model_kwargs={**settings, **file})
    return _network(encoder), ["sentence-transformers", "transformers", "optimum-onnx", "onnxruntime"]


def _sentence_openvino(model: Path, precision: str, work: Path, threads: int) -> tuple[Infer, list[str]]:
    """`CrossEncoder(backend="openvino")`, in INT8 by `export_static_quantized_openvino_model` on our train rows.

    OpenVINO itself takes bfloat16 where the CPU has it, whatever the graph's own type.
    """
    from sentence_transformers import CrossEncoder, export_static_quantized_openvino_model

    settings = {"ov_config": {"INFERENCE_NUM_THREADS": str(threads)}}
    folder = str(work / f"sentence-openvino-{precision}")
    encoder = CrossEncoder(str(model), backend="openvino", model_kwargs={**settings, "export": True})
    if precision == "int8":
        encoder.save_pretrained(folder)
        data = work / "calibration"
        data.mkdir()
        (data / "train.csv").write_text((work / "calibration.csv").read_text())
        export_static_quantized_openvino_model(
            encoder,
            None,
            folder,
            dataset_name=str(data),
            dataset_config_name="default",
            dataset_split="train",
            column_name="text",
        )
        file = {"file_name": "openvino/openvino_model_qint8_quantized.xml"}
        encoder = CrossEncoder(folder, backend="openvino", model_kwargs={**settings, **file})
    return _network(encoder), ["sentence-transformers", "transformers", "optimum-intel", "openvino"]


def _network(encoder: Any) -> Infer:
    """What `encoder.predict` calls once the texts are tokens."""
    network = getattr(encoder, "transformers_model", None) or encoder.model

    def infer(arrays: dict[str, np.ndarray]) -> np.ndarray:
        import torch

        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        tensors["token_type_ids"] = torch.zeros_like(tensors["input_ids"])
        found: np.ndarray = network(**tensors).logits.numpy()
        return found

    return infer


def _versions(names: list[str]) -> dict[str, str]:
    from importlib import metadata

    return {name: metadata.version(name) for name in names}


PEERS: dict[str, Callable[[Path, str, Path, int], tuple[Infer, list[str]]]] = {
    "transformers": _transformers,
    "onnxruntime": _onnxruntime,
    "sentence-onnx": _sentence_onnx,
    "sentence-openvino": _sentence_openvino,
}

if __name__ == "__main__":
    main()

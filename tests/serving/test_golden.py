"""What golden rows that are replayed may differ by, in each kind of folder."""

import numpy as np
import pytest
import torch

from bertforge.data.loader import Examples
from bertforge.data.tokens import TokenStore
from bertforge.engines.pytorch import PyTorchEngine
from bertforge.engines.run import run
from bertforge.errors import ArtifactError
from bertforge.hardware import Hardware
from bertforge.inference.predictor import Predictor
from bertforge.proof.golden import GoldenRows
from bertforge.serving.golden import _mismatch, replay

HERE = Hardware(torch.device("cpu"), "a CPU", 1.0, 1, bf16=True)


def logits_of(predictor, engine, scale=1.0):
    """Asks as the replay sends them, by an engine, and how many."""
    asked = []

    def ask(asked_for):
        offsets = np.cumsum([0, *asked_for.lengths])
        store = TokenStore(asked_for.ids.astype(np.uint32), offsets)
        examples = Examples(store, np.full(len(store), -1), predictor.tokenizer.sep_id, predictor.max_length)
        asked.append(len(store))
        return scale * run(engine, examples, np.arange(len(store)))

    return ask, asked


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_may_differ_by_what_its_precision_does_to_it(runs, kind, precision):
    predictor = Predictor.load(runs[kind], "fp32")
    engine = PyTorchEngine(predictor.engine.model, HERE, precision)
    ask, asked = logits_of(predictor, engine)
    replay(runs[kind], predictor.codec, precision, ask)
    assert asked == [1] * 16 + [16]  # each by itself, then all at once
    ask, _ = logits_of(predictor, engine, scale=-1.0)
    with pytest.raises(ArtifactError, match="does not compute what it did when it was saved") as refused:
        replay(runs[kind], predictor.codec, precision, ask)
    assert "make it again" in str(refused.value)


def test_an_engine_may_differ_as_its_receipt_says(runs):
    wanted = GoldenRows.from_dict(Predictor.load(runs["full"], "fp32").manifest["golden"]).logits
    off = wanted + np.random.default_rng(0).normal(0, 0.3 * wanted.std(), wanted.shape).astype(np.float32)

    def told(found, worst, **simulated):
        shift = {"simulated": 0.0, "worst_simulated": 0.0, "found": found, "worst": worst, **simulated}
        manifest = {"kind": "engine", "golden_shift": shift, "crowd_shift": shift | {"found": 0.0, "worst": 0.0}}
        return _mismatch(runs["full"], manifest, "int8", wanted, off)

    assert "probabilities of its golden rows move by" in told(0.0, 0.0)
    assert told(1.0, 0.0) is not None
    assert told(0.0, 1.0) is not None
    assert told(1.0, 1.0) is None  # no more than when it was proved
    assert told(0.0, 0.0, simulated=1.0, worst_simulated=1.0) is None  # no more than the precision does


def test_what_is_no_number_is_told(runs):
    manifest = {"kind": "engine"}
    wanted = np.zeros((16, 2), np.float32)
    broken = wanted.copy()
    broken[3] = np.nan
    assert _mismatch(runs["full"], manifest, "int8", wanted, broken).endswith("with 2 that are no number")
    assert _mismatch(runs["full"], manifest, "int8", wanted, wanted[:, :1]) is not None

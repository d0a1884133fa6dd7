"""What an engine says of its own products, against what the model's shape says they must be."""

import numpy as np
import pytest
import torch

from bertforge.batch import PaddedBatch
from bertforge.benchmark.roofline import needed_flops
from bertforge.engines.receipt import Product, describe, verdict
from bertforge.engines.registry import open_engine
from bertforge.export.bert_onnx import export_onnx
from tests.engines.building import CPU, built
from tests.model.tiny import tiny_bert

TOKENS = 24


@pytest.fixture(scope="module")
def model():
    return tiny_bert(hidden_size=64, intermediate_size=128, num_attention_heads=2, num_hidden_layers=3)


@pytest.fixture
def batch():
    ids = torch.randint(5, 40, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return PaddedBatch(ids, torch.ones_like(ids))


@pytest.mark.parametrize("kind", ["onnxruntime", "openvino"])
def test_every_product_is_counted_once(kind, model, batch, tmp_path):
    products = built(kind, model, tmp_path).products(batch)
    work = needed_flops(model.config, np.array([TOKENS])) / 2
    assert sum(product.multiply_adds for product in products) == work
    attention = sum(product.multiply_adds for product in products if product.attention)
    assert attention == 2 * 64 * (2 * TOKENS**2 + TOKENS), "the last layer asks for the first token alone"
    assert {product.precision for product in products} == {"fp32"}


def test_attention_that_is_one_kernel_is_two_products(model, batch, tmp_path):
    export_onnx(model, tmp_path / "model.onnx", fused=True)
    products = open_engine(tmp_path, "onnxruntime", "fp32", CPU).products(batch)
    assert sum(product.multiply_adds for product in products) == needed_flops(model.config, np.array([TOKENS])) / 2
    *below, last = (product for product in products if product.attention)
    assert [product.multiply_adds for product in below] == [2 * TOKENS * TOKENS * 64] * 2
    assert last.multiply_adds == 2 * TOKENS * 64, "the last layer asks for the first token alone"
    described = describe(products, "fp32", TOKENS)
    assert described["attention_fused"] is True
    assert described["attention_shares"] == {"fp32": 1}


def test_an_int8_graph_is_seen_to_run_in_int8(model, batch, tmp_path):
    described = describe(built("onnxruntime", model, tmp_path, "int8").products(batch), "int8", TOKENS)
    assert described["label"] == "int8"
    assert described["linear_shares"]["int8"] > 0.9
    assert described["attention_shares"] == {"fp32": 1}
    assert described["shares"]["int8"] < described["linear_shares"]["int8"]


def test_the_label_is_earned():
    def products(quantized):
        return [
            Product("a", "int8", quantized),
            Product("b", "fp32", 100 - quantized),
            Product("c", "fp32", 1000, attention=True, fused=True),
        ]

    earned, mixed = (describe(products(share), "int8", 8) for share in (80, 79))
    assert (earned["label"], mixed["label"]) == ("int8", "mixed")
    assert earned["attention_fused"] is True
    assert "counts as mixed" not in verdict(earned, "int8")
    assert verdict(mixed, "int8").startswith("linear layers run 79% in int8 and 21% in fp32 ")
    assert verdict(mixed, "int8").endswith("less than 80% in int8, so the engine counts as mixed, not as int8")

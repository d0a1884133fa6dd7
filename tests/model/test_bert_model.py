"""What BertModel does beyond transformers: it refuses what it cannot hold, and packs may have empty ends."""

from dataclasses import replace

import pytest
import torch

from bertforge.batch import PaddedBatch, pack
from bertforge.errors import UsageError
from tests.model.tiny import tiny_bert


def padded(length):
    return PaddedBatch(torch.ones(2, length, dtype=torch.int64), torch.ones(2, length, dtype=torch.int64))


def test_the_longest_sequence_that_fits_runs():
    for layout in (padded(32), pack(padded(32))):
        assert tiny_bert()(layout).shape == (2, 2)


def test_a_longer_sequence_is_refused_with_both_numbers():
    for layout in (padded(33), pack(padded(33))):
        with pytest.raises(UsageError, match=r"33 tokens, but this model holds 32; truncate to max_length=32"):
            tiny_bert()(layout)


def test_empty_sequences_at_the_end_of_a_pack_change_nothing():
    model, batch = tiny_bert(), pack(padded(5))
    filled = replace(batch, cu_seqlens=torch.tensor([0, 5, 10, 10, 10], dtype=torch.int32))
    logits, expected = model(filled), model(batch)
    assert logits.shape == (4, 2)
    # A product of 4 rows may sum in another order than one of 2; tests/parity/pairs.py says where 1e-5 comes from.
    assert (logits[:2] - expected).abs().max() <= 1e-5 * expected.abs().max()
    apart = replace(batch, cu_seqlens=torch.tensor([0, 4, 10, 10, 10], dtype=torch.int32))
    assert (model(apart)[:2] - expected).abs().max() > 1e-2, "where a sequence ends is seen"


def test_a_pack_takes_any_number_of_tokens_though_each_sequence_must_fit():
    many = PaddedBatch(torch.ones(9, 30, dtype=torch.int64), torch.ones(9, 30, dtype=torch.int64))
    assert tiny_bert()(pack(many)).shape == (9, 2)


def test_dropout_acts_in_training_only():
    model, batch = tiny_bert(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0), padded(8)
    for layout in (batch, pack(batch)):
        assert torch.equal(model.eval()(layout), model(layout))
        model.train()
        assert not torch.equal(model(layout), model(layout)), "attention's dropout"
        model.eval()


def test_new_weights_are_drawn_as_berts_are():
    model = tiny_bert(hidden_size=64, initializer_range=0.02)
    for name, parameter in model.named_parameters():
        if "LayerNorm.weight" in name:
            assert torch.all(parameter == 1)
        elif name.endswith("bias"):
            assert torch.all(parameter == 0)
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
    assert torch.all(model.bert.embeddings.word_embeddings.weight[0] == 0), "the padding token's"

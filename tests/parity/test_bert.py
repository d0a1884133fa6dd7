"""Our BERT gives transformers' logits and gradients, padded and packed, and exchanges files with it."""

import json
from dataclasses import replace

import pytest
import torch
import transformers

from bertforge.batch import PaddedBatch, pack
from bertforge.model.classifier import BertForSequenceClassification
from bertforge.models import resolve
from tests.parity.pairs import (
    LENGTHS,
    assert_equal,
    assert_equal_gradients,
    gradients,
    ours_from,
    random_batch,
    their_logits,
    tiny_model,
)

CONFIGS = {
    "4 heads": {},
    "1 head, 1 layer, relu, 5 labels": {
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "hidden_act": "relu",
        "num_labels": 5,
    },
    "8 heads, 3 layers, gelu_new, eps 1e-5": {
        "num_attention_heads": 8,
        "num_hidden_layers": 3,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
    },
    "gelu_pytorch_tanh, 3 token types": {"hidden_act": "gelu_pytorch_tanh", "type_vocab_size": 3},
    "a vocabulary of 82,000": {"vocab_size": 82_000, "hidden_size": 8, "num_attention_heads": 2, "num_labels": 5},
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def pair(request, tmp_path):
    theirs = tiny_model(**request.param)
    return ours_from(theirs, tmp_path), theirs


@pytest.fixture
def ours(tmp_path):
    return ours_from(tiny_model(), tmp_path)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_gives_their_logits_and_gradients(pair, side):
    ours, theirs = pair
    batch = random_batch(LENGTHS, theirs.config.vocab_size, side)
    assert_equal(ours(batch), their_logits(theirs, batch))
    logits, expected = ours.double()(batch), their_logits(theirs.double(), batch)
    assert_equal(logits, expected)
    assert_equal_gradients(gradients(ours, logits), gradients(theirs, expected))


def test_a_packed_batch_gives_their_logits_and_gradients(pair):
    ours, theirs = pair
    batch = random_batch(LENGTHS, theirs.config.vocab_size)
    assert_equal(ours(pack(batch)), their_logits(theirs, batch))
    logits, expected = ours.double()(pack(batch)), their_logits(theirs.double(), batch)
    assert_equal(logits, expected)
    assert_equal_gradients(gradients(ours, logits), gradients(theirs, expected))


@pytest.mark.parametrize("length", LENGTHS)
def test_one_sequence_alone_gives_their_logits(ours, tmp_path, length):
    theirs = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    batch = random_batch((length,), 99)
    expected = their_logits(theirs, batch)
    assert_equal(ours(batch), expected)
    assert_equal(ours(pack(batch)), expected)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("lengths", [(1, 2, 3, 17, 64), (511, 512)], ids=str)
def test_minilms_real_weights_give_their_logits_and_gradients(tmp_path, lengths, side):
    torch.manual_seed(0)  # for the head, which the checkpoint lacks
    files, dtype = resolve("minilm"), torch.float32  # whatever the file holds
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(files, dtype=dtype).eval()
    ours = ours_from(theirs, tmp_path)
    batch = random_batch(lengths, theirs.config.vocab_size, side)
    layouts = [batch, pack(batch)] if side == "right" else [batch]
    expected = their_logits(theirs, batch)
    for layout in layouts:
        assert_equal(ours(layout), expected)
    expected_gradients = gradients(theirs.double(), their_logits(theirs, batch))
    for layout in layouts:
        assert_equal_gradients(gradients(ours.double(), ours(layout)), expected_gradients)


@pytest.mark.parametrize(
    "mistake",
    [
        {"hidden_act": "gelu_new"},
        {"layer_norm_eps": 1e-5},
        {"num_attention_heads": 8},
    ],
    ids=str,
)
def test_the_tolerance_tells_a_slightly_different_model_apart(tmp_path, mistake):
    theirs = tiny_model()
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | mistake))
    ours = BertForSequenceClassification.from_pretrained(tmp_path)
    batch = random_batch(LENGTHS, 99)
    logits, expected = ours(batch), their_logits(theirs, batch)
    with pytest.raises(AssertionError, match="differs by"):
        assert_equal_gradients(gradients(ours, logits), gradients(theirs, expected))


def test_packed_the_side_of_the_padding_does_not_matter(ours):
    left, right = random_batch(LENGTHS, 99, "left"), random_batch(LENGTHS, 99, "right")
    assert torch.equal(ours(pack(left)), ours(pack(right)))
    # Padded it does, as in transformers: the first column is padding on the left.
    assert not torch.allclose(ours(left), ours(right), atol=1e-2)


def test_padding_ids_do_not_matter(ours):
    batch = random_batch(LENGTHS, 99)
    other = replace(batch, input_ids=torch.where(batch.attention_mask.bool(), batch.input_ids, 7))
    assert torch.equal(ours(batch), ours(other))


def logits_with_one_sequence_changed(model, lengths, changed):
    """Logits of a pack before and after every id of sequence number `changed` is another."""
    batch = pack(random_batch(lengths, 99))
    begin, end = batch.cu_seqlens[changed], batch.cu_seqlens[changed + 1]
    ids = batch.input_ids.clone()
    ids[begin:end] = (ids[begin:end] + 1) % 99
    with torch.no_grad():
        return model(batch), model(replace(batch, input_ids=ids))


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_changing_one_sequence_of_a_pack_leaves_the_others_bit_for_bit(ours, changed):
    before, after = logits_with_one_sequence_changed(ours, LENGTHS, changed)
    others = torch.arange(len(LENGTHS)) != changed
    assert torch.equal(before[others], after[others])
    assert (before[changed] - after[changed]).abs().max() > 1e-3


def test_so_it_does_with_minilms_real_weights():
    before, after = logits_with_one_sequence_changed(
        BertForSequenceClassification.from_pretrained("minilm"), LENGTHS, 3
    )
    others = torch.arange(len(LENGTHS)) != 3
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[3], after[3])


def test_token_types_count_and_none_means_zero(ours):
    batch = random_batch((3, 17), 99)
    zeros = torch.zeros_like(batch.input_ids)
    for layout in (lambda padded: padded, pack):
        plain = ours(layout(replace(batch, token_type_ids=None)))
        assert_equal(ours(layout(replace(batch, token_type_ids=zeros))), plain)
        assert not torch.allclose(ours(layout(batch)), plain, atol=1e-2)


def test_a_hugging_face_tokenizers_output_is_a_padded_batch():
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve("minilm"))
    batch = PaddedBatch(**tokenizer(["How do I sort a list?", "Why?"], padding=True, return_tensors="pt"))
    assert pack(batch).cu_seqlens.tolist() == [0, *batch.attention_mask.sum(1).cumsum(0).tolist()]


def test_transformers_loads_what_we_save(ours, tmp_path):
    ours.save_pretrained(tmp_path / "saved")
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert {key: value for key, value in info.items() if value} == {}
    assert type(theirs) is transformers.BertForSequenceClassification
    batch = random_batch((1, 17, 64), 99)
    assert_equal(ours(batch), their_logits(theirs.eval(), batch))


def test_label_names_travel_both_ways(tmp_path):
    theirs = tiny_model(num_labels=3, id2label={0: "open", 1: "closed", 2: "spam"})
    ours = ours_from(theirs, tmp_path / "theirs")
    assert ours.config.labels == ("open", "closed", "spam")
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert (again.num_labels, again.id2label) == (3, {0: "open", 1: "closed", 2: "spam"})
    assert again.label2id == {"open": 0, "closed": 1, "spam": 2}

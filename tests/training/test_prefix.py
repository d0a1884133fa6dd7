"""Frozen layers run once for each row, and a run with what they gave is bit for bit the run without."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bertforge.data.loader import Examples, PackShape, epoch_plan
from bertforge.data.prepared import PreparedData
from bertforge.data.tokens import TokenStore
from bertforge.determinism import seed_everything
from bertforge.lora.config import LoraConfig
from bertforge.lora.inject import inject_lora
from bertforge.model.bert import BertModel
from bertforge.training.finetune import assemble, finetune
from bertforge.training.loop import Trainer
from bertforge.training.prefix import EagerPrefix, GraphedPrefix, frozen_layers
from bertforge.training.row_cache import Room, RowCache
from tests.model.tiny import tiny_bert
from tests.runs import STEPS, quick_recipe
from tests.training.test_resume import CrashError, crash_after, curves, outcome

MB = 1 << 20
CUDA = torch.cuda.is_available()
cuda = pytest.mark.skipif(not CUDA, reason="needs a GPU")


def recipe(base, **changes):
    """Three epochs of LoRA in the upper of two layers, with dropout wherever there can be any."""
    dropout = {} if CUDA else {"attention_dropout": 0.1}  # CUDA's kernel has none
    lora = {"r": 2, "lora_dropout": 0.1, "last_layers": 1}
    return quick_recipe(base, "lora", **{"epochs": 3, "patience": 3, "lora": lora, **dropout, **changes})


@pytest.fixture
def computed(monkeypatch):
    """Sequences of each pack that went through frozen layers."""
    packs, lower_layers = [], BertModel.lower_layers

    def counting(self, batch, layers):
        packs.append(int((batch.cu_seqlens.diff() > 0).sum()))
        return lower_layers(self, batch, layers)

    monkeypatch.setattr(BertModel, "lower_layers", counting)
    return packs


@pytest.fixture(scope="module")
def without(tmp_path_factory, data, base):
    """The run that keeps nothing."""
    folder = tmp_path_factory.mktemp("without")
    finetune(data, folder / "run", recipe(base, prefix_cache_gb=0.0))
    return outcome(folder / "run", "lora")


def adapted(layers=3, **changes):
    return inject_lora(tiny_bert(num_hidden_layers=layers), LoraConfig(r=2, **changes))


def test_what_is_frozen_ends_below_the_lowest_trained_parameter():
    assert frozen_layers(tiny_bert().bert) == 0
    assert frozen_layers(adapted().bert) == 0
    assert frozen_layers(adapted(layers_to_transform=(1, 2)).bert) == 1
    assert frozen_layers(adapted(layers_to_transform=(2,)).bert) == 2
    assert frozen_layers(adapted(target_modules=("pooler.dense",)).bert) == 3, "all layers: only the head is trained"
    model = adapted(layers_to_transform=(2,))
    model.bert.embeddings.LayerNorm.bias.requires_grad_(True)
    assert frozen_layers(model.bert) == 0


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_model_given_its_lower_layers_goes_on_from_them(layers):
    model = tiny_bert(num_hidden_layers=3)
    batch, _ = made_up_rows(20).pack(np.arange(5))
    lower = model.bert.lower_layers(batch, layers)
    given = replace(batch, lower=lower)
    for whole, begun in zip(model.bert(batch), model.bert(given), strict=True):
        assert torch.equal(begun, whole), "every token"
    if layers < 3:
        assert torch.equal(model(given), model(batch)), "first tokens alone"
    else:  # picked from all tokens, where the last layer alone would have computed the first ones: other products
        torch.testing.assert_close(model(given), model(batch))
    wrong = replace(lower, hidden=lower.hidden + 1)
    assert not torch.allclose(model(replace(batch, lower=wrong)), model(batch))


def test_nothing_is_drawn_at_random_in_frozen_layers_and_nothing_changes_above():
    model = adapted().train()
    batch, _ = made_up_rows(20).pack(np.arange(5))
    before = torch.get_rng_state()
    first, second = (EagerPrefix(model.bert, 2, "fp32")(batch) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert not first.requires_grad
    assert [layer.training for layer in model.bert.encoder.layer] == [False, False, True]


def test_each_row_is_computed_once_and_the_run_is_the_one_without(tmp_path, data, base, without, computed):
    said = []
    manifest = finetune(data, tmp_path / "run", recipe(base), started=lambda plan: said.append(plan.frozen))
    assert outcome(tmp_path / "run", "lora") == without
    if not CUDA:  # a recorded graph calls the model only while it is recorded
        assert len(computed) == 1 + STEPS, "one row to learn the type, then the packs of the first epoch"
    assert manifest["metrics"]["epochs"] == 3
    assert said[0].startswith("layer 0 is frozen: ")
    assert said[0].endswith(" on the GPU" if CUDA else " in host memory")


def test_without_a_cache_every_epoch_computes_it(tmp_path, data, base, computed):
    said = []
    finetune(data, tmp_path / "run", recipe(base, prefix_cache_gb=0.0), started=lambda plan: said.append(plan.frozen))
    assert CUDA or len(computed) == 1 + 3 * STEPS
    assert said[0].endswith("prefix_cache_gb=0 leaves 0.0 MB, so every epoch computes it anew")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_that_trains_the_lowest_layer_has_no_prefix(tmp_path, data, base, computed, kind):
    said = []
    finetune(data, tmp_path / "run", quick_recipe(base, kind, epochs=1), started=lambda plan: said.append(plan.frozen))
    assert computed == []
    assert said == [None]


def test_one_epoch_keeps_nothing(tmp_path, data, base):
    said = []
    finetune(data, tmp_path / "run", recipe(base, epochs=1), started=lambda plan: said.append(plan.frozen))
    assert said == ["layer 0 is frozen: the one epoch computes its output without gradients"]


def trained(folder, data, base, precision, device="cpu", **changes):
    """The trainer after its run, and the curve without what is timed."""
    settings = recipe(base, **changes)
    seed_everything(settings.seed)
    run = assemble(PreparedData.open(data), settings, torch.device(device))
    trainer = Trainer(run.model, run.split, settings, folder, precision)
    trainer.fit(lambda progress, sequences, loss: None)
    return trainer, curves(folder)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("device", "room"),
    [
        ("cpu", Room(0, 8 * MB)),
        pytest.param("cuda", Room(8 * MB, 0), marks=cuda),
        pytest.param("cuda", Room(100_000, 8 * MB), marks=cuda),
    ],
)
def test_either_memory_gives_the_same_curve(tmp_path, data, base, monkeypatch, precision, device, room):
    _, expected = trained(tmp_path / "without", data, base, precision, device, prefix_cache_gb=0.0)
    monkeypatch.setattr(Room, "free", lambda device: room)
    trainer, curve = trained(tmp_path / "with", data, base, precision, device, prefix_cache_gb=1.0)
    assert curve == expected
    used = [size > 0 for size in trainer.prefix.cache.bytes.values()]
    assert used == [size > 0 for size in (room.gpu, room.host)]


def test_memory_that_cannot_hold_it_keeps_nothing(tmp_path, data, base, monkeypatch):
    monkeypatch.setattr(Room, "free", lambda device: Room(0, 1000))
    trainer, _ = trained(tmp_path, data, base, "fp32")
    assert trainer.prefix.cache is None
    assert ", but there is room for 0.0 MB, so every epoch computes it anew" in trainer.prefix.description


def test_other_values_would_give_another_curve(tmp_path, data, base, without, monkeypatch):
    put = RowCache.put
    monkeypatch.setattr(RowCache, "put", lambda self, rows, hidden: put(self, rows, hidden * 1.01))
    finetune(data, tmp_path / "run", recipe(base))
    curve, expected = curves(tmp_path / "run"), without[1]
    first = next(number for number, point in enumerate(curve) if "epoch" in point) + 1
    assert curve[:first] == expected[:first], "the first epoch does not read them"
    assert curve[first:] != expected[first:]


@pytest.mark.parametrize("step", [3, STEPS + 3, 2 * STEPS + 3])
def test_a_resumed_run_fills_the_cache_anew(tmp_path, data, base, without, computed, step):
    out, settings = tmp_path / "run", recipe(base, checkpoint_seconds=0)
    with pytest.raises(CrashError):
        finetune(data, out, settings, show=crash_after(step))
    computed.clear()
    finetune(data, out, settings, resume=True)
    assert outcome(out, "lora") == without
    assert CUDA or 1 < len(computed) <= 1 + 2 * STEPS


def made_up_rows(count, vocab=50, longest=30, seed=0):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, size=count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = random.integers(1, vocab, size=offsets[-1])
    return Examples(TokenStore(ids, offsets), random.integers(0, 2, size=count), sep_id=2, max_length=longest)


def outputs(compute, examples, plan, shape, device):
    """Each row's hidden states."""
    found = {}
    for rows in plan:
        batch, _ = examples.pack(rows, shape)
        parts = compute(batch.to(device)).split(batch.cu_seqlens.diff().tolist())
        found |= {int(row): part.clone() for row, part in zip(rows, parts, strict=False)}
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("device", "width", "heads", "tokens"),
    [
        ("cpu", 96, 3, 1021),
        *(
            pytest.param("cuda", width, heads, tokens, marks=cuda)
            for width, heads in ((384, 12), (768, 12), (1024, 16))
            for tokens in (4096, 8191, 32768)
        ),
    ],
)
def test_what_a_row_gives_does_not_depend_on_its_pack(precision, device, width, heads, tokens):
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads, "vocab_size": 1000}
    model = tiny_bert(num_hidden_layers=3, max_position_embeddings=512, initializer_range=0.05, **sizes)
    rows = 8 * tokens // 250
    examples = made_up_rows(rows, vocab=1000, longest=500 if device == "cuda" else 120)
    plans = [epoch_plan(examples, np.arange(rows), tokens, None, seed=0, epoch=epoch) for epoch in range(2)]
    shape = PackShape.of(plans, examples)
    compute = EagerPrefix(model.bert.to(device), 3, precision)
    graphed = GraphedPrefix(compute) if device == "cuda" and precision == "bf16" else compute
    first, second = (outputs(graphed, examples, plan, shape, device) for plan in plans)
    differ = [row for row in range(rows) if not torch.equal(first[row], second[row])]
    assert differ == []
    alone = outputs(compute, examples, [np.array([0])], None, device)
    torch.testing.assert_close(alone[0], first[0], atol=0.1, rtol=0.1)

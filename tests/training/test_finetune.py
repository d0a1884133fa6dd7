"""Whole runs: the best epoch is the one kept, and what there is to learn is learnt."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from bertforge.artifact import hash_file
from bertforge.columns.transform import TabularSpec
from bertforge.data.prepare import PrepareOptions
from bertforge.data.prepared import PreparedData
from bertforge.determinism import seed_everything
from bertforge.errors import ArtifactError, DataError, MachineError, UsageError
from bertforge.evaluation.temperature import fit_temperature
from bertforge.hardware import detect
from bertforge.inference.predictor import Predictor
from bertforge.models import MINILM_HUB_ID
from bertforge.training import loop
from bertforge.training.finetune import assemble, finetune, label_shares
from bertforge.training.loop import Trainer
from tests.runs import STEPS, made_up, make_base, needs_the_minilm_package, prepare_frame, quick_recipe
from tests.training.clock import Clock


def test_a_loss_that_is_no_number_is_a_line_that_says_what_to_change(tmp_path, data, base):
    with pytest.raises(DataError, match=r"the loss became nan at step \d+; lower lr or set precision=fp32"):
        finetune(data, tmp_path / "run", quick_recipe(base, lr=1e30, epochs=1))


@pytest.mark.skipif((detect().capability or (0, 0)) >= (8, 9), reason="this machine has FP8")
def test_fp8_is_refused_where_the_machine_has_none_and_leaves_nothing_behind(tmp_path, data, base):
    with pytest.raises(MachineError, match=r"precision=fp8, but .* has no FP8 arithmetic .*; set precision=auto"):
        finetune(data, tmp_path / "run", quick_recipe(base, "lora", precision="fp8"))
    assert not (tmp_path / "run").exists()


def test_fp8_is_refused_where_nothing_is_frozen(tmp_path, data, base):
    recipe = quick_recipe(base, precision="fp8")
    run = assemble(PreparedData.open(data), recipe, torch.device("cpu"))
    with pytest.raises(UsageError, match="precision=fp8 "):
        Trainer(run.model, run.split, recipe, tmp_path, "fp8")


def test_minutes_end_a_run_within_an_epoch_at_a_learning_rate_of_zero(tmp_path, data, base, monkeypatch):
    """By a clock that a step moves by a second, the third epoch is cut after three of its steps."""
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    run, steps = tmp_path / "run", 2 * STEPS + 3
    monkeypatch.setattr(loop, "_POINT_STEPS", 1)
    recipe = quick_recipe(base, epochs=6, minutes=(steps - 1.5) / 60)
    manifest = finetune(data, run, recipe, show=lambda progress, sequences, loss: clock.pass_by(1))
    epochs = [point for point in manifest["history"] if "epoch" in point]
    assert [point["step"] for point in epochs] == [STEPS, 2 * STEPS, steps]
    rates = [point["train/lr"] for point in manifest["history"] if "train/lr" in point]
    assert rates[-1] < 0.1 * max(rates), "it has fallen with the time, not with the steps of six epochs"
    assert Predictor.load(run, "fp32").predict(["a question"])["label"].notna().all()


def test_minutes_that_suffice_change_no_bit(tmp_path, data, base):
    weights = []
    for name, minutes in (("free", None), ("limited", 30.0)):
        finetune(data, tmp_path / name, quick_recipe(base, "lora", minutes=minutes, start="random"))
        weights.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory, data, base):
    """A run that gets worse before it ends, and its manifest."""
    out = tmp_path_factory.mktemp("overfitted") / "run"
    return out, finetune(data, out, quick_recipe(base, lr=1e-2, epochs=12, patience=2))


def test_patience_ends_a_run_early(overfitted):
    metrics = overfitted[1]["metrics"]
    assert metrics["epochs"] < 12
    assert metrics["epochs"] - metrics["best_epoch"] == 2


def test_the_best_epochs_weights_are_the_ones_saved(overfitted, data):
    out, manifest = overfitted
    predictor, prepared = Predictor.load(out, "fp32"), PreparedData.open(data)
    rows = prepared.rows("random", "validation")
    logits = torch.from_numpy(predictor.logits(prepared.texts(rows)))
    labels = torch.from_numpy(prepared.labels[rows])
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    epochs = [point for point in manifest["history"] if "epoch" in point]
    kept, last = min(epochs, key=lambda point: point["epoch/calibrated_loss"]), epochs[-1]
    assert manifest["metrics"]["best_epoch"] == kept["epoch"]
    assert loss == pytest.approx(kept["epoch/validation_loss"], rel=1e-5)
    assert loss != pytest.approx(last["epoch/validation_loss"], rel=1e-3)
    assert manifest["metrics"]["validation_loss"] == kept["epoch/validation_loss"]
    temperature = fit_temperature(logits, labels)
    assert manifest["temperature"] == pytest.approx(temperature, rel=1e-3)
    calibrated = torch.nn.functional.cross_entropy(logits / temperature, labels).item()
    assert calibrated == pytest.approx(kept["epoch/calibrated_loss"], rel=1e-4)
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    assert manifest["metrics"]["validation_accuracy"] == pytest.approx(accuracy)


def test_what_a_text_says_plainly_is_learnt(tmp_path, base):
    rng = np.random.default_rng(0)
    words = ["the", "of", "a", "we", "you", "they", "over", "under", "with", "from", "table", "chair", "river", "stone"]
    keys = {"ham": ["meeting", "report"], "spam": ["winner", "prize"]}
    rows = []
    for _ in range(300):
        label = str(rng.choice(["ham", "spam"]))
        text = [*rng.choice(words, 6), rng.choice(keys[label])]
        rng.shuffle(text)
        rows.append((" ".join(text), label))
    options = PrepareOptions(text_columns=("text",), label_column="label")
    mails = prepare_frame(pd.DataFrame(rows, columns=["text", "label"]), tmp_path / "mails", base, options)
    manifest = finetune(mails, tmp_path / "run", quick_recipe(base, lr=1e-2, epochs=8, tokens_per_step=256))
    epochs = [point for point in manifest["history"] if "epoch" in point]
    assert manifest["metrics"]["validation_accuracy"] > 0.9
    assert epochs[0]["epoch/train_loss"] > 2 * epochs[-1]["epoch/train_loss"]
    predicted = Predictor.load(tmp_path / "run").predict(["a winner from the river", "we chair the meeting"])
    assert predicted["label"].tolist() == ["spam", "ham"]


def trained(data, base, folder, kind):
    """The assembled run, and its model's parameters before and after training, adapters' base names plain."""
    seed_everything(0)
    recipe = quick_recipe(base, kind)
    run = assemble(PreparedData.open(data), recipe, torch.device("cpu"))
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    folder.mkdir()
    Trainer(run.model, run.split, recipe, folder, "fp32").fit(lambda progress, sequences, loss: None)
    return before, dict(run.model.named_parameters())


def test_lora_leaves_the_base_models_weights_alone(tmp_path, data, base):
    before, after = trained(data, base, tmp_path / "run", "lora")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    learnt = {name for name in before if "lora_" in name or name.startswith("classifier")}
    assert changed == learnt
    assert len(before) > len(learnt)


def test_a_new_pooler_is_trained_and_saved_with_the_adapter(tmp_path, data):
    base = make_base(tmp_path / "base")
    weights = base / "model.safetensors"  # as of a model pretrained on masked words alone
    save_file({name: t for name, t in load_file(weights).items() if not name.startswith("bert.pooler")}, weights)
    before, after = trained(data, base, tmp_path / "training", "lora")
    assert not torch.equal(before["bert.pooler.dense.weight"], after["bert.pooler.dense.weight"])
    assert torch.equal(before["bert.embeddings.LayerNorm.weight"], after["bert.embeddings.LayerNorm.weight"])
    finetune(data, tmp_path / "run", quick_recipe(base, "lora", epochs=1))
    Predictor.load(tmp_path / "run")  # its golden rows agree, or it would not load
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["modules_to_save"] == [
        "classifier",
        "pooler",
    ]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_on_a_relative_folder_loads_from_elsewhere(tmp_path, data, base, monkeypatch, kind):
    monkeypatch.chdir(base.parent)
    finetune(data, tmp_path / "run", quick_recipe(base.name, kind, epochs=1))
    monkeypatch.chdir(tmp_path)
    assert Predictor.load("run").manifest["base"]["model"] == str(base)
    if kind == "lora":
        assert json.loads(Path("run/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


@needs_the_minilm_package
def test_peft_is_told_minilms_name_on_the_hub(tmp_path, data, monkeypatch):
    monkeypatch.delenv("BERTFORGE_MINILM", raising=False)
    finetune(data, tmp_path / "run", quick_recipe("minilm", "lora", epochs=1, max_length=8, tokens_per_step=4096))
    described = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == MINILM_HUB_ID
    assert json.loads((tmp_path / "run" / "bertforge.json").read_text())["base"]["model"] == "minilm"


def test_a_run_on_another_folders_minilm_says_which_weights_it_was_trained_on(tmp_path, data, base, monkeypatch):
    monkeypatch.setenv("BERTFORGE_MINILM", str(base))
    manifest = finetune(data, tmp_path / "run", quick_recipe("minilm", "lora", epochs=1))
    assert manifest["base"] == {"model": "minilm", "weights": hash_file(base / "model.safetensors")}
    described = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(base), "PEFT is not sent to other weights"
    monkeypatch.setenv("BERTFORGE_MINILM", str(make_base(tmp_path / "other", seed=1)))
    with pytest.raises(ArtifactError, match=r"was trained on minilm with weights sha256:.* but .*/other holds sha256:"):
        Predictor.load(tmp_path / "run")


def test_a_text_recipe_on_a_model_with_columns_is_refused(tmp_path, data, runs):
    recipe = quick_recipe(runs["columns"], "full")
    with pytest.raises(UsageError, match=r"columns reads columns beside the text, but the recipe has no \[tabular\]"):
        finetune(data, tmp_path / "run", recipe)
    assert not (tmp_path / "run").exists()


def test_full_training_moves_every_weight_that_a_text_reaches(tmp_path, data, base):
    before, after = trained(data, base, tmp_path / "run", "columns")
    still = [name for name in before if torch.equal(before[name], after[name])]
    # A key's bias moves all scores of a query alike, so its gradient is zero but for rounding.
    assert [name for name in still if not name.endswith("key.bias")] == []


@pytest.mark.parametrize(
    "columns",
    [
        {"numeric": ["hour"]},
        {"categorical": ["first_tag"], "hidden_size": 4, "bins": 3},
        {"multi": "tags", "hidden_size": 4},
    ],
    ids=["numbers joined directly", "names alone, with bins asked for", "several names alone"],
)
def test_columns_can_be_of_one_kind_only(tmp_path, data, base, columns):
    finetune(data, tmp_path / "run", quick_recipe(base, "lora", tabular=columns, epochs=1))
    spec = Predictor.load(tmp_path / "run").transform.spec  # its golden rows agree, or it would not load
    assert spec == TabularSpec.of(**columns)


def test_transforms_are_fitted_on_train_rows_alone(tmp_path, base, data):
    frame = made_up(160)
    prepared = PreparedData.open(data)
    outside = np.concatenate([prepared.rows("random", part) for part in ("validation", "test")])
    frame.loc[outside, "ReputationAtPostCreation"] = "123456"
    frame.loc[outside, "Tag1"] = "never-seen"
    other = PreparedData.open(prepare_frame(frame, tmp_path / "other", base))
    assert np.array_equal(other.split("random"), prepared.split("random"))
    recipe, cpu = quick_recipe(base, "columns"), torch.device("cpu")
    ours, theirs = assemble(prepared, recipe, cpu), assemble(other, recipe, cpu)
    assert ours.transform == theirs.transform
    train = ours.split.train
    numbers, others = (run.split.examples.tabular["numeric"] for run in (ours, theirs))
    assert np.array_equal(numbers[train], others[train])
    assert not np.array_equal(numbers, others)


def test_the_curves_are_json_lines_of_steps_and_epochs(runs):
    points = [json.loads(line) for line in (runs["full"] / "metrics.jsonl").read_text().splitlines()]
    assert [(point["step"], "epoch" in point) for point in points] == [
        *((STEPS, False), (STEPS, True), (2 * STEPS, False), (2 * STEPS, True))
    ]
    assert points[0]["train/loss"] == points[1]["epoch/train_loss"]
    assert points == json.loads((runs["full"] / "bertforge.json").read_text())["history"]


def test_a_label_without_train_rows_is_an_error(tmp_path, base):
    # Split by time, the last rows are the test part: only they are of the third class.
    frame = pd.DataFrame({"text": [f"text {i}" for i in range(60)], "day": pd.date_range("2020-01-01", periods=60)})
    frame["label"] = ["a", "b"] * 28 + ["c"] * 4
    options = PrepareOptions(text_columns=("text",), label_column="label", date_column="day")
    prepared = prepare_frame(frame.astype(str), tmp_path / "data", base, options)
    with pytest.raises(DataError, match="the train rows hold no 'c'; prepare more rows of it"):
        finetune(prepared, tmp_path / "run", quick_recipe(base, split="time"))


def test_a_run_tells_its_shares_of_labels_and_what_its_rows_looked_like(data, base, runs):
    """Shares as the loss weighs them; columns as the model reads them."""
    prepared = PreparedData.open(data)
    train, validation = (prepared.rows("random", part) for part in ("train", "validation"))
    manifests = {kind: json.loads((folder / "bertforge.json").read_text()) for kind, folder in runs.items()}
    counts = np.bincount(prepared.labels[train])
    assert manifests["full"]["label_shares"] == pytest.approx(counts / counts.sum())
    assert counts[0] != counts[1], "or the next line shows nothing"
    run = assemble(prepared, quick_recipe(base, split="random"), torch.device("cpu"))
    assert label_shares(run.split, quick_recipe(base, class_weights="balanced")) == pytest.approx([0.5, 0.5])
    assert set(manifests["full"]["reference"]) == {"tokens", "unknown tokens", "label"}
    found = manifests["columns"]["reference"]
    assert {"column reputation", "column first_tag", "column tags"} < set(found)
    for name, rows in (("tokens", train), ("column reputation", train), ("label", validation)):
        assert sum(found[name]["counts"]) == len(rows), name

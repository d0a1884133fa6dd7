"""A run that starts from a linear probe: the fit, the model it sets, what is saved, and going on after a stop."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression

from bertforge.data.loader import Split
from bertforge.data.prepare import PrepareOptions
from bertforge.data.prepared import PreparedData
from bertforge.determinism import seed_everything
from bertforge.errors import ArtifactError, DataError
from bertforge.evaluation.logits import predict_logits
from bertforge.inference.predictor import Predictor
from bertforge.jobs.merge import merge_run
from bertforge.training import finetune as module
from bertforge.training.finetune import assemble, finetune
from bertforge.training.start import PENALTIES, _FirstTokens, _logistic_regression, _logits, probe
from tests.runs import KINDS, STEPS, make_base, prepare_frame, quick_recipe
from tests.training.test_resume import CrashError, crash, crash_after, outcome

CPU = torch.device("cpu")
KEYS = {"bill": ["invoice", "payment"], "trip": ["train", "hotel"], "food": ["bread", "soup"]}


def letters(rows=300, seed=0):
    """Texts of which one word tells the class."""
    rng = np.random.default_rng(seed)
    words = ["the", "of", "a", "we", "you", "they", "over", "under", "with", "from", "table", "chair", "river"]
    labels = rng.choice(list(KEYS), rows)
    texts = [" ".join(rng.permutation([*rng.choice(words, 4), *[rng.choice(KEYS[label])] * 2])) for label in labels]
    return pd.DataFrame({"text": texts, "label": labels})


def prepared_letters(folder, base, frame):
    return prepare_frame(frame, folder, base, PrepareOptions(text_columns=("text",), label_column="label"))


@pytest.fixture(scope="module")
def mail(tmp_path_factory, base):
    return prepared_letters(tmp_path_factory.mktemp("mail") / "letters", base, letters())


def assembled(data, recipe):
    seed_everything(recipe.seed)
    return assemble(PreparedData.open(data), recipe, CPU)


def probed_recipe(base, kind="full", **changes):
    """Small steps of training: the probe has learnt the most of it."""
    return quick_recipe(base, kind, **{"start": "probe", "lr": 1e-4, **changes})


def pooled(run, rows):
    """`[rows, hidden]`: what the classifier reads of the text."""
    first = torch.from_numpy(predict_logits(_FirstTokens(run.model.bert), run.split.examples, rows, "fp32"))
    with torch.no_grad():
        return run.model.bert.pooler(first)


def test_the_logistic_regression_is_scikit_learns():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    features = np.tanh(rng.normal(size=(3, 12))[labels] + rng.normal(size=(400, 12)))
    for penalty in (0.1, 0.003):
        theirs = LogisticRegression(C=1 / (400 * penalty), tol=1e-10, max_iter=10_000).fit(features, labels)
        for dtype, tolerance in ((torch.float64, 1e-4), (torch.float32, 2e-3)):
            x = torch.from_numpy(features).to(dtype)
            ours = _logistic_regression(x, torch.from_numpy(labels), torch.zeros(3, 13, dtype=dtype), penalty)
            np.testing.assert_allclose(_logits(x, ours).softmax(1), theirs.predict_proba(features), atol=tolerance)
            np.testing.assert_allclose(ours[:, :-1], theirs.coef_, atol=10 * tolerance)
    assert np.abs(theirs.coef_).max() > 1, "the last fit is far from zero"


def test_a_probe_tells_classes_apart_where_a_random_classifier_does_not(mail, base):
    run = assembled(mail, probed_recipe(base))
    rows, labels = run.split.validation, run.split.examples.labels[run.split.validation]

    def accuracy():
        return (predict_logits(run.model, run.split.examples, rows, "fp32").argmax(1) == labels).mean()

    random = accuracy()
    found = probe(run.model, run.split, "fp32", seed=42)
    assert accuracy() == pytest.approx(found["validation_accuracy"])
    assert found["validation_accuracy"] > max(0.75, random + 0.3)
    assert found["rows"] == len(run.split.train)
    logits = torch.from_numpy(predict_logits(run.model, run.split.examples, rows, "fp32"))
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).item()
    assert loss == pytest.approx(found["validation_loss"], rel=1e-4), "the model computes what was fitted"


def test_validation_rows_choose_the_penalty(mail, base):
    run = assembled(mail, probed_recipe(base))
    assert probe(run.model, run.split, "fp32", seed=42)["penalty"] < max(PENALTIES)
    nothing_to_learn = np.random.default_rng(0).permutation(run.split.examples.labels)
    split = replace(run.split, examples=replace(run.split.examples, labels=nothing_to_learn))
    assert probe(run.model, split, "fp32", seed=42)["penalty"] == max(PENALTIES)


def test_the_pooler_standardises_what_it_reads(mail, base):
    run = assembled(mail, probed_recipe(base))
    before = torch.atanh(pooled(run, run.split.train))
    probe(run.model, run.split, "fp32", seed=42)
    after = torch.atanh(pooled(run, run.split.train))
    assert after.mean(dim=0).abs().max() < 1e-4
    torch.testing.assert_close(after.std(dim=0, correction=0), torch.full((after.shape[1],), 0.5), atol=1e-3, rtol=0)
    assert before.mean(dim=0).abs().max() > 1e-2


def test_the_classifiers_part_that_reads_columns_starts_at_zero(data, base):
    run = assembled(data, probed_recipe(base, "columns"))
    width, weight = run.model.config.hidden_size, run.model.classifier.weight
    assert weight[:, width:].abs().min() > 0
    probe(run.model, run.split, "fp32", seed=42)
    assert weight[:, width:].abs().max() == 0
    assert weight[:, :width].abs().min() > 0


def test_bfloat16_finds_about_the_same(mail, base):
    found = {}
    for precision in ("fp32", "bf16"):
        run = assembled(mail, probed_recipe(base))
        found[precision] = probe(run.model, run.split, precision, seed=42)
    assert found["bf16"]["validation_loss"] == pytest.approx(found["fp32"]["validation_loss"], rel=0.2)
    assert found["bf16"]["validation_loss"] != found["fp32"]["validation_loss"]


def test_validation_rows_without_a_class_do_not_matter(mail, base):
    run = assembled(mail, probed_recipe(base))
    labels = run.split.examples.labels
    without = run.split.validation[labels[run.split.validation] != 2]
    found = probe(run.model, Split(run.split.examples, run.split.train, without), "fp32", seed=42)
    assert found["validation_accuracy"] > 0.75
    assert (pooled(run, run.split.train).abs() < 1).all()


def test_values_that_are_no_numbers_are_told(mail, base):
    run = assembled(mail, probed_recipe(base))
    with torch.no_grad():
        run.model.bert.encoder.layer[1].output.LayerNorm.weight.fill_(torch.inf)
    with pytest.raises(DataError, match="gives values that are no numbers in fp32; set precision=fp32"):
        probe(run.model, run.split, "fp32", seed=42)


def test_a_number_that_never_varies_is_not_blown_up(mail, base):
    run = assembled(mail, probed_recipe(base))
    with torch.no_grad():
        run.model.bert.encoder.layer[1].output.LayerNorm.weight[3] = 0.0
    probe(run.model, run.split, "fp32", seed=42)
    assert run.model.bert.pooler.dense.weight.abs().max() < 1e4
    assert run.model.bert.pooler.dense.weight[3, 3].item() == pytest.approx(500)


# --- which runs are probed ---------------------------------------------------------------------------------------


def test_a_new_classifier_is_probed_and_one_that_was_trained_for_the_labels_is_not(tmp_path, mail, base):
    open_, first = {"start": "", "epochs": 1}, tmp_path / "first"
    probed = finetune(mail, first, probed_recipe(base, **open_))
    assert probed["probe"]["validation_accuracy"] > 0.75
    goes_on = probed_recipe(first, **open_)
    assert not assembled(mail, goes_on).probed
    assert finetune(mail, tmp_path / "second", goes_on)["probe"] is None
    frame = letters()
    frame["label"] = frame["label"].replace({"food": "meal"})
    other = prepared_letters(tmp_path / "other", base, frame)
    assert assembled(other, goes_on).probed, "other labels, so the classifier is new"
    assert assembled(mail, probed_recipe(first)).probed, "asked for"


def test_start_random_leaves_the_pretrained_pooler_alone(mail, base):
    weights = load_file(base / "model.safetensors")
    run = assembled(mail, quick_recipe(base, "lora", start="random"))
    assert not run.probed
    assert torch.equal(run.model.bert.pooler.dense.weight, weights["bert.pooler.dense.weight"])
    assert run.lora.modules_to_save == ("classifier",)


def test_a_probed_poolers_values_are_saved_with_the_adapter_and_not_trained(tmp_path, mail, base):
    run = assembled(mail, probed_recipe(base, "lora"))
    assert run.lora.modules_to_save == ("classifier", "pooler")
    assert not any(parameter.requires_grad for parameter in run.model.bert.pooler.parameters())
    probe(run.model, run.split, "fp32", seed=24)
    expected = run.model.bert.pooler.dense.weight.detach().clone()
    manifest = finetune(mail, tmp_path / "run", probed_recipe(base, "lora"))
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    torch.testing.assert_close(saved["base_model.model.bert.pooler.dense.weight"], expected, atol=1e-3, rtol=1e-3)
    assert expected.diagonal().abs().min() > 0.1, "nothing like pretrained weights, which are near zero"
    random = assembled(mail, quick_recipe(base, "lora", start="random"))
    trainable = sum(p.numel() for p in random.model.parameters() if p.requires_grad)
    assert manifest["trainable_parameters"] == trainable


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_probed_run_is_the_same_model_to_the_predictor_and_to_transformers(tmp_path, mail, base, kind):
    texts = letters(8, seed=5)["text"].tolist()
    finetune(mail, tmp_path / "run", probed_recipe(base, kind))
    ours = Predictor.load(tmp_path / "run", "fp32").logits(texts)
    if kind == "lora":
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "run")
        merge_run(tmp_path / "run", tmp_path / "model")
        np.testing.assert_allclose(Predictor.load(tmp_path / "model", "fp32").logits(texts), ours, atol=1e-4)
    else:
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = theirs.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.numpy()
    np.testing.assert_allclose(logits, ours, atol=1e-4)  # of logits up to 5
    assert np.ptp(ours, axis=0).min() > 0.5, "the texts are told apart"


def test_a_probe_helps_an_encoder_that_came_without_a_pooler(tmp_path, mail):
    base = make_base(tmp_path / "base")
    weights = base / "model.safetensors"  # as of a model pretrained on masked words alone
    save_file({name: t for name, t in load_file(weights).items() if not name.startswith("bert.pooler")}, weights)
    manifest = finetune(mail, tmp_path / "run", probed_recipe(base, "lora", start=""))
    assert manifest["probe"]["validation_accuracy"] > 0.75
    Predictor.load(tmp_path / "run")  # its golden rows agree, or it would not load


# --- after a stop ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data, base):
    folder = tmp_path_factory.mktemp("uninterrupted")
    for kind in KINDS:
        finetune(data, folder / kind, stopping(base, kind, 3600))
    return {kind: outcome(folder / kind, kind) for kind in KINDS}


def stopping(base, kind, seconds):
    return probed_recipe(base, kind, attention_dropout=0.1, checkpoint_seconds=seconds)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("step", "seconds"),
    [(1, 3600), (3, 0), (STEPS + 3, 0), (STEPS + 3, 3600)],
    ids=["before the first checkpoint", "in epoch 1", "in epoch 2", "back to the end of epoch 1"],
)
def test_a_crashed_run_ends_as_one_that_never_stopped(tmp_path, data, base, uninterrupted, kind, step, seconds):
    out = tmp_path / "run"
    with pytest.raises(CrashError):
        finetune(data, out, stopping(base, kind, seconds), show=crash_after(step))
    found = []
    finetune(data, out, stopping(base, kind, seconds), resume=True, started=lambda plan: found.append(plan.probe))
    assert outcome(out, kind) == uninterrupted[kind]
    assert found[0]["validation_loss"] == json.loads((out / "bertforge.json").read_text())["probe"]["validation_loss"]
    assert not (out / "start.safetensors").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_while_it_probed_probes_anew(tmp_path, data, base, uninterrupted, kind, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(module, "probe", crash)
        with pytest.raises(CrashError):
            finetune(data, out, stopping(base, kind, 3600))
    assert (out / "running.json").is_file()
    assert not (out / "start.safetensors").exists()
    finetune(data, out, stopping(base, kind, 3600), resume=True)
    assert outcome(out, kind) == uninterrupted[kind]


def test_a_resumed_run_takes_what_was_found_and_does_not_probe_again(tmp_path, data, base, uninterrupted, monkeypatch):
    out = tmp_path / "run"
    with pytest.raises(CrashError):
        finetune(data, out, stopping(base, "lora", 0), show=crash_after(2))
    monkeypatch.setattr(module, "probe", crash)
    finetune(data, out, stopping(base, "lora", 0), resume=True)
    assert outcome(out, "lora") == uninterrupted["lora"]


@pytest.mark.parametrize("damage", ["cut in half", "empty", "of other shapes", "gone"])
def test_a_damaged_start_is_one_line(tmp_path, data, base, damage):
    out = tmp_path / "run"
    with pytest.raises(CrashError):
        finetune(data, out, stopping(base, "lora", 0), show=crash_after(2))
    path = out / "start.safetensors"
    content = path.read_bytes()
    if damage == "of other shapes":
        save_file({name: torch.zeros(1) for name in load_file(path)}, path, metadata={"found": "{}"})
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    with pytest.raises(ArtifactError, match=r"start\.safetensors is missing or damaged .*; start the run anew: rm -r"):
        finetune(data, out, stopping(base, "lora", 0), resume=True)


def test_another_start_is_another_run(tmp_path, data, base):
    out, recipe = tmp_path / "run", stopping(base, "lora", 0)
    with pytest.raises(CrashError):
        finetune(data, out, recipe, show=crash_after(2))
    with pytest.raises(ArtifactError, match="was started with start probe, not random; resume with the same"):
        finetune(data, out, replace(recipe, start="random"), resume=True)

"""The report: complete, inert, reproducible, and honest about what is missing or made up."""

import re
import subprocess
import sys
from dataclasses import fields, replace
from functools import cache
from html.parser import HTMLParser

import numpy as np
import pytest

from bertforge.errors import MachineError
from bertforge.evaluation import figures
from bertforge.evaluation.bootstrap import Estimate
from bertforge.evaluation.compare import compare
from bertforge.evaluation.curves import reliability, roc_curves
from bertforge.evaluation.decisions import Policy, outcome
from bertforge.evaluation.groups import by_length, by_month, confident_mistakes
from bertforge.evaluation.metrics import classification_metrics
from bertforge.evaluation.report import Report, metrics_markdown, write_report
from bertforge.evaluation.scores import log_softmax
from bertforge.evaluation.standing import Rival, Standing

HOSTILE = "<script>alert('x')</script><img src=http://example.com/x onerror=alert(1)> $a_b$ & \"q\""
SECTIONS = [
    "Metrics",
    "Baselines",
    "Loss curves",
    "ROC",
    "Calibration",
    "Decisions",
    "Confusion matrix",
    "Accuracy by text length",
    "Accuracy by month",
    "Trials",
    "Engines",
    "Quantization",
    "Paired tests",
    "Most confident mistakes",
    "Recipe",
    "Data fingerprint",
    "Versions",
]
LEAD = Estimate(0.1, 0.05, 0.15)
ABSENT = {field.name: None for field in fields(Report) if field.default is None}


class Page(HTMLParser):
    """Tags with their attributes, the headings, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "img", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def made_report(labels=2, names=("open", "closed"), **changes) -> Report:
    return replace(_made_report(labels, tuple(names)), **changes)


@cache
def _made_report(labels: int, names: tuple[str, ...]) -> Report:
    generator = np.random.default_rng(0)
    true = generator.integers(labels, size=300)
    logits = generator.normal(size=(300, labels))
    logits[np.arange(300), true] += 1
    dates = np.datetime64("2011-01-01") + generator.integers(500, size=300)
    return Report(
        title="lora-r8",
        subtitle="on the test split",
        made_up=False,
        metrics=classification_metrics(logits, true, names, bootstrap=20),
        standing=Standing("test", 300, 0.9, 0.85, None, (Rival("word counts", 300, 0.8, 0.7, 0.9, LEAD, 99, 1.0),)),
        comparisons=[compare(logits[:, ::-1], logits, true, names=("before", "after"), bootstrap=20)],
        steps=[{"step": s, "epoch": 1 + s // 400, "loss": 1 / (1 + s)} for s in range(0, 800, 2)],
        epochs=[
            {"epoch": e, "train_loss": 0.5, "validation_loss": 0.6 - 0.1 * e, "validation_accuracy": 0.7}
            for e in (1, 2)
        ],
        roc=roc_curves(logits, true, names),
        reliability=reliability(logits, true),
        uncalibrated=reliability(3 * logits, true),
        decisions=outcome(Policy(names, (0.7,) * labels), np.exp(log_softmax(logits)), true),
        by_length=by_length(logits, true, generator.integers(1, 512, size=300)),
        by_month=by_month(logits, true, dates),
        mistakes=confident_mistakes(logits, true, names, texts=["Why does it fail?"] * 300),
        recipe={"variant": "lora-r8", "lora": {"r": 8, "targets": ["query", "value"]}},
        fingerprint="sha256:0123",
        versions={"torch": "2.11.0"},
        trials=[{"name": "LoRA, fast", "rows_seen": 1280, "loss": 0.5, "accuracy": 0.8, "seconds": 12.3}],
        engines=[
            {
                "target": "openvino",
                "precision": "bf16",
                "questions_per_s": 290.0,
                "accuracy": 0.8,
                "accuracy_of_model": 0.81,
                "ran": "bf16",
                "rows": 1000,
                "why": "",
            },
            {"target": "openvino", "precision": "int8", "why": "passed over: no time"},
        ],
        quantization={
            "precision": "int8",
            "chosen_calibration": "percentile 99.999",
            "calibration_rows": 300,
            "ranking_rows": 250,
            "quantized_share_of_work": 0.92,
            "ptq": {"rows": 1000, "verdict": "no difference shown"},
            "sensitivity": [
                {
                    "name": "ffn-down",
                    "work": 0.31,
                    "alone": {"divergence": 0.00206, "changed_labels": 5},
                    "spared": {"divergence": 0.0005, "changed_labels": 2},
                },
                {
                    "name": "qkv",
                    "work": 0.23,
                    "alone": {"divergence": 0.00103, "changed_labels": 3},
                    "spared": {"divergence": 0.0011, "changed_labels": 4},
                },
            ],
        },
    )


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> str:
    return write_report(tmp_path_factory.mktemp("report") / "deep" / "report.html", made_report()).read_text()


def headings(html: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", html)


def test_a_full_report_has_every_section_and_leaves_nothing_out(full):
    page = Page(full)
    assert headings(full) == SECTIONS
    assert "Left out" not in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 5
    assert page.open == []
    for shown in ("Accuracy", "sha256:0123", "lora.targets", "query, value", "2.11.0", "Why does it fail?", "McNemar"):
        assert shown in page.text


def test_the_report_loads_nothing_and_runs_nothing(full):
    page = Page(full)
    loading = {"script", "link", "img", "iframe", "object", "embed", "video", "audio", "base", "form", "a"}
    assert not loading & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action"):
                assert value.startswith("#")
    assert "@import" not in full
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)'\"]*)", full))
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_everything_from_data_is_escaped(tmp_path):
    names = (HOSTILE, "closed" + HOSTILE)
    report = made_report(
        names=names,
        title=HOSTILE,
        subtitle=HOSTILE,
        recipe={HOSTILE: {HOSTILE: [HOSTILE]}},
        fingerprint={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
    )
    labels, logits = np.zeros(5, dtype=int), np.tile([0.0, 1.0], (5, 1))
    mistakes = confident_mistakes(logits, labels, names, texts=[HOSTILE] * 5, row_ids=[HOSTILE] * 5)
    comparison = compare(logits, -logits, labels, names=(HOSTILE, HOSTILE), bootstrap=5)
    groups = tuple(replace(group, name=HOSTILE) for group in report.by_length)
    report = replace(report, mistakes=mistakes, comparisons=[comparison], by_length=groups)
    html = write_report(tmp_path / "r.html", report).read_text()
    page = Page(html)
    assert "<script" not in html
    assert "<img" not in html
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert page.text.count("<script>") > 20  # shown as text, not run


def test_dollar_signs_in_a_figure_are_not_set_as_mathematics():
    group = replace(made_report().by_length[0], name="$a_b$")
    assert ">$a_b$</text>" in figures.groups([group], 0.5, "length")


@pytest.mark.filterwarnings("error")
def test_labels_of_any_script_and_with_an_underscore_stand_in_the_legend():
    names = ("_x", "质量", "y")
    curves = [replace(curve, label=name) for curve, name in zip(made_report(3, "abc").roc, names, strict=True)]
    svg = figures.roc(curves)
    assert [name for name in names if f">{name}</text>" in svg] == list(names)


def test_the_same_report_gives_the_same_bytes_without_repeated_ids(full, tmp_path):
    assert write_report(tmp_path / "again.html", made_report()).read_text() == full
    ids = [attributes["id"] for _, attributes in Page(full).tags if "id" in attributes]
    assert ids
    assert len(ids) == len(set(ids))
    assert not re.search(r"#0[1-6]0[1-6]0[1-6]", full)  # every placeholder colour became a variable
    assert "var(--accent)" in full


def test_drawing_leaves_matplotlibs_settings_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_report(tmp_path / "r.html", made_report())
    assert dict(matplotlib.rcParams) == before


def test_absent_input_keeps_its_section_and_says_so(tmp_path):
    html = write_report(tmp_path / "bare.html", made_report(**ABSENT)).read_text()
    assert headings(html) == SECTIONS
    assert html.count("Left out: ") == len(SECTIONS) - 2  # metrics and confusion matrix are always there


@pytest.mark.parametrize("present", sorted(ABSENT))
def test_each_input_fills_its_own_section(present, tmp_path):
    report = made_report()
    html = write_report(
        tmp_path / "r.html", replace(report, **(ABSENT | {present: getattr(report, present)}))
    ).read_text()
    assert html.count("Left out: ") == len(SECTIONS) - 3


def test_what_fit_tried_is_shown_with_what_came_of_it(full):
    text = " ".join(Page(full).text.split())
    assert "LoRA, fast1,2800.5000 80.00%12" in text
    assert "openvino bf16 290 80.00%81.00%1,000kept openvino int8 passed over: no time" in text


def test_the_baselines_stand_beside_the_model_with_the_verdict(full):
    text = " ".join(Page(full).text.split())
    assert "The model beats word counts: 90.0% beside 80.0%, difference +10.0 points (+5.0 to +15.0)." in text
    assert "word counts, fitted on 99 rows in 1 s80.0%70.0%+10.0 points (+5.0 to +15.0)" in text


def test_no_mistakes_is_not_the_same_as_no_list_of_mistakes(tmp_path):
    html = write_report(tmp_path / "r.html", made_report(**(ABSENT | {"mistakes": ()}))).read_text()
    assert "every row is labelled rightly" in html
    assert "no list of mistakes" not in html


def test_rows_of_one_class_are_reported_with_the_reason(tmp_path):
    metrics = classification_metrics(np.tile([1.0, 0.0], (9, 1)), np.zeros(9, dtype=int), ["open", "shut"], bootstrap=5)
    html = write_report(tmp_path / "r.html", made_report(**(ABSENT | {"metrics": metrics, "roc": ()}))).read_text()
    text = Page(html).text
    assert "the curve is undefined, no row has the label 'shut'" in text
    assert "undefined: no row is predicted as 'shut'" in text


def test_many_labels(tmp_path):
    names = [f"topic {i}" for i in range(15)]
    html = write_report(tmp_path / "r.html", made_report(15, names)).read_text()
    assert html.count('scope="col">predicted topic') == 15
    assert "macro mean of 15 labels" in html


def test_of_very_many_labels_the_most_confused_pairs_are_shown(tmp_path):
    names = [f"topic {i}" for i in range(40)]
    true = np.repeat(np.arange(40), 10)
    predicted = true.copy()
    predicted[70:74] = 3  # 4 of the 10 of topic 7
    predicted[:3] = 9
    metrics = classification_metrics(np.eye(40)[predicted], true, names, bootstrap=5)
    html = write_report(tmp_path / "r.html", made_report(**(ABSENT | {"metrics": metrics}))).read_text()
    assert "predicted topic" not in html
    rows = re.findall(
        r"<tr><td>(.*?)</td><td>(.*?)</td><td class=\"number\">(.*?)</td><td class=\"number\">(.*?)<", html
    )
    assert rows == [("topic 7", "topic 3", "4", "40.0%"), ("topic 0", "topic 9", "3", "30.0%")]


def test_made_up_data_is_labelled_and_real_data_is_not(full, tmp_path):
    made_up = write_report(tmp_path / "r.html", made_report(**ABSENT, made_up=True)).read_text()
    assert "Made-up data" in Page(made_up).text
    assert "Made-up data" not in Page(full).text


def test_markdown_has_one_row_per_metric_and_gives_reasons():
    metrics = classification_metrics(np.tile([1.0, 0.0], (9, 1)), np.zeros(9, dtype=int), ["open", "a|b"], bootstrap=5)
    lines = metrics_markdown(metrics).splitlines()
    assert lines[:2] == ["| metric | value | 95% interval |", "| --- | --- | --- |"]
    assert lines[3] == "| Accuracy | 100.00% | 100.00% to 100.00% |"
    assert lines[8] == "| ROC-AUC | undefined: no row has the label 'a\\|b' |  |"
    assert lines[-1].startswith("9 rows. Precision, recall, F1 and ROC-AUC: label 'a|b'.")


def test_a_missing_library_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)  # what an import of a library that is not installed meets
    with pytest.raises(MachineError, match=r"^reports need jinja2 and matplotlib: pip install 'bertforge\[report\]'$"):
        write_report(tmp_path / "r.html", made_report())
    assert not list(tmp_path.iterdir())


def test_importing_evaluation_loads_no_optional_library():
    modules = [
        "bootstrap",
        "scores",
        "metrics",
        "compare",
        "groups",
        "curves",
        "figures",
        "report",
        "baselines",
        "standing",
    ]
    imports = "; ".join(f"import bertforge.evaluation.{module}" for module in modules)
    check = "import sys; print(sorted({'jinja2', 'matplotlib', 'sklearn', 'torch', 'markupsafe'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"{imports}; {check}"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""The mistakes kept beside a report: found again, compared by their words, refused when changed."""

import json
import shutil
from dataclasses import replace

import pytest

from bertforge.errors import ArtifactError
from bertforge.evaluation.groups import Mistake
from bertforge.evaluation.mistakes import Mistakes, write_mistakes
from bertforge.inference.evaluate import evaluate_run
from bertforge.manifest import MANIFEST

MADE = (
    Mistake("3", 0.99, "open", "closed", "Which laptop should I buy for my studies?"),
    Mistake("8", 0.95, "open", "closed", "How do I sort a list of numbers in the list?"),
    Mistake("5", 0.90, "closed", "open", "Which laptop is the best for a list?"),
    Mistake("9", 0.85, "open", "closed", "What is the the the best?"),
)


def test_the_likest_mistake_with_the_same_label_comes_first():
    found = Mistakes(MADE)
    assert [row.row for row in found.like("sort this LIST, please", "closed")] == ["8"]
    assert [row.row for row in found.like("a laptop for my studies, or a list?", "closed")] == ["3", "8"]
    assert [row.row for row in found.like("a laptop for my studies, or a list?", "closed", most=1)] == ["3"]
    assert [row.row for row in found.like("which laptop", "open")] == ["5"]  # another label's mistakes are its own


@pytest.mark.parametrize("text", ["", "quantum chromodynamics", "?!"])
def test_a_text_that_shares_no_word_is_like_none(text):
    assert Mistakes(MADE).like(text, "closed") == []


def test_no_mistakes_are_like_nothing():
    assert Mistakes(()).like("sort a list", "closed") == []


def test_they_are_found_beside_the_report_of_the_folder_and_of_the_model_that_it_is_an_engine_of(tmp_path):
    for folder in (tmp_path / "model", tmp_path / "model" / "engines" / "openvino-int8"):
        folder.mkdir(parents=True)
        (folder / MANIFEST).write_text("{}")
    write_mistakes(tmp_path / "model" / "report-test.html", "the test part", MADE)
    assert Mistakes.find(tmp_path / "model").rows == MADE
    assert Mistakes.find(tmp_path / "model" / "engines" / "openvino-int8").rows == MADE
    write_mistakes(tmp_path / "model" / "engines" / "openvino-int8" / "report-test.html", "the test part", MADE[:1])
    assert Mistakes.find(tmp_path / "model" / "engines" / "openvino-int8").rows == MADE[:1]
    shutil.move(tmp_path / "model" / MANIFEST, tmp_path / "gone")  # a folder of anybody's
    assert Mistakes.find(tmp_path / "model").rows == ()


def test_a_mistake_of_two_reports_is_shown_once(tmp_path):
    (tmp_path / MANIFEST).write_text("{}")
    write_mistakes(
        tmp_path / "report.html", "the test part, in 8 bits", [replace(row, probability=0.7) for row in MADE]
    )
    write_mistakes(tmp_path / "report-test.html", "the test part", MADE)
    found = Mistakes.find(tmp_path)
    assert len(found.rows) == len(MADE)
    assert len(found.like("which laptop for my studies", "closed")) == 1


def test_a_changed_file_is_refused(tmp_path):
    (tmp_path / MANIFEST).write_text("{}")
    path = write_mistakes(tmp_path / "report.html", "the test part", MADE)
    path.write_text(path.read_text().replace("laptop", "tablet"))
    with pytest.raises(ArtifactError, match=r"report\.mistakes\.json is damaged"):
        Mistakes.find(tmp_path)


def test_an_evaluation_keeps_the_surer_half_of_its_mistakes_with_their_texts(tmp_path, data, runs):
    found = evaluate_run(runs["full"], data, "train")
    wrong = int((found.scored.logits.argmax(axis=1) != found.scored.labels).sum())
    path = found.write_mistakes(tmp_path / "report-train.html")
    assert "train part" in json.loads(path.read_text())["source"]
    (tmp_path / MANIFEST).write_text("{}")
    rows = Mistakes.find(tmp_path).rows
    assert len(rows) == -(-wrong // 2) > 2
    assert [row.probability for row in rows] == sorted((row.probability for row in rows), reverse=True)
    texts = dict(zip(found.scored.lines.tolist(), found.scored.texts, strict=True))
    for row in rows:
        assert row.text == " ".join(texts[int(row.row)].split())  # whole: made-up questions are short
        assert row in Mistakes((*rows, replace(row, text="nothing alike"))).like(row.text, row.predicted)

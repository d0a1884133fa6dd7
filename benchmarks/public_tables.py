"""The public tables of the suite: where each comes from, and which of its columns are the text and the label.

A table is a file that `bertforge prepare` reads, under the name that `file` gives and with any of its suffixes. Nothing
is downloaded here: licences are for a person to read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PublicTable:
    """One table and one way to split it."""

    name: str
    """In commands and records."""
    about: str
    """What a row is and what is asked, for people."""
    file: str
    """The file's name without its suffix."""
    text: tuple[str, ...]
    """Columns; none for the Stack Overflow questions, which are known by their columns."""
    label: str | None
    """Column; None for the Stack Overflow questions."""
    rows: int
    source: str
    """Where a reader gets it, and under which licence."""
    columns: bool = False
    """Whether there are columns beside the text that help."""
    test_rows: int = 0
    """The last rows, so many, are the published test rows; 0 draws test rows at random."""

    def find(self, folder: Path) -> Path:
        """The table's file in `folder`; raises FileNotFoundError where there is none."""
        found = sorted(path for path in folder.glob(f"{self.file}.*") if path.is_file())
        if not found:
            raise FileNotFoundError(f"{folder} has no {self.file}.parquet or .csv ({self.source})")
        return found[0]


_BANKING = {
    "file": "banking77",
    "text": ("text",),
    "label": "category",
    "rows": 13_083,
    "source": "[PolyAI](https://github.com/PolyAI-LDN/task-specific-datasets), `train.csv` and below it `test.csv`, "
    "CC BY 4.0",
}

TABLES = (
    PublicTable(name="banking77", about="customers' questions, 77 intents", **_BANKING),
    PublicTable(
        name="banking77-own-test",
        about="the same, with the published test rows",
        test_rows=3_080,
        **_BANKING,
    ),
    PublicTable(
        name="sms-spam",
        about="text messages, 2 labels, 13% of them spam",
        file="sms_spam_latin1",
        text=("text",),
        label="label",
        rows=5_572,
        source="[UCI](https://archive.ics.uci.edu/dataset/228/sms+spam+collection), CC BY 4.0",
    ),
    PublicTable(
        name="airline-tweets",
        about="tweets about airlines, 3 sentiments; columns such as the airline",
        file="airline_tweets",
        text=("text",),
        label="airline_sentiment",
        rows=14_640,
        source="[Kaggle](https://www.kaggle.com/datasets/crowdflower/twitter-airline-sentiment), CC BY-NC-SA 4.0",
        columns=True,
    ),
    PublicTable(
        name="hate-speech",
        about="tweets (Davidson et al. 2017), 3 labels, 6% of the rarest",
        file="hate",
        text=("text",),
        label="label",
        rows=24_783,
        source="[GitHub](https://github.com/t-davidson/hate-speech-and-offensive-language), `tweet` and `class` of "
        "`labeled_data.csv`, MIT",
    ),
    PublicTable(
        name="germeval-2018",
        about="German tweets, offensive or not",
        file="germeval",
        text=("text",),
        label="label",
        rows=8_541,
        source="[GitHub](https://github.com/uds-lsv/GermEval-2018-Data), both files, the coarse label, CC BY 4.0",
    ),
    PublicTable(
        name="bbc-news",
        about="news of 2004 and 2005 (Greene and Cunningham 2006), 5 labels; long texts",
        file="bbc",
        text=("news",),
        label="type",
        rows=2_225,
        source="[University College Dublin](http://mlg.ucd.ie/datasets/bbc.html), for research only",
    ),
    PublicTable(
        name="stack-overflow",
        about="questions, closed or not; columns such as reputation and tags",
        file="stackoverflow_closed",
        text=(),
        label=None,
        rows=44_878,
        source="[Kaggle](https://www.kaggle.com/c/predict-closed-questions-on-stack-overflow), a part of "
        "`train-sample.csv`, texts CC BY-SA 3.0",
        columns=True,
    ),
)

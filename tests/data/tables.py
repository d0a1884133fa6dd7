"""Small made-up tables for the tests of the data pipeline."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd

COLUMNS = [
    "PostId",
    "PostCreationDate",
    "OwnerUserId",
    "OwnerCreationDate",
    "ReputationAtPostCreation",
    "OwnerUndeletedAnswerCountAtPostTime",
    "Title",
    "BodyMarkdown",
    *(f"Tag{i}" for i in range(1, 6)),
    "PostClosedDate",
    "OpenStatus",
]
STATUSES = ["open", "not a real question", "open", "off topic", "open", "not constructive", "open", "too localized"]


def question(number: int, **changes: str) -> dict[str, str]:
    """Question `number`, posted on day `number` of 2010; every second one is closed."""
    day = pd.Timestamp("2010-01-01") + pd.Timedelta(days=number)
    row = {
        "PostId": str(number),
        "PostCreationDate": day.strftime("%m/%d/%Y 10:30:00"),
        "OwnerUserId": str(number % 7),
        "OwnerCreationDate": "12/31/2009 10:30:00",
        "ReputationAtPostCreation": str(number * 3 - 5),
        "OwnerUndeletedAnswerCountAtPostTime": str(number % 4),
        "Title": f"How do I sort list {number}?",
        "BodyMarkdown": f'It says "no".\r\n\r\n    print({number}, "a,b")\r\n\r\nWhy?',
        "Tag1": ["python", "html", "css"][number % 3],
        "Tag2": "sorting" if number % 2 else "",
        "Tag3": "",
        "Tag4": "",
        "Tag5": "",
        "PostClosedDate": "",
        "OpenStatus": STATUSES[number % len(STATUSES)],
    }
    return row | changes


def questions(count: int) -> pd.DataFrame:
    return pd.DataFrame([question(i) for i in range(count)], columns=COLUMNS)


def write_csv(path: Path, frame: pd.DataFrame) -> Path:
    frame.to_csv(path, index=False, quoting=csv.QUOTE_MINIMAL)
    return path


def write_every_format(folder: Path, frame: pd.DataFrame) -> list[Path]:
    """The same table as CSV, zipped CSV, Parquet and JSON lines."""
    paths = [folder / name for name in ("t.csv", "t.csv.zip", "t.parquet", "t.jsonl")]
    frame.to_csv(paths[0], index=False)
    frame.to_csv(paths[1], index=False, compression={"method": "zip", "archive_name": "t.csv"})
    frame.to_parquet(paths[2], index=False)
    frame.to_json(paths[3], orient="records", lines=True)
    return paths

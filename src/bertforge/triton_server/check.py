"""Does the server answer the golden rows as the engine did? `python check.py [http://127.0.0.1:8000]`

It is copied beside `golden.json`, which holds requests of the Open Inference Protocol v2 and the probabilities that
bertforge gave. It needs Python alone, and ends with 1 where the server differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any


def check(golden: dict[str, Any], server: str) -> tuple[float, int]:
    """The largest difference of a probability on the golden rows, and how many labels are not the most probable."""
    largest, wrong = 0.0, 0
    for row in golden["rows"]:
        url = f"{server.rstrip('/')}/v2/models/{golden['model']}/infer"
        request = urllib.request.Request(url, json.dumps(row["request"]).encode())
        with urllib.request.urlopen(request, timeout=60) as response:
            outputs = {output["name"]: output["data"] for output in json.load(response)["outputs"]}
        found = outputs["probabilities"]
        largest = max(largest, *(abs(one - other) for one, other in zip(found, row["probabilities"], strict=True)))
        wrong += outputs["label"] != [golden["labels"][found.index(max(found))]]
    return largest, wrong


def main() -> int:
    """Says how the answers differ; returns the exit code."""
    golden = json.loads(Path(__file__).with_name("golden.json").read_text())
    parser = argparse.ArgumentParser(description="Ask a Triton server for the golden rows beside this file.")
    parser.add_argument("server", nargs="?", default="http://127.0.0.1:8000", help="address of its HTTP port")
    server: str = parser.parse_args().server
    server = server if "://" in server else f"http://{server}"
    try:
        largest, wrong = check(golden, server)
    except (OSError, HTTPException, ValueError, KeyError) as error:
        told = repr(error)
        if isinstance(error, urllib.error.HTTPError):
            told = f"{error} {error.read().decode(errors='replace')}"
        elif isinstance(error, urllib.error.URLError):
            why = getattr(error.reason, "strerror", None) or error.reason
            told = f"{why}; start the server, or name its address: python check.py http://HOST:PORT"
        print(f"{server} does not answer the golden rows: {' '.join(told.split())}", file=sys.stderr)
        return 1
    told = f"{len(golden['rows'])} golden rows: probabilities differ by {largest:.2g} at most"
    print(f"{told} ({golden['tolerance']:g} may be rounding), and {wrong} labels are wrong")
    return int(wrong > 0 or largest > golden["tolerance"])


if __name__ == "__main__":
    sys.exit(main())

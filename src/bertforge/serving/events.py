"""What a process of the service writes into the log, on its standard error: lines of JSON, requests and events alike.

An event has a name (`event`), and for people a `message` that says the same in words.
"""

from __future__ import annotations

import json
import logging
import sys
import time


def line(**fields: object) -> str:
    """The fields, after the time."""
    return json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **fields})


def tell(event: str, message: str, **fields: object) -> None:
    """Writes an event, whole at once, for the processes share one standard error."""
    sys.stderr.write(line(event=event, message=message, **fields) + "\n")
    sys.stderr.flush()


def take_logging() -> None:
    """What libraries log becomes events too."""
    handler = logging.StreamHandler()
    handler.setFormatter(_EventFormatter())
    logging.basicConfig(handlers=[handler])


class _EventFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return line(event="log", message=super().format(record), level=record.levelname.lower())

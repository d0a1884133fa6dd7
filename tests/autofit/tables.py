"""A small table with a text, columns of each kind and a label, for the tests of `fit`."""

import numpy as np
import pandas as pd

CALM = ("invoice", "order", "parcel", "meeting", "contract", "agenda", "report", "minutes", "draft")
LOUD = ("prize", "winner", "cash", "loan", "casino", "offer", "bonus", "lottery", "reward")


def mails(rows: int = 200, seed: int = 0) -> pd.DataFrame:
    """`folder` follows from the text; `size` says a little, `ticket` is an id, and `action` gives the label away."""
    random = np.random.default_rng(seed)
    is_spam = np.arange(rows) % 2 == 1
    return pd.DataFrame(
        {
            "ticket": [f"T-{number:06d}" for number in random.permutation(rows)],
            "message": [" ".join(random.choice(LOUD if spam else CALM, 6)) for spam in is_spam],
            "size": random.lognormal(3 + is_spam, 1.0, rows).round(2),
            "country": random.choice(["de", "fr", "us"], rows),
            "action": np.where(is_spam, "deleted", "kept"),
            "folder": np.where(is_spam, "spam", "inbox"),
        }
    )

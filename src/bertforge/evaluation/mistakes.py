"""The mistakes that a model was surest of, kept beside its report, and those that are most like a new text.

Who asks a served model is shown questions like theirs that it got wrong: the same label, as sure, and not true. They
stand in a JSON file beside the report, each with the start of its text.

Likeness is the cosine of TF-IDF vectors of words over the mistakes alone (Salton & Buckley 1988), for a few hundred
texts need no index and no library. Only mistakes with the label that the new text was given are compared.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from bertforge.digests import read_sealed, write_sealed
from bertforge.errors import ArtifactError, removal
from bertforge.evaluation.groups import Mistake
from bertforge.manifest import MANIFEST

KEPT = 500
CHARACTERS = 1000
"""Of a text that are kept and compared."""
_SUFFIX = ".mistakes.json"
_LEAST = 0.1  # likeness; below it, two texts share little but common words
_WORD = re.compile(r"\w+")


def write_mistakes(report: Path, source: str, mistakes: Sequence[Mistake]) -> Path:
    """Writes the mistakes on the rows that `source` tells of, surest first, beside an HTML report."""
    rows = [asdict(mistake) for mistake in mistakes]
    return write_sealed(mistakes_beside(report), {"source": source, "mistakes": rows})


def mistakes_beside(report: Path) -> Path:
    """The file that belongs to a report."""
    return report.with_suffix(_SUFFIX)


@dataclass(frozen=True)
class Mistakes:
    """The mistakes of one model, from all its reports."""

    rows: tuple[Mistake, ...]

    @classmethod
    def find(cls, folder: Path) -> Self:
        """Those beside the reports in `folder`, each once; or else in the folder, made by bertforge too, of whose model
        it is an engine or a part. None where nobody evaluated the model.

        Raises ArtifactError for a file that was changed.
        """
        folder = folder.resolve()
        for place in (folder, *folder.parents[:2]):
            if found := sorted(place.glob(f"*{_SUFFIX}")) if (place / MANIFEST).is_file() else []:
                rows = [mistake for path in found for mistake in _read(path)]  # reports may be of the same texts
                return cls(tuple({(row.text, row.true, row.predicted): row for row in rows}.values()))
        return cls(())

    def like(self, text: str, predicted: str, most: int = 3) -> list[Mistake]:
        """The mistakes most like `text` among those that were given the same label, likest first; often none."""
        vector = self._vector(text)
        close = [
            (sum(weight * other.get(word, 0.0) for word, weight in vector.items()), -place)
            for place, other in enumerate(self._vectors)
            if self.rows[place].predicted == predicted
        ]
        return [self.rows[-place] for likeness, place in sorted(close, reverse=True)[:most] if likeness >= _LEAST]

    @cached_property
    def _rarity(self) -> dict[str, float]:
        found = Counter(word for row in self.rows for word in set(_words(row.text)))
        return {word: math.log((1 + len(self.rows)) / count) for word, count in found.items()}

    @cached_property
    def _vectors(self) -> list[dict[str, float]]:
        return [self._vector(row.text) for row in self.rows]

    def _vector(self, text: str) -> dict[str, float]:
        """Word -> weight, of length 1; words that no mistake has are left out."""
        counts = Counter(word for word in _words(text) if word in self._rarity)
        weights = {word: (1 + math.log(count)) * self._rarity[word] for word, count in counts.items()}
        length = math.sqrt(sum(weight**2 for weight in weights.values())) or 1.0
        return {word: weight / length for word, weight in weights.items()}


def _words(text: str) -> list[str]:
    return _WORD.findall(text[:CHARACTERS].lower())


def _read(path: Path) -> list[Mistake]:
    try:
        return [Mistake(**row) for row in read_sealed(path)["mistakes"]]
    except (ValueError, KeyError, TypeError) as error:  # json's errors are ValueErrors
        raise ArtifactError(f"{path} is damaged ({error}); remove it and evaluate again: {removal(path)}") from error

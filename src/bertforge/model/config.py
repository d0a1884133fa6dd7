"""The hyperparameters of a BERT, read from and written to a Hugging Face `config.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from bertforge.artifact import write_json
from bertforge.columns.encoder import TabularConfig
from bertforge.errors import ArtifactError

# What a field may hold: far more than any BERT has. How many numbers all of them make together is compared with the
# weights' file before memory is taken (`classifier.check_size`).
_WHOLE = {
    "vocab_size": (1, 1 << 24),
    "hidden_size": (1, 1 << 16),
    "num_hidden_layers": (1, 1000),
    "num_attention_heads": (1, 1024),
    "intermediate_size": (1, 1 << 18),
    "max_position_embeddings": (2, 1 << 20),
    "type_vocab_size": (1, 1 << 10),
    "pad_token_id": (0, 1 << 24),
}
_BETWEEN = {  # the lowest value, and what the highest must be below
    "hidden_dropout_prob": (0.0, 1.0),
    "attention_probs_dropout_prob": (0.0, 1.0),
    "classifier_dropout": (0.0, 1.0),
    "initializer_range": (0.0, 100.0),
    "layer_norm_eps": (1e-30, 1.0),
}
_MOST_LABELS = 1 << 16
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
_TABULAR_KEY = "bertforge_tabular"


@dataclass(frozen=True)
class BertConfig:
    """Names and defaults are Hugging Face's; what this BERT does not use is not kept."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    """None means `hidden_dropout_prob`."""
    max_position_embeddings: int = 512
    """Longest sequence, in tokens."""
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    """Standard deviation of new weights."""
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    """Label names in the order of the logits."""
    tabular: TabularConfig | None = None
    """None for text alone."""

    def __post_init__(self) -> None:
        """Raises ArtifactError naming the first field that no BERT can have, its value and what is allowed."""
        for name, (least, most) in _WHOLE.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ArtifactError(f"{name} is {_shown(value)}; it must be a whole number from {least:,} to {most:,}")
        for name, (lowest, below) in _BETWEEN.items():
            value = getattr(self, name)
            if value is None and name == "classifier_dropout":
                continue
            if type(value) not in (int, float) or not lowest <= value < below:
                raise ArtifactError(
                    f"{name} is {_shown(value)}; it must be a number from {lowest:g} to below {below:g}"
                )
        if self.hidden_size % self.num_attention_heads:
            raise ArtifactError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.pad_token_id >= self.vocab_size:
            raise ArtifactError(f"pad_token_id is {self.pad_token_id}; it must be below vocab_size {self.vocab_size}")
        if self.hidden_act not in ACTIVATIONS:
            raise ArtifactError(
                f"hidden_act {_shown(self.hidden_act)} is not supported; known: {', '.join(ACTIVATIONS)}"
            )
        if not 1 <= len(self.labels) <= _MOST_LABELS:
            raise ArtifactError(f"there are {len(self.labels):,} labels; a model has 1 to {_MOST_LABELS:,}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def numbers(self) -> int:
        """Parameters of embeddings and encoder."""
        hidden, wide = self.hidden_size, self.intermediate_size
        embeddings = hidden * (self.vocab_size + self.max_position_embeddings + self.type_vocab_size + 2)
        return embeddings + self.num_hidden_layers * (4 * hidden**2 + 2 * hidden * wide + 9 * hidden + wide)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """From a parsed `config.json`; raises ArtifactError for a model that is not a plain BERT encoder.

        The first field that no BERT can have is named with its value and what is allowed. A part of a wrong type raises
        what Python raises; `load` turns it into an ArtifactError that names the file.
        """
        model_type = values.get("model_type", "bert")
        if model_type != "bert":
            raise ArtifactError(f"model_type {model_type!r} is not supported: this is a BERT; name a BERT checkpoint")
        positions = values.get("position_embedding_type", "absolute")
        if positions != "absolute" or values.get("is_decoder") or values.get("add_cross_attention"):
            raise ArtifactError(f"only encoders with absolute positions are supported, not {positions!r} or a decoder")
        known = {field.name for field in fields(cls)} - {"labels", "tabular"}
        given = {name: value for name, value in values.items() if name in known and value is not None}
        if "id2label" in values:
            names = {int(index): str(name) for index, name in values["id2label"].items()}
            if sorted(names) != list(range(len(names))):
                numbers = _shown(sorted(names))
                raise ArtifactError(f"id2label numbers its labels {numbers}; they must run from 0 without a gap")
            given["labels"] = tuple(names[index] for index in range(len(names)))
        elif "num_labels" in values:
            count = values["num_labels"]
            if type(count) is not int or not 1 <= count <= _MOST_LABELS:
                raise ArtifactError(
                    f"num_labels is {_shown(count)}; it must be a whole number from 1 to {_MOST_LABELS:,}"
                )
            given["labels"] = tuple(f"LABEL_{index}" for index in range(count))
        if tabular := values.get(_TABULAR_KEY):
            given["tabular"] = TabularConfig.of(**tabular)
        return cls(**given)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Reads `directory/config.json`; an ArtifactError names it."""
        path = directory / "config.json"
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except FileNotFoundError:
            raise ArtifactError(f"{directory} holds no config.json; it is not a Hugging Face model folder") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path} is not JSON ({error})") from error
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from error
        except (TypeError, ValueError, AttributeError, KeyError, RecursionError) as error:
            raise ArtifactError(f"{path} is damaged ({error!r:.200}); make or download the model again") from error

    def to_dict(self) -> dict[str, Any]:
        """What transformers reads, and our own tabular branch beside it."""
        values = {name: value for name, value in vars(self).items() if name not in ("labels", "tabular")}
        return {
            "architectures": ["BertForSequenceClassification"],
            "model_type": "bert",
            **values,
            "position_embedding_type": "absolute",
            "id2label": {str(index): name for index, name in enumerate(self.labels)},
            "label2id": {name: index for index, name in enumerate(self.labels)},
            **({_TABULAR_KEY: self.tabular.to_dict()} if self.tabular else {}),
        }

    def save(self, directory: Path) -> Path:
        """Writes `directory/config.json`."""
        return write_json(directory / "config.json", self.to_dict())


def _shown(value: Any) -> str:
    return f"{value!r:.60}"

"""A recipe: everything that decides a fine-tuning run except the data. TOML files hold the variants."""

from __future__ import annotations

import difflib
import itertools
import math
import tomllib
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, Self, get_args, get_type_hints

from bertforge.columns.transform import TabularSpec
from bertforge.data.schema import STACK_OVERFLOW, Schema
from bertforge.errors import UsageError
from bertforge.hardware import TRAINING_PRECISIONS
from bertforge.lora.config import LoraConfig

DEFAULT_VARIANT = "lora-r8-all"
STARTS = ("probe", "random")
_KINDS = {  # type of a setting -> how a user calls it
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    tuple[str, ...]: "names with commas between them",
}


@dataclass(frozen=True)
class LoraRecipe:
    """The `[lora]` section: `lora.config.LoraConfig` with layers counted from the top, whatever the model's depth."""

    r: int = 8
    """Rank of the update."""
    lora_alpha: float = 16
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout of the adapters' input."""
    target_modules: tuple[str, ...] = ("query", "value")
    """Linear layers to adapt, by the end of their names."""
    last_layers: int = 0
    """Adapt only this many layers, the ones nearest the head; 0 for all."""

    def __post_init__(self) -> None:
        self.config(self.last_layers, ())  # refuses what no model can be adapted with

    def config(self, num_layers: int, modules_to_save: tuple[str, ...]) -> LoraConfig:
        """For a model of `num_layers`; raises UsageError when it has fewer than `last_layers`."""
        if self.last_layers > num_layers:
            raise UsageError(f"lora.last_layers={self.last_layers}, but the model has {num_layers} layers")
        layers = tuple(range(num_layers - self.last_layers, num_layers)) if self.last_layers else None
        return LoraConfig(self.r, self.lora_alpha, self.lora_dropout, self.target_modules, layers, modules_to_save)


@dataclass(frozen=True)
class Tuned:
    """The `[stackoverflow]` section: settings as `Recipe` has them."""

    tokens_per_step: int
    epochs: int
    lr: float
    head_lr: float | None = None
    warmup: float = 0.06
    start: str = "random"


@dataclass(frozen=True)
class Recipe:
    """Settings of one run; each can be changed with `--set name=value`, those of a section as `--set lora.r=4`."""

    name: str = "custom"
    """What the run is called in reports."""
    model: str = "minilm"
    """Pretrained checkpoint: `minilm`, a folder or a Hugging Face id."""
    split: str = ""
    """Which of the prepared splits to train and validate on: given, random, time or fold-1; none named: the one that
    `prepare` made first."""
    max_length: int = 512
    """Tokens a text is cut to, [CLS] and [SEP] included."""
    rows_per_step: int | None = None
    """Most rows in an optimizer step. None is derived, as every None down to `start` is: training/schedule.py says
    how. Where tokens_per_step is set, no limit."""
    tokens_per_step: int | None = None
    """Most tokens in an optimizer step."""
    epochs: int | None = None
    """Passes over the train rows, fewer when `patience` runs out."""
    lr: float | None = None
    """Peak learning rate (AdamW)."""
    head_lr: float | None = None
    """Peak learning rate of the classifier and the columns' branch."""
    warmup: float | None = None
    """Share of all steps in which the learning rate rises; it then falls linearly to 0."""
    start: str = ""
    """Where the classifier starts: `probe`, a logistic regression on the pretrained model's features, or `random`
    weights. Derived: a new classifier starts with the probe, one that the checkpoint was trained with as it is."""
    minutes: float | None = None
    """Most minutes of steps and validation, wherever they end in an epoch; the learning rate falls to 0 by then. None
    takes the time that the epochs need."""
    patience: int | None = None
    """Epochs without a lower validation loss, after temperature scaling, before training stops; None never stops
    early."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; biases and LayerNorms have none."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    attention_dropout: float = 0.0
    """Dropout of attention weights. The packed CUDA kernel has none, so it is off everywhere by default."""
    class_weights: str = "none"
    """`balanced` weighs each class by rows / (classes * rows of the class); none leaves them alone."""
    label_smoothing: float = 0.0
    """Probability taken from the true class and spread over all (Szegedy et al. 2015, section 7)."""
    precision: str = "auto"
    """fp32; bf16 (autocast; weights stay fp32); fp8: bf16, and a frozen feed-forward's products in 8 bits, on NVIDIA
    GPUs of compute capability 8.9 and later; or auto: bf16 where the hardware is faster at it."""
    seed: int = 42
    """Seeds new weights, dropout and the order of rows."""
    checkpoint_seconds: float = 60
    """The most work, in seconds, that a crash can lose."""
    prefix_cache_gb: float | None = None
    """GB of frozen layers' output that may be kept from epoch to epoch, on the GPU, then in host memory; 0 keeps none.
    None takes what it needs. More than half of what is free is never taken."""
    lora: LoraRecipe | None = None
    """None trains every weight."""
    tabular: TabularSpec | None = None
    """None reads the text alone."""
    stackoverflow: Tuned | None = None
    """What a variant was tuned to on the Stack Overflow questions, and takes there for each setting that is None."""

    def __post_init__(self) -> None:
        choices = {
            "class_weights": ("none", "balanced"),
            "precision": TRAINING_PRECISIONS,
            "start": ("", *STARTS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if not 0 <= self.label_smoothing < 1 or not 0 <= (self.warmup or 0) <= 1 or not 0 <= self.attention_dropout < 1:
            raise UsageError("label_smoothing, warmup and attention_dropout are shares between 0 and 1")
        sizes = ("epochs", "minutes", "patience", "rows_per_step", "tokens_per_step")
        for name in (*sizes, "lr", "head_lr", "max_grad_norm"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UsageError(f"{name}={value} must be above 0")
        for name in ("weight_decay", "seed", "checkpoint_seconds"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name}={getattr(self, name)} must not be below 0")
        if self.prefix_cache_gb is not None and self.prefix_cache_gb < 0:
            raise UsageError(f"prefix_cache_gb={self.prefix_cache_gb} must not be below 0; 0 keeps nothing")
        if self.max_length < 3:
            raise UsageError(f"max_length={self.max_length} leaves no token between [CLS] and [SEP]; use 3 or more")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """From parsed TOML or JSON; raises UsageError naming an unknown or wrongly typed setting."""
        recipe: Self = _build(cls, values, "")
        return recipe

    def on(self, schema: Schema) -> Self:
        """For data of this schema: `stackoverflow` is taken over or left out."""
        tuned: dict[str, Any] = {}
        if self.stackoverflow and schema.kind == STACK_OVERFLOW:
            given = {name for name in vars(self.stackoverflow) if getattr(self, name) not in (None, "")}
            if self.rows_per_step:
                given.add("tokens_per_step")  # a step is what the user says
            tuned = {name: value for name, value in vars(self.stackoverflow).items() if name not in given}
        return replace(self, **tuned, stackoverflow=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, sections nested."""
        return asdict(self) | {"tabular": self.tabular and self.tabular.to_dict()}

    def with_settings(self, settings: list[str]) -> Self:
        """A copy with `name=value` strings applied; values are TOML, and a bare word is a string."""
        values = self.to_dict()
        had_adapters = self.lora is not None
        for setting in settings:
            name, equals, text = setting.partition("=")
            if not equals:
                raise UsageError(f"--set {setting!r} is not name=value; write for example --set epochs=2")
            section, _, key = name.strip().rpartition(".")
            if section not in ("", "lora", "tabular"):
                raise UsageError(f"--set {name}: there is no section {section!r}; sections are lora and tabular")
            target = values if not section else (values.get(section) or {})
            if section:
                values[section] = target
            target[key] = _toml_value(text)
        if values["lora"] and not had_adapters:
            values["stackoverflow"] = None  # it was tuned for training every weight
        return self.from_dict(values)


def variants() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.name.removesuffix(".toml") for path in _recipes().iterdir() if path.name.endswith(".toml"))


def describe(variant: str) -> str:
    """The comment that a variant's file begins with, on one line."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), _text(variant).splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines)


def load_recipe(variant: str | None = None, path: Path | None = None) -> Recipe:
    """The recipe of a variant, or of a TOML file of one's own; raises UsageError listing the variants."""
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"recipe {path} cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"recipe {path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
        name = path.stem
    else:
        name = variant or DEFAULT_VARIANT
        if name not in variants():
            raise UsageError(f"variant {name!r} does not exist; choose one of {', '.join(variants())}")
        text = _text(name)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"recipe {path or name} is not TOML ({error})") from error
    return Recipe.from_dict({"name": name, **values})


def _text(variant: str) -> str:
    return str((_recipes() / f"{variant}.toml").read_text(encoding="utf-8"))


def _recipes() -> Any:
    return resources.files("bertforge") / "recipes"


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()


def _build(cls: Any, values: dict[str, Any], prefix: str) -> Any:
    hints = _settings(cls)
    if unknown := set(values) - set(hints):
        wrong = sorted(unknown)[0]
        close = [f"did you mean {prefix}{name}? " for name in difflib.get_close_matches(wrong, hints, n=1)]
        raise UsageError(
            f"{prefix}{wrong} is not a setting; {''.join(close)}known: {', '.join(prefix + n for n in hints)}; "
            "`bertforge train --set list` tells what they mean"
        )
    make = cls.of if cls is TabularSpec else cls
    return make(**{name: _coerced(hints[name], value, prefix + name) for name, value in values.items()})


def _settings(cls: Any) -> dict[str, Any]:
    """The settings that `cls` is built from, and their types."""
    if cls is not TabularSpec:
        return get_type_hints(cls)
    hints = {name: hint for section in TabularSpec.sections() for name, hint in get_type_hints(section).items()}
    return {name: hint for name, hint in hints.items() if name != "kinds"}


def _coerced(hint: Any, value: Any, name: str) -> Any:
    if isinstance(hint, UnionType):
        if value is None:
            return None
        hint = next(option for option in get_args(hint) if option is not type(None))
    if isinstance(value, dict) and hasattr(hint, "__dataclass_fields__"):
        return _build(hint, value, f"{name}.")
    if get_args(hint):  # tuple[str, ...]
        listed = value.split(",") if isinstance(value, str) else value
        if isinstance(listed, list | tuple) and all(isinstance(item, get_args(hint)[0]) for item in listed):
            return tuple(listed)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise UsageError(f"{name}={value} is not a finite number")
        return float(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    wanted = _KINDS.get(hint, f"a section, as in --set {name}.NAME=VALUE")
    raise UsageError(f"{name}={value!r} should be {wanted}")

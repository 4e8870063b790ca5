"""Opens tokenizers: a SentencePiece model, a Hugging Face folder, or what a config names."""

import importlib.util
import os
from pathlib import Path

from danube_jax.config import TokenizerConfig
from danube_jax.console import warn
from danube_jax.data.hf_tokenizer import (
    DEFINING_FILES,
    TOKENIZER_JSON,
    HuggingFaceTokenizer,
    is_changed_since_export,
    is_made_of_sentencepiece,
)
from danube_jax.data.sentencepiece_tokenizer import (
    MODEL_FILE,
    SPACE,
    SentencePieceTokenizer,
    train_bpe,
)
from danube_jax.data.tokenizer_base import Tokenizer
from danube_jax.errors import UserError

__all__ = (
    "SPACE",
    "HuggingFaceTokenizer",
    "NoTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "load_tokenizer",
    "open_tokenizer",
    "train_bpe",
)

MISTRAL_FILE = "data/tokenizer.model.v1"


class NoTokenizer(UserError):
    """A folder holds no file of a tokenizer, which is another matter than one that is damaged."""


def open_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Opens a tokenizer.

    Args:
      path: a SentencePiece `.model` file; a `tokenizer.json` (with the `tokenizer_config.json`
        beside it, which names BOS and EOS); or a folder. In a folder, `tokenizer.model` is read by
        SentencePiece where it stands alone or where our own export wrote the `tokenizer.json`
        beside it. Otherwise a `tokenizer.json` is taken as it stands, and all else is what
        transformers' `AutoTokenizer` makes of the folder.

    Raises:
      NoTokenizer: a folder without one.
      UserError: nothing there, or what is there is none.
    """
    path = Path(path)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    if not path.is_dir():
        return SentencePieceTokenizer(path)
    if is_changed_since_export(path):
        warn(
            f"{path}: tokenizer.json or tokenizer.model is not what was exported (its checksum "
            "differs from the one in tokenizer_config.json): edited, or damaged"
        )
    if (path / MODEL_FILE).is_file() and (
        not (path / TOKENIZER_JSON).is_file() or is_made_of_sentencepiece(path)
    ):
        return SentencePieceTokenizer(path)
    if any((path / name).is_file() for name in DEFINING_FILES):
        return HuggingFaceTokenizer(path)
    raise NoTokenizer(
        f"{path}: no tokenizer in this folder; expected {MODEL_FILE} or {TOKENIZER_JSON}"
    )


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Loads the tokenizer that a config names by `path` or `builtin`.

    Raises:
      UserError: the file or the package that carries it is missing, or is no tokenizer.
    """
    if config.path:
        return open_tokenizer(config.path)
    if config.builtin == "mistral":
        return SentencePieceTokenizer(_mistral_path())
    raise UserError(
        "config.data.tokenizer: a tokenizer trained on the run's sources has no file before its "
        "data is prepared; expected path or builtin"
    )


def _mistral_path() -> Path:
    """The file inside mistral-common, found without importing the package."""
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "config.data.tokenizer.builtin: 'mistral' is carried by the package mistral-common, "
            "which is not installed: pip install 'danube-jax[mistral]'"
        )
    path = Path(spec.submodule_search_locations[0]) / MISTRAL_FILE
    if not path.is_file():
        raise UserError(
            f"config.data.tokenizer.builtin: {path} is missing from the installed mistral-common; "
            "expected version 1.13 or later: pip install 'danube-jax[mistral]'"
        )
    return path

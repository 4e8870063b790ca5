"""SentencePiece tokenizers: loading, encoding, and training one like Llama's and Mistral's."""

import functools
import hashlib
import importlib.util
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from danube_jax import files
from danube_jax.config import TokenizerConfig
from danube_jax.errors import UserError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for a space
MISTRAL_FILE = "data/tokenizer.model.v1"
MAX_LINE_BYTES = 2**30
CHARACTER_COVERAGE = 0.99995  # as Llama: the rest is spelt in bytes


class Tokenizer:
    """Text to ids and back.

    Attributes:
      path: the model file.
      vocab_size: number of ids.
      bos_id, eos_id: ids that begin and end a document.
      pad_id: id that fills up a batch; the unknown token where the model has none of its own.
      fingerprint: SHA-256 (hexadecimal) of the model file.
    """

    def __init__(self, path: str | os.PathLike):
        """Loads a SentencePiece `.model` file.

        Raises:
          UserError: the file is missing, not a SentencePiece model, or has no BOS or EOS.
        """
        self.path = Path(path)
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot read the tokenizer ({error.strerror}); expected a "
                "SentencePiece .model file"
            ) from None
        self._model = _parse(data, self.path)
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self.vocab_size = self._model.vocab_size()
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        pad = self._model.pad_id()
        self.pad_id = pad if pad >= 0 else max(0, self._model.unk_id())
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(f"{self.path}: the tokenizer has no BOS or EOS; expected both")

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of a text, framed as asked."""
        return self._model.encode(text, add_bos=bos, add_eos=eos)

    def encode_batch(
        self, texts: Sequence[str], *, bos: bool = False, eos: bool = False, threads: int = 0
    ) -> list[list[int]]:
        """The ids of many texts; the result does not depend on `threads` (0: one a core)."""
        threads = threads or os.cpu_count() or 1
        return self._model.encode(list(texts), add_bos=bos, add_eos=eos, num_threads=threads)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; control tokens stand for nothing."""
        return self._model.decode([int(i) for i in ids])

    def piece(self, token_id: int) -> str:
        """How the vocabulary writes an id."""
        return self._model.id_to_piece(int(token_id))

    @functools.cached_property
    def _byte_lengths(self) -> np.ndarray:
        lengths = [self._byte_length(i) for i in range(self.vocab_size)]
        return np.array(lengths, np.int32)

    def token_byte_lengths(self) -> np.ndarray:
        """int32 [V]: bytes of UTF-8 text that each id stands for.

        Control and unknown tokens stand for none. Over an encoded text they sum to its bytes and,
        where the model puts a space in front of every text (as Llama's and Mistral's do), one more.
        """
        return self._byte_lengths.copy()

    def _byte_length(self, i: int) -> int:
        model = self._model
        if model.is_byte(i):
            return 1
        if model.is_control(i) or model.is_unknown(i) or model.is_unused(i):
            return 0
        return len(model.id_to_piece(i).replace(SPACE, " ").encode())


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Loads the tokenizer that a config names by `path` or `builtin`.

    Raises:
      UserError: the file or the package that carries it is missing, or is no tokenizer.
    """
    if config.path:
        return Tokenizer(config.path)
    if config.builtin == "mistral":
        return Tokenizer(_mistral_path())
    raise UserError(
        "config.data.tokenizer: a tokenizer trained on the run's sources has no file before its "
        "data is prepared; expected path or builtin"
    )


def train_bpe(texts: Iterable[str], path: str | os.PathLike, vocab_size: int) -> Tokenizer:
    """Trains a SentencePiece BPE tokenizer in the manner of Llama and Mistral.

    Byte fallback, digits one by one, spaces kept as they are, unknown, BOS and EOS at 0, 1 and 2.
    The same texts give the same file.

    Args:
      texts: documents; they are cut into lines, since a newline is spelt as a byte.
      path: where the model file is written, whole or not at all.
      vocab_size: number of ids.

    Raises:
      UserError: no text, or too little text for the vocabulary.
    """
    lines = _Lines(texts)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=CHARACTER_COVERAGE,
            max_sentence_length=MAX_LINE_BYTES,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if lines.error is not None:
            raise lines.error from None
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"{path}: cannot train a tokenizer of {vocab_size} ids on this text ({reason}); "
            "expected more text, or another size (at least 259 ids and the characters of the text)"
        ) from None
    files.write_bytes(path, model.getvalue())
    return Tokenizer(path)


class _Lines:
    """Lines of texts; keeps the error that stops them, which SentencePiece would hide."""

    def __init__(self, texts: Iterable[str]):
        self._texts = texts
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        some = False
        try:
            for text in self._texts:
                for line in text.replace("\0", "").split("\n"):
                    if line:
                        some = True
                        yield line
            if not some:
                raise UserError("no text to train a tokenizer on; expected some documents")
        except Exception as error:
            self.error = error
            raise


def _parse(data: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    model = sentencepiece.SentencePieceProcessor()
    try:
        if not data or not model.LoadFromSerializedProto(data) or model.vocab_size() < 1:
            raise RuntimeError("empty")
    except RuntimeError:
        raise UserError(
            f"{path}: damaged or not a SentencePiece model; expected a .model file"
        ) from None
    return model


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

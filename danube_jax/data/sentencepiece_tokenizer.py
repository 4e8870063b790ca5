"""SentencePiece tokenizers: reading a model, and training one like Llama's and Mistral's."""

import functools
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from danube_jax import files
from danube_jax.data.control_names import ControlNames
from danube_jax.data.tokenizer_base import CHAT_TEMPLATE_FILE, Tokenizer, with_the_next
from danube_jax.errors import UserError
from danube_jax.untrusted import parse_json, refuse_misspelt

MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"
# Keys of it that bear on us, and others that look like them.
_CONFIG_KEYS = (
    *("tokenizer_class", "auto_map", "added_tokens_decoder", "chat_template", "danube_jax"),
    *("add_bos_token", "add_eos_token", "bos_token", "eos_token", "unk_token", "pad_token"),
    *("add_prefix_space", "clean_up_tokenization_spaces", "boi_token", "eoi_token"),
)
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for a space
MAX_LINE_BYTES = 2**30
CHARACTER_COVERAGE = 0.99995  # as Llama: the rest is spelt in bytes


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer that the SentencePiece library reads; `model` is its processor."""

    def __init__(self, path: str | os.PathLike):
        """Loads a `.model` file, or a folder that holds `tokenizer.model`.

        A folder may also hold `chat_template.jinja`, and a `tokenizer_config.json` that says
        whether prompts begin with BOS (`add_bos_token`, by default they do).

        Raises:
          UserError: the file is missing, not a SentencePiece model, or has no BOS or EOS; or the
            folder adds tokens to those of the model.
        """
        self.path = Path(path)
        folder = self.path.is_dir()
        self.model_path = self.path / MODEL_FILE if folder else self.path
        try:
            data = self.model_path.read_bytes()
        except OSError as error:
            raise UserError(
                f"{self.model_path}: cannot read the tokenizer ({error.strerror}); expected a "
                "SentencePiece .model file"
            ) from None
        self._data, self.model = data, _parse(data, self.model_path)
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self.vocab_size = self.model.vocab_size()
        self.bos_id, self.eos_id = self.model.bos_id(), self.model.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(f"{self.model_path}: the tokenizer has no BOS or EOS; expected both")
        unknown, pad = self.model.unk_id(), self.model.pad_id()
        self.pad_id = pad if pad >= 0 else max(0, unknown)
        self.special_ids = frozenset(
            i
            for i in range(self.vocab_size)
            if self.model.is_control(i) or self.model.is_unknown(i)
        )
        ids = {"bos": self.bos_id, "eos": self.eos_id, "unk": unknown, "pad": self.pad_id}
        self.special_tokens = {
            f"{name}_token": self.model.id_to_piece(i) for name, i in ids.items() if i >= 0
        }
        self.adds_bos, self.chat_template = True, None
        if folder:
            self._read_folder(self.path)

    def _read_folder(self, folder: Path) -> None:
        config = read_tokenizer_config(folder)
        self.adds_bos = config.get("add_bos_token", True)
        if self.adds_bos is None:
            self.adds_bos = False
        added = config.get("added_tokens_decoder") or {}
        if not isinstance(self.adds_bos, bool) or not _are_ids(added):
            raise UserError(
                f"{folder / CONFIG_FILE}: add_bos_token or added_tokens_decoder holds what it may "
                "not; expected true or false, and an object of token ids"
            )
        if max(map(int, added), default=0) >= self.vocab_size:
            raise UserError(
                f"{folder}: {CONFIG_FILE} adds tokens to the {self.vocab_size} of {MODEL_FILE}; "
                "expected a tokenizer.json that holds them all"
            )
        self.chat_template = read_chat_template(folder, config)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        return self.model.encode(text, add_bos=bos, add_eos=eos)

    def encode_batch(
        self, texts: Sequence[str], *, bos: bool = False, eos: bool = False, threads: int = 0
    ) -> list[list[int]]:
        threads = threads or os.cpu_count() or 1
        return self.model.encode(list(texts), add_bos=bos, add_eos=eos, num_threads=threads)

    @functools.cached_property
    def _control_ids(self) -> dict[str, int]:
        return {self.model.id_to_piece(i): i for i in self.special_ids}

    @functools.cached_property
    def _control_names(self) -> ControlNames:
        return ControlNames(self._control_ids)

    def control_names(self) -> ControlNames:
        return self._control_names

    def encode_markup(self, text: str) -> list[int]:
        ids = []
        for i, part in enumerate(self._control_names.split(text)):
            if i % 2:
                ids.append(self._control_ids[part])
            elif part:
                ids += self.model.encode(self._control_names.unshield(part))
        return ids

    def encode_markup_spans(self, text: str) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        ends: list[int] = []
        position = 0
        for i, part in enumerate(self._control_names.split(text)):
            if i % 2:
                ids.append(self._control_ids[part])
                ends.append(position + len(part))
            elif part:
                part = self._control_names.unshield(part)
                pieces = self.model.encode(part, return_type="proto").pieces
                # The library counts bytes; the byte at which a character begins → its number.
                sizes = [len(character.encode()) for character in part]
                starts = np.cumsum([0, *sizes])
                ids += [piece.id for piece in pieces]
                at = np.searchsorted(starts, [piece.end for piece in pieces], side="left")
                empty = [piece.begin == piece.end for piece in pieces]
                ends += (position + with_the_next(at, empty)).tolist()
            position += len(part)
        return ids, ends

    def encode_prompt(self, text: str) -> list[int]:
        return self._frame(self.encode_markup(text), self.adds_bos, False)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        known = [int(i) for i in ids if 0 <= i < self.vocab_size and i not in self.special_ids]
        return self.model.decode(known)

    def piece(self, token_id: int) -> str:
        return self.model.id_to_piece(int(token_id))

    @functools.cached_property
    def _byte_lengths(self) -> np.ndarray:
        lengths = [self._byte_length(i) for i in range(self.vocab_size)]
        return np.array(lengths, np.int32)

    def token_byte_lengths(self) -> np.ndarray:
        return self._byte_lengths.copy()

    def _byte_length(self, i: int) -> int:
        model = self.model
        if model.is_byte(i):
            return 1
        if model.is_control(i) or model.is_unknown(i) or model.is_unused(i):
            return 0
        return len(model.id_to_piece(i).replace(SPACE, " ").encode())

    def files(self) -> dict[str, bytes]:
        out = {MODEL_FILE: self._data}
        if not self.adds_bos:
            out[CONFIG_FILE] = json.dumps({"add_bos_token": False}).encode()
        if self.chat_template is not None:
            out[CHAT_TEMPLATE_FILE] = self.chat_template.encode()
        return out


def _are_ids(added: Any) -> bool:
    return isinstance(added, dict) and all(i.isascii() and i.isdigit() for i in added)


def read_tokenizer_config(folder: Path) -> dict:
    """The folder's `tokenizer_config.json`, or {}.

    Raises:
      UserError: it is not a JSON object.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        config = parse_json(path.read_bytes(), strict=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected a JSON object") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds {type(config).__name__}; expected a JSON object")
    refuse_misspelt(config, _CONFIG_KEYS, path)
    return config


def read_chat_template(folder: Path, config: dict) -> str | None:
    """The folder's chat template: `chat_template.jinja`, else what its config says, else None."""
    path = folder / CHAT_TEMPLATE_FILE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); expected a template") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        default = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = default[-1].get("template") if default else None
    return template if isinstance(template, str) else None


def train_bpe(
    texts: Iterable[str], path: str | os.PathLike, vocab_size: int
) -> SentencePieceTokenizer:
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
    return SentencePieceTokenizer(path)


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
        proto = sentencepiece_model_pb2.ModelProto.FromString(data)
        if not proto.HasField("trainer_spec") or not proto.HasField("normalizer_spec"):
            raise RuntimeError("it breaks off")  # these follow the pieces
        pieces = [piece.piece for piece in proto.pieces]
        if not all(isinstance(piece, str) for piece in pieces):
            raise RuntimeError("a piece is not UTF-8")
        model.encode(" ".join(pieces[:1000]))
    except (RuntimeError, DecodeError, UnicodeDecodeError):
        raise UserError(
            f"{path}: damaged or not a SentencePiece model; expected a .model file"
        ) from None
    return model

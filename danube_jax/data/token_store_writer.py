"""Writing a TokenStore shard by shard, so that a killed preparation continues where it stopped."""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from danube_jax import files
from danube_jax.data.token_store import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    TokenStore,
    is_finished,
    token_dtype,
)
from danube_jax.errors import UserError

LEDGER = "ledger.jsonl"
SHARD_TOKENS = 2**27


class TokenStoreWriter:
    """Appends documents to a new store.

    Finished shards are noted in a ledger. A writer opened on an unfinished folder continues it:
    skip the first `documents_done` documents, then add the rest; the result has the same bytes as
    an uninterrupted preparation. Use as a context manager, and call `finish` at the end.

        with TokenStoreWriter(path, vocab_size=..., tokenizer=..., provenance={}) as writer:
            for tokens, size in itertools.islice(documents, writer.documents_done, None):
                writer.add(tokens, size)
            store = writer.finish()
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        vocab_size: int,
        tokenizer: str,
        provenance: Mapping[str, Any],
        shard_tokens: int = SHARD_TOKENS,
    ):
        """Begins or continues a store.

        Args:
          path: folder, created where missing.
          vocab_size: ids are below this.
          tokenizer: fingerprint of the tokenizer.
          provenance: JSON-serialisable note on where the text came from and what was done to it.
          shard_tokens: most tokens a shard; a longer document gets a shard of its own.

        Raises:
          UserError: the store is finished, was begun with other settings, or is being written.
        """
        self.path = Path(path)
        if is_finished(self.path):
            raise UserError(f"{self.path}: the token store is finished; delete it to write another")
        self._settings = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "tokenizer": tokenizer,
            "vocab_size": vocab_size,
            "dtype": token_dtype(vocab_size).name,
            "shard_tokens": shard_tokens,
            "provenance": json.loads(json.dumps(provenance)),
        }
        self._shards: list[dict[str, Any]] = []
        self._tokens: list[np.ndarray] = []
        self._buffered = self._bytes = 0
        self.path.mkdir(parents=True, exist_ok=True)
        self._ledger = open(self.path / LEDGER, "a+b")  # noqa: SIM115
        try:
            self._begin()
        except BaseException:
            self._ledger.close()
            raise

    def __enter__(self) -> "TokenStoreWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self._ledger.close()

    @property
    def documents_done(self) -> int:
        """Documents in finished shards: how many to skip when continuing."""
        return sum(shard["documents"] for shard in self._shards)

    def add(self, tokens: Sequence[int] | np.ndarray, text_bytes: int) -> None:
        """Appends one document.

        Args:
          tokens: its ids, with whatever frames it (BOS, EOS); at least one.
          text_bytes: size of its text in UTF-8.

        Raises:
          UserError: no tokens, or an id outside the vocabulary.
        """
        array = np.asarray(tokens)
        number = self.documents_done + len(self._tokens)
        vocab_size = self._settings["vocab_size"]
        if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
            raise UserError(f"document {number} for {self.path}: expected a non-empty list of ids")
        if array.min() < 0 or array.max() >= vocab_size:
            raise UserError(
                f"document {number} for {self.path}: token ids {array.min()} to {array.max()} are "
                f"outside the vocabulary of {vocab_size}; expected ids of the store's tokenizer"
            )
        if self._tokens and self._buffered + array.size > self._settings["shard_tokens"]:
            self._flush()
        self._tokens.append(array.astype(self._settings["dtype"]))
        self._buffered += array.size
        self._bytes += text_bytes

    def finish(self) -> TokenStore:
        """Writes the last shard and the manifest, and opens the store.

        Raises:
          UserError: no document was added.
        """
        if self._tokens:
            self._flush()
        if not self._shards:
            raise UserError(f"{self.path}: no documents; a token store needs at least one")
        manifest = {key: self._settings[key] for key in ("format", "version", "tokenizer")}
        manifest |= {key: self._settings[key] for key in ("vocab_size", "dtype")}
        for key in ("tokens", "documents", "bytes"):
            manifest[key] = sum(shard[key] for shard in self._shards)
        manifest |= {"shards": self._shards, "provenance": self._settings["provenance"]}
        files.write_json(self.path / MANIFEST, files.seal(manifest))
        self._ledger.close()
        (self.path / LEDGER).unlink()
        return TokenStore.open(self.path)

    def _begin(self) -> None:
        try:
            fcntl.flock(self._ledger, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.path}: another process is preparing this store") from None
        for leftover in self.path.glob(".*.tmp"):  # of a killed preparation
            leftover.unlink()
        self._ledger.seek(0)
        lines = self._ledger.read().split(b"\n")[:-1]  # a line torn by a kill has no end
        self._ledger.truncate(sum(len(line) + 1 for line in lines))
        if not lines:
            self._note(self._settings)
            return
        try:
            settings, *self._shards = map(json.loads, lines)
            changed = [key for key in self._settings if settings[key] != self._settings[key]]
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.path / LEDGER}: damaged; delete {self.path} and prepare it again"
            ) from None
        if changed:
            raise UserError(
                f"{self.path}: its preparation was begun with another {', '.join(changed)}; "
                "delete the folder to start anew, or go back to the earlier settings"
            )

    def _note(self, entry: Mapping[str, Any]) -> None:
        self._ledger.write(json.dumps(entry).encode() + b"\n")
        self._ledger.flush()
        os.fsync(self._ledger.fileno())

    def _flush(self) -> None:
        lengths = np.array([len(tokens) for tokens in self._tokens], np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        number = len(self._shards)
        names = {"file": f"tokens-{number:05d}.npy", "offsets_file": f"offsets-{number:05d}.npy"}
        shard = {
            **names,
            "tokens": self._buffered,
            "documents": len(self._tokens),
            "bytes": self._bytes,
            "sha256": _write_array(self.path / names["file"], np.concatenate(self._tokens)),
            "offsets_sha256": _write_array(self.path / names["offsets_file"], offsets),
        }
        self._note(shard)
        self._shards.append(shard)
        self._tokens, self._buffered, self._bytes = [], 0, 0


class _Hashing:
    """Passes bytes on and hashes them, so that the checksum is of what was meant to be written."""

    def __init__(self, file: BinaryIO):
        self._file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)


def _write_array(path: Path, array: np.ndarray) -> str:
    with files.atomic_writer(path) as file:
        hashing = _Hashing(file)
        np.save(hashing, array, allow_pickle=False)
    return hashing.digest.hexdigest()

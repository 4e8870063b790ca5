"""TokenStore: a folder of token arrays that any context length can be cut from.

    tokens-00000.npy    1-D uint16 (vocabulary up to 65,536) or uint32
    offsets-00000.npy   int64 [documents + 1]: where each document starts in the shard, and the end
    ...
    store.json          counts, checksums, tokenizer fingerprint, provenance; written last

Documents are not split across shards. A folder without `store.json` is an unfinished preparation.
Positions are global: shard after shard, 0 up to the number of tokens of the store.
"""

import concurrent.futures
import functools
import json
import os
import tokenize
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from danube_jax import files
from danube_jax.console import progress
from danube_jax.errors import UserError

FORMAT = "danube_jax.token_store"
FORMAT_VERSION = 1
MANIFEST = "store.json"
MAX_OPEN_SHARDS = 256  # each mapped array holds a file descriptor


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest dtype a store uses for token ids below `vocab_size`."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def is_finished(path: str | os.PathLike) -> bool:
    """Whether `path` holds a store whose preparation was finished."""
    return (Path(path) / MANIFEST).is_file()


class TokenStore:
    """Read access to a finished store; arrays are memory-mapped when first touched.

    Attributes:
      path: the folder.
      tokens, documents, bytes: counts; bytes are of the UTF-8 text the tokens stand for.
      vocab_size, dtype: of the token ids.
      tokenizer: fingerprint of the tokenizer that wrote the store.
      provenance: where the text came from and what was done to it.
      fingerprint: SHA-256 over everything that decides what is read.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]):
        self.path = Path(path)
        self._manifest = dict(manifest)
        self.tokens = int(manifest["tokens"])
        self.documents = int(manifest["documents"])
        self.bytes = int(manifest["bytes"])
        self.vocab_size = int(manifest["vocab_size"])
        self.dtype = np.dtype(manifest["dtype"])
        self.tokenizer = str(manifest["tokenizer"])
        self.provenance = manifest["provenance"]
        self._shards = list(manifest["shards"])
        counts = np.array([shard["tokens"] for shard in self._shards], np.int64)
        self._shard_starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._map = functools.lru_cache(MAX_OPEN_SHARDS)(self._map_uncached)

    @classmethod
    def open(cls, path: str | os.PathLike) -> "TokenStore":
        """Opens a store and checks that every file is there, whole and of the stated type.

        Raises:
          UserError: the folder or its manifest is missing, of an unknown format, or a shard is
            missing, truncated or of another type; names the file.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        try:
            store = cls(path, manifest)
            if store.dtype != token_dtype(store.vocab_size):
                raise ValueError(f"dtype {manifest['dtype']!r}")
            for shard in store._shards:
                for name in (shard["file"], shard["offsets_file"]):
                    if Path(name).name != name:
                        raise ValueError(f"{name!r} is no file name in this folder")
                _check_array(path / shard["file"], store.dtype, shard["tokens"])
                _check_array(path / shard["offsets_file"], np.dtype(np.int64), _offsets_of(shard))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path / MANIFEST}: not a valid manifest of a token store ({error!r}); "
                "prepare the data again"
            ) from None
        counts = {
            key: sum(shard[key] for shard in store._shards) for key in ("tokens", "documents")
        }
        if counts != {"tokens": store.tokens, "documents": store.documents}:
            raise UserError(
                f"{path / MANIFEST}: its shards hold {counts['tokens']:,} tokens in "
                f"{counts['documents']:,} documents, its totals say {store.tokens:,} in "
                f"{store.documents:,}; prepare the data again"
            )
        if store.tokens == 0:
            raise UserError(f"{path}: the token store is empty; prepare it from some text")
        return store

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "manifest": self._manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["manifest"])

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) over tokenizer, dtype and the shards' counts and checksums."""
        essentials = {key: self._manifest[key] for key in ("format", "version", "tokenizer")}
        essentials["dtype"], essentials["vocab_size"] = self.dtype.name, self.vocab_size
        keys = ("tokens", "documents", "sha256", "offsets_sha256")
        essentials["shards"] = [[shard[key] for key in keys] for shard in self._shards]
        return files.sha256_json(essentials)

    @property
    def size_on_disk(self) -> int:
        """Bytes of all the shards' arrays."""
        offsets = sum(_offsets_of(shard) for shard in self._shards)
        return self.tokens * self.dtype.itemsize + offsets * 8

    def verify(self) -> None:
        """Reads every shard and compares its SHA-256 with the manifest.

        Raises:
          UserError: a file's bytes are not those that were written; names the file.
        """
        expected = {shard["file"]: shard["sha256"] for shard in self._shards}
        expected |= {shard["offsets_file"]: shard["offsets_sha256"] for shard in self._shards}
        threads = min(8, os.cpu_count() or 1)
        with (
            progress(f"verify {self.path.name}", self.size_on_disk, "MB") as advance,
            concurrent.futures.ThreadPoolExecutor(threads) as pool,
        ):
            paths = [self.path / name for name in expected]
            digests = pool.map(files.sha256_file, paths)
            for path, want, digest in zip(paths, expected.values(), digests, strict=True):
                if digest != want:
                    raise UserError(
                        f"{path}: sha256 is {digest}, expected {want}: the file was damaged or "
                        "changed; delete the folder and prepare the data again"
                    )
                advance(path.stat().st_size)

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Cuts windows of `length` tokens; a window may run on into the next shards.

        Args:
          starts: integer [N], global position of each window's first token.
          length: tokens a window.

        Returns:
          [N, length] in the store's dtype.

        Raises:
          IndexError: a window does not lie inside the store.
        """
        starts, shards = self._locate(starts, length)
        out = np.empty((len(starts), length), self.dtype)
        for row, start, shard in zip(out, starts.tolist(), shards.tolist(), strict=True):
            local = start - int(self._shard_starts[shard])
            part = self._tokens(shard)[local : local + length]
            row[: len(part)] = part
            filled = len(part)
            while filled < length:
                shard += 1
                part = self._tokens(shard)[: length - filled]
                row[filled : filled + len(part)] = part
                filled += len(part)
        return out

    def segment_ids(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Numbers the documents inside each window from 1.

        Args:
          starts: integer [N], global position of each window's first token.
          length: tokens a window.

        Returns:
          int32 [N, length]; equal numbers in a row mean the same document.

        Raises:
          IndexError: a window does not lie inside the store.
        """
        starts, shards = self._locate(starts, length)
        out = np.zeros((len(starts), length), np.int32)
        for row, start, shard in zip(out, starts.tolist(), shards.tolist(), strict=True):
            end, first = start + length, int(self._shard_starts[shard])
            while first < end:
                offsets = self._offsets(shard)[:-1]
                low, high = np.searchsorted(offsets, (start - first + 1, end - first))
                row[offsets[low:high] + (first - start)] = 1
                shard += 1
                first = int(self._shard_starts[shard])
        return np.cumsum(out, axis=1, dtype=np.int32, out=out) + np.int32(1)

    def document_starts(self) -> np.ndarray:
        """int64 [documents]: global position of every document's first token."""
        parts = [
            self._offsets(i)[:-1] + start
            for i, start in enumerate(self._shard_starts[:-1].tolist())
        ]
        return np.concatenate(parts)

    def _locate(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        starts = np.asarray(starts, np.int64)
        if starts.size and (starts.min() < 0 or starts.max() + length > self.tokens):
            raise IndexError(
                f"windows of {length} tokens from {starts.min()} to {starts.max()} do not lie in "
                f"{self.path} with its {self.tokens} tokens"
            )
        return starts, np.searchsorted(self._shard_starts, starts, side="right") - 1

    def _tokens(self, shard: int) -> np.ndarray:
        entry = self._shards[shard]
        return self._map(entry["file"], self.dtype, entry["tokens"])

    def _offsets(self, shard: int) -> np.ndarray:
        entry = self._shards[shard]
        return self._map(entry["offsets_file"], np.dtype(np.int64), _offsets_of(entry))

    def _map_uncached(self, name: str, dtype: np.dtype, count: int) -> np.ndarray:
        # Not np.load: it parses the header with `ast`, which fails now and then when threads do so
        # at once (Python 3.11). The header's size follows from the file's, checked by `open`.
        path = self.path / name
        try:
            header = path.stat().st_size - count * dtype.itemsize
            # A plain view slices several times faster than the memmap subclass.
            return np.memmap(path, dtype, "r", header, (count,)).view(np.ndarray)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: cannot be read any more ({error}); it was whole when the store was opened"
            ) from None


def _offsets_of(shard: Mapping[str, Any]) -> int:
    return shard["documents"] + 1


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; expected a token store")
    file = path / MANIFEST
    if not file.is_file():
        raise UserError(f"{file}: missing, so the preparation was not finished: run it again")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: cannot be read as JSON ({error}); prepare the data again"
        ) from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise UserError(f"{file}: format {found!r} is unknown; expected {FORMAT!r}")
    if manifest.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{file}: format version {manifest.get('version')!r} is unknown; this program reads "
            f"version {FORMAT_VERSION}: prepare the data again or update the program"
        )
    files.check_seal(manifest, str(file))
    return manifest


def _check_array(path: Path, dtype: np.dtype, count: int) -> None:
    """Compares a `.npy` file's header and size with what the manifest says."""
    mend = "delete the folder and prepare the data again"
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"version {version} of the npy format")
            shape, _, found = np.lib.format.read_array_header_1_0(file)
            header = file.tell()
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise UserError(f"{path}: missing, though {MANIFEST} lists it; {mend}") from None
    except (OSError, ValueError, SyntaxError, tokenize.TokenError) as error:
        raise UserError(f"{path}: its header cannot be read ({error}); {mend}") from None
    if found != dtype or shape != (count,):
        raise UserError(
            f"{path}: holds {found} of shape {shape}, expected {dtype} of shape ({count},); {mend}"
        )
    expected = header + count * dtype.itemsize
    if size != expected:
        raise UserError(f"{path}: is {size:,} bytes long, expected {expected:,}; {mend}")

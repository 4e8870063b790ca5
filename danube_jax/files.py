"""Files that appear complete or not at all, and checksums."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from danube_jax.errors import UserError

_SYNCERS = 8  # they wait for the disk, which takes several at once


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` only once its block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place once the block ends without an error.

    What stood at `output` is replaced; where the block fails, it stays and the temporary goes.

    Raises:
      UserError: the folder cannot be made or moved.
    """
    output = Path(os.path.abspath(output))
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    old = output.with_name(f".{output.name}.{os.getpid()}.old")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be made: {error.strerror or error}") from None
    try:
        yield temporary
        folders = [folder for folder, _, _ in os.walk(temporary)]
        with ThreadPoolExecutor(_SYNCERS) as syncers:
            list(syncers.map(sync_folder, folders))
        if output.exists():
            os.rename(output, old)
        os.rename(temporary, output)
        sync_folder(output.parent)
    finally:
        if old.exists() and not output.exists():
            os.rename(old, output)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def sync_folder(path: str | os.PathLike) -> None:
    """Makes renames inside the folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes `data` to `path` atomically."""
    with atomic_writer(path) as file:
        file.write(data)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON to `path` atomically."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def sha256_file(path: str | os.PathLike) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """The hexadecimal SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()

"""Files that appear complete or not at all, checksums, and progress on stderr."""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rich import progress as rich_progress
from rich.console import Console

PLAIN_PROGRESS_SECONDS = 10.0


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


@contextlib.contextmanager
def progress(description: str, total: float, unit: str = "items") -> Iterator[Callable]:
    """Shows progress on stderr: a bar on a terminal, a line every ten seconds elsewhere.

    Args:
      description: what is being done, in a few words.
      total: amount of work in `unit`.
      unit: name of what is counted; "MB" divides amounts by 1e6.

    Yields:
      ``advance(amount)``, to be called as work is done.
    """
    scale = 1e6 if unit == "MB" else 1.0
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _PlainProgress(description, total, unit, scale).advance
        return
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.TaskProgressColumn(),
        rich_progress.TextColumn("{task.fields[rate]}"),
        rich_progress.TimeRemainingColumn(),
    )
    started = time.monotonic()
    with rich_progress.Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, rate="")

        def advance(amount: float) -> None:
            bar.advance(task, amount)
            rate = bar.tasks[0].completed / scale / max(1e-9, time.monotonic() - started)
            bar.update(task, rate=f"{rate:,.1f} {unit}/s")

        yield advance


class _PlainProgress:
    def __init__(self, description: str, total: float, unit: str, scale: float):
        self._description, self._total, self._unit, self._scale = description, total, unit, scale
        self._done = 0.0
        self._started = self._shown = time.monotonic()

    def advance(self, amount: float) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._shown < PLAIN_PROGRESS_SECONDS:
            return
        self._shown = now
        rate = self._done / (now - self._started)
        left = (self._total - self._done) / max(rate, 1e-9)
        percent = 100 * self._done / max(self._total, 1e-9)
        print(
            f"{self._description}: {percent:.0f} %, {rate / self._scale:,.1f} {self._unit}/s, "
            f"{left:,.0f} s left",
            file=sys.stderr,
            flush=True,
        )

"""Which files a preparation reads, and how they are divided into tasks.

The division follows from the files and the config, never from the number of workers.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import fsspec

from danube_jax.data.corpus import builtin
from danube_jax.data.corpus.config import CorpusConfig, TextSource
from danube_jax.errors import UserError

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
SUFFIXES = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "jsonl"),
    ".parquet": "parquet",
    **dict.fromkeys((".txt", ".text", ".md", ".rst"), "text"),
}
COMPRESSION_RATIO = 4  # rough; only the division into parts depends on it
MAX_STRIDED_PARTS = 16  # each reads the whole compressed file


@dataclasses.dataclass(frozen=True)
class InputPart:
    """A file or a part of one.

    Attributes:
      source, path: where it belongs, and its path or address.
      format: 'jsonl', 'parquet', 'text' or 'builtin'.
      file_size: bytes of the whole file.
      part, parts: the number of this part, from 0, and how many there are.
    """

    source: str
    path: str
    format: str
    file_size: int
    part: int = 0
    parts: int = 1

    @property
    def by_range(self) -> bool:
        """Whether the part is a range of bytes, rather than every so manieth record."""
        return self.format == "jsonl" and not self.path.endswith(COMPRESSED)

    @property
    def begin(self) -> int:
        """First byte; a line belongs to the part in which it begins."""
        return self.file_size * self.part // self.parts if self.by_range else 0

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.file_size * (self.part + 1) // self.parts if self.by_range else self.file_size

    @property
    def size(self) -> int:
        """Its share of the file, in bytes."""
        return self.file_size // self.parts

    @property
    def unit(self) -> str:
        """What a record's number counts."""
        return {"jsonl": "line", "parquet": "row"}.get(self.format, "document")


def list_inputs(corpus: CorpusConfig) -> list[InputPart]:
    """The files of all sources, in order, divided into parts of about `task_bytes`.

    Raises:
      UserError: a source has no files, or a file's format cannot be told.
    """
    parts = []
    for name, source in corpus.sources.items():
        if source.builtin:
            # Its size is not known before it is read; a part is a task.
            count = builtin.PARTS[source.builtin]
            size = corpus.task_bytes * count
            kind = source.builtin
            parts += [InputPart(name, kind, "builtin", size, i, count) for i in range(count)]
            continue
        for path, size in _find(name, source):
            kind = _format(name, source, path)
            count = _num_parts(kind, path, size, corpus.task_bytes)
            parts += [InputPart(name, path, kind, size, i, count) for i in range(count)]
    return parts


def divide(parts: list[InputPart], task_bytes: int) -> tuple[tuple[InputPart, ...], ...]:
    """Groups consecutive parts of a source into tasks of about `task_bytes`."""
    tasks: list[list[InputPart]] = []
    size = 0
    for part in parts:
        if not tasks or tasks[-1][0].source != part.source or size + part.size > task_bytes:
            tasks.append([])
            size = 0
        tasks[-1].append(part)
        size += part.size
    return tuple(map(tuple, tasks))


def listing(parts: list[InputPart]) -> list[list]:
    """Source, path and size of every file, to compare with an earlier preparation's."""
    return [[part.source, part.path, part.file_size] for part in parts if part.part == 0]


def _find(name: str, source: TextSource) -> list[tuple[str, int]]:
    key = f"config.sources.{name}.path"
    try:
        system, path = fsspec.core.url_to_fs(source.path)
    except (ImportError, ValueError) as error:
        raise UserError(f"{key}: {source.path!r} cannot be opened ({error})") from None
    if any(sign in path for sign in "*?["):
        found = {p: i["size"] for p, i in system.glob(path, detail=True).items() if _is_file(i)}
        if not found:
            raise UserError(f"{key}: no file matches {source.path!r}")
    elif system.isdir(path):
        found = {p: i["size"] for p, i in system.find(path, detail=True).items() if _is_file(i)}
        found = {p: size for p, size in found.items() if _wanted(source, p)}
        if not found:
            raise UserError(
                f"{key}: no JSONL, parquet or text file in {source.path!r}; expected some, or "
                "name the format"
            )
    elif system.exists(path):
        found = {path: system.size(path)}
    else:
        raise UserError(f"{key}: {source.path!r} does not exist; expected a file, folder or glob")
    local = "file" in ([system.protocol] if isinstance(system.protocol, str) else system.protocol)
    if local and "://" not in source.path:
        return sorted((_relative(source.path, p), size) for p, size in found.items())
    return sorted((system.unstrip_protocol(p), size) for p, size in found.items())


def _relative(given: str, path: str) -> str:
    """A path as the user would write it, so that results do not depend on the folder's place."""
    return path if os.path.isabs(given) else os.path.relpath(path)


def _is_file(info: Mapping) -> bool:
    link = info.get("islink") and os.path.isfile(info["name"])  # local file systems alone have them
    return info.get("type") == "file" or bool(link)


def _suffix(path: str) -> str:
    for ending in COMPRESSED:
        path = path.removesuffix(ending)
    dot = path.rfind(".")
    return path[dot:].lower() if dot > path.rfind("/") else ""


def _wanted(source: TextSource, path: str) -> bool:
    name = path.rsplit("/", 1)[-1]
    return not name.startswith((".", "_")) and (
        source.format != "auto" or _suffix(path) in SUFFIXES
    )


def _format(name: str, source: TextSource, path: str) -> str:
    if source.format != "auto":
        return source.format
    kind = SUFFIXES.get(_suffix(path))
    if kind is None:
        raise UserError(
            f"config.sources.{name}.format: cannot be told from {path!r}; expected 'jsonl', "
            "'parquet' or 'text'"
        )
    return kind


def _num_parts(kind: str, path: str, size: int, task_bytes: int) -> int:
    if kind == "jsonl" and not path.endswith(COMPRESSED):
        return max(1, math.ceil(size / task_bytes))
    if kind == "jsonl":
        return min(MAX_STRIDED_PARTS, max(1, math.ceil(size * COMPRESSION_RATIO / task_bytes)))
    if kind == "parquet" and size > task_bytes:
        pyarrow = import_pyarrow(path)
        try:
            with fsspec.open(path, "rb") as raw:
                groups = pyarrow.parquet.ParquetFile(raw).num_row_groups
        except Exception:  # the reader says what is wrong with it
            return 1
        return max(1, min(groups, math.ceil(size * COMPRESSION_RATIO / task_bytes)))
    return 1


def import_pyarrow(path: str) -> Any:
    """The module pyarrow with its parquet part.

    Raises:
      UserError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: parquet files need the package pyarrow: pip install 'danube-jax[data]'"
        ) from None
    return pyarrow

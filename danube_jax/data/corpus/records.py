"""Strict reading of records: what cannot be read is named with its file and line.

datatrove's readers pass over broken lines with a line in a log; here the default is to stop.
"""

import dataclasses
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import fsspec
import orjson
from datatrove.data import Document
from datatrove.pipeline.readers.base import BaseReader

from danube_jax import files
from danube_jax.data.corpus import builtin
from danube_jax.data.corpus.config import CorpusConfig, TextSource
from danube_jax.data.corpus.inputs import InputPart, import_pyarrow
from danube_jax.data.corpus.rule import SOURCE
from danube_jax.data.corpus.tally import Tally, utf8_size
from danube_jax.data.corpus.zstd_file import ZstdFile
from danube_jax.errors import UserError
from danube_jax.untrusted import READ_ERRORS

STRIDE = 64  # consecutive records of a compressed file that go to the same part
HEARTBEAT_SECONDS = 0.5
STEP = "read"


class BadRecord(Exception):
    """A record that cannot be read: where and why. `whole_file`: nor can what follows it."""

    def __init__(self, where: str, reason: str, *, whole_file: bool = False):
        super().__init__(where, reason)
        self.where, self.reason, self.whole_file = where, reason, whole_file


@dataclasses.dataclass
class Record:
    """A text with its place in its file, from 1."""

    number: int
    text: str
    id: str | None = None
    url: str | None = None


class Heartbeat:
    """Says in a file how far a task is; the command that started it adds these up."""

    def __init__(self, path: Path | None):
        self._path = path
        self._due = 0.0
        self.input_bytes = self.documents = self.text_bytes = 0

    def beat(self, force: bool = False) -> None:
        """Writes the counts, now and then."""
        now = time.monotonic()
        if self._path is not None and (force or now >= self._due):
            self._due = now + HEARTBEAT_SECONDS
            row = [int(self.input_bytes), self.documents, self.text_bytes]
            temporary = self._path.with_name(f".{self._path.name}")
            temporary.write_text(json.dumps(row))
            os.replace(temporary, self._path)


class RecordReader(BaseReader):
    """Reads the parts of a task as documents of a source."""

    name, type = "records", "📖 - READER"

    def __init__(
        self,
        corpus: CorpusConfig,
        tasks: tuple[tuple[InputPart, ...], ...],
        tally: Tally,
        progress: Path | None,
    ):
        super().__init__()
        self.corpus, self.tasks, self.tally, self.progress = corpus, tasks, tally, progress

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """The documents of the task `rank`.

        Raises:
          UserError: a record cannot be read, and bad ones are not to be skipped.
        """
        if self.progress is not None:
            self.progress.mkdir(parents=True, exist_ok=True)
        heartbeat = Heartbeat(self.progress and self.progress / f"{rank:05d}.json")
        heartbeat.beat(force=True)
        for part in self.tasks[rank]:
            source = self.corpus.sources[part.source]
            done = heartbeat.input_bytes
            place = part.path if not source.builtin else source.builtin
            begin = time.process_time()
            for record, share in self._records(part, source):
                heartbeat.input_bytes = done + part.size * min(1.0, share)
                size = utf8_size(record.text)
                heartbeat.documents += 1
                heartbeat.text_bytes += size
                heartbeat.beat()
                name = record.id or f"{place}:{record.number}"
                metadata = {SOURCE: part.source} | ({"url": record.url} if record.url else {})
                document = Document(text=record.text, id=name, metadata=metadata)
                self.stat_update("documents")
                seconds = time.process_time() - begin
                self.tally.add(part.source, STEP, size, size, seconds, "")
                self.tally.length(part.source, "bytes_read", size)
                yield document
                begin = time.process_time()
            heartbeat.input_bytes = done + part.size
        heartbeat.beat(force=True)

    def _records(self, part: InputPart, source: TextSource) -> Iterator[tuple[Record, float]]:
        """The records that can be read, with the share of the part done."""
        reader = _READERS[part.format](part, source, self.corpus.max_document_bytes)
        records = 0
        while True:
            try:
                record, share = next(reader)
            except StopIteration:
                break
            except BadRecord as bad:
                self._bad(bad)
                records += 1
                if bad.whole_file:
                    break
                continue
            records += 1
            if "\0" in record.text:
                where = f"{part.path}, {part.unit} {record.number}"
                self._bad(BadRecord(where, "holds a NUL character"))
                continue
            if record.text.strip():
                yield record, share
            else:
                self.tally.add(part.source, STEP, 0, None, 0.0, "empty")
        if not records and part.parts == 1:
            self._bad(BadRecord(part.path, "holds no records"))

    def _bad(self, bad: BadRecord) -> None:
        if self.corpus.on_bad_record == "stop":
            stop(bad)
        self.tally.bad_record(bad.where, bad.reason)


def stop(bad: BadRecord) -> NoReturn:
    """Ends the preparation at a bad record."""
    raise UserError(
        f"{bad.where}: {bad.reason}; mend it, or set config.on_bad_record to 'skip' to go on "
        "without and have such records counted and listed"
    )


def open_input(path: str) -> tuple[io.BufferedIOBase, Any]:
    """(decompressed stream, raw stream) of a file, local or at any fsspec address."""
    raw = fsspec.open(path, "rb").open()
    if path.endswith(".zst"):
        return io.BufferedReader(ZstdFile(raw), 2**20), raw
    if path.endswith((".gz", ".bz2", ".xz")):
        codec = {"gz": "gzip", "z2": "bz2", "xz": "xz"}[path[-2:]]
        opener = fsspec.compression.compr[codec]
        return io.BufferedReader(opener(raw, mode="rb"), 2**20), raw
    return raw, raw


def _lines(part: InputPart, limit: int) -> Iterator[tuple[int, bytes, float]]:
    """(number, line, share of the part done); numbers of a later part of a file begin at 1."""
    unit = f"{part.path}, line"
    number = 0
    try:
        stream, raw = open_input(part.path)
        with raw, stream:
            if part.begin:
                stream.seek(part.begin - 1)
                stream.readline()
                if stream.tell() >= part.end:
                    return
            position = stream.tell() if part.by_range else 0
            while not part.by_range or position < part.end:
                line = stream.readline(limit + 1)
                if not line:
                    break
                number += 1
                too_long = len(line) > limit and not line.endswith(b"\n")
                if too_long:
                    size = len(line)
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(2**20)
                        size += len(line)
                if part.by_range:
                    position = stream.tell()
                    share = (position - part.begin) / max(1, part.end - part.begin)
                else:
                    share = raw.tell() / max(1, part.file_size)
                    if (number - 1) // STRIDE % part.parts != part.part:
                        continue
                yield number, b"" if too_long else line, share if not too_long else -size
    except READ_ERRORS as error:
        if isinstance(error, FileNotFoundError):
            raise BadRecord(part.path, "no such file", whole_file=True) from None
        reason = " ".join(str(error).split())
        raise BadRecord(
            f"{unit} {number + 1}", f"cannot be read ({reason})", whole_file=True
        ) from None


def _true_number(part: InputPart, number: int) -> int:
    """The number in the whole file of a part's line."""
    if not part.begin:
        return number
    with fsspec.open(part.path, "rb") as file:
        before, left = 0, part.begin
        while left:
            block = file.read(min(2**20, left))
            if not block:
                break
            before += block.count(b"\n")
            left -= len(block)
            last = block
        inside = 0 if last.endswith(b"\n") else 1
        return before + inside + number


class _Jsonl:
    """Iterator over the records of a JSONL part; goes on after a bad record."""

    def __init__(self, part: InputPart, source: TextSource, limit: int):
        self.part, self.source, self.limit = part, source, limit
        self._lines = _lines(part, limit)

    def __iter__(self):
        return self

    def __next__(self) -> tuple[Record, float]:
        while True:
            number, line, share = next(self._lines)
            if share < 0:
                self._fail(number, f"is {-share:,} bytes long; the limit is {self.limit:,}")
            if line.strip():
                return self._parse(number, line), share

    def _parse(self, number: int, line: bytes) -> Record:
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            try:
                line.decode()
            except UnicodeDecodeError as wrong:
                self._fail(number, f"is not UTF-8 at byte {wrong.start + 1} of the line")
            if b"\0" in line:
                self._fail(number, "holds a NUL character")
            self._fail(number, f"is not JSON ({error.msg} at character {error.pos + 1})")
        if not isinstance(row, dict):
            self._fail(number, f"holds a JSON {type(row).__name__}; expected an object")
        source = self.source
        text = self._column(row, source.text_column, number)
        if not isinstance(text, str):
            kind = "null" if text is None else type(text).__name__
            self._fail(number, f"{source.text_column!r} is {kind}; expected a string")
        name = self._column(row, source.id_column, number) if source.id_column else None
        url = self._column(row, source.url_column, number) if source.url_column else None
        if name is None and self.part.begin:
            name = f"{self.part.path}@{self.part.begin}:{number}"
        return Record(number, text, _string(name), _string(url))

    def _column(self, row: dict, column: str, number: int) -> Any:
        if column not in row:
            has = ", ".join(map(repr, list(row)[:8])) or "none"
            self._fail(number, f"has no column {column!r}, only {has}")
        return row[column]

    def _fail(self, number: int, reason: str) -> NoReturn:
        number = _true_number(self.part, number)
        raise BadRecord(f"{self.part.path}, line {number}", reason)


def _string(value: Any) -> str | None:
    return None if value is None else str(value)


class _Text:
    """Iterator over the documents of a plain text file."""

    def __init__(self, part: InputPart, source: TextSource, limit: int):
        self.part, self.source, self.limit = part, source, limit
        self._pieces: Iterator[tuple[int, str, float]] | None = None

    def __iter__(self):
        return self

    def __next__(self) -> tuple[Record, float]:
        if self._pieces is None:
            self._pieces = iter(self._read())
        number, text, share = next(self._pieces)
        return Record(number, text), share

    def _read(self) -> list[tuple[int, str, float]]:
        path, separator = self.part.path, self.source.separator
        try:
            stream, raw = open_input(path)
            with raw, stream:
                data = stream.read() if separator else stream.read(self.limit + 1)
        except READ_ERRORS as error:
            reason = " ".join(str(error).split())
            raise BadRecord(path, f"cannot be read ({reason})", whole_file=True) from None
        if not separator and len(data) > self.limit:
            reason = f"is longer than the limit of {self.limit:,} bytes a document"
            raise BadRecord(path, reason, whole_file=True)
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as wrong:
            line = data.count(b"\n", 0, wrong.start) + 1
            raise BadRecord(
                f"{path}, line {line}",
                f"is not UTF-8 at byte {wrong.start + 1} of the file",
                whole_file=True,
            ) from None
        if not text:
            return []
        pieces = text.split(separator) if separator else [text]
        return [(i, piece, i / len(pieces)) for i, piece in enumerate(pieces, 1)]


class _Parquet:
    """Iterator over the rows of a parquet file's row groups."""

    def __init__(self, part: InputPart, source: TextSource, limit: int):
        self.part, self.source, self.limit = part, source, limit
        self._rows = self._read()

    def __iter__(self):
        return self

    def __next__(self) -> tuple[Record, float]:
        row = next(self._rows)
        if isinstance(row, BadRecord):
            raise row
        return row

    def _read(self) -> Iterator[tuple[Record, float] | BadRecord]:
        path, source = self.part.path, self.source
        pyarrow = import_pyarrow(path)
        columns = [c for c in (source.text_column, source.id_column, source.url_column) if c]
        try:
            with fsspec.open(path, "rb") as raw:
                file = pyarrow.parquet.ParquetFile(raw, page_checksum_verification=True)
                missing = [c for c in columns if c not in file.schema_arrow.names]
                if missing:
                    has = ", ".join(map(repr, file.schema_arrow.names[:8]))
                    reason = f"has no column {missing[0]!r}, only {has}"
                    yield BadRecord(path, reason, whole_file=True)
                    return
                sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                for i in range(self.part.part, len(sizes), self.part.parts):
                    table = file.read_row_group(i, columns=columns)
                    yield from self._group(table, sum(sizes[:i]), (i + 1) / len(sizes))
        except FileNotFoundError:
            yield BadRecord(path, "no such file", whole_file=True)
        except (OSError, EOFError, pyarrow.ArrowException) as error:
            reason = " ".join(str(error).split())[:200]
            yield BadRecord(path, f"cannot be read as parquet ({reason})", whole_file=True)

    def _group(self, table, first: int, share: float) -> Iterator[tuple[Record, float] | BadRecord]:
        source = self.source
        for i in range(table.num_rows):
            number = first + i + 1
            where = f"{self.part.path}, row {number}"
            try:
                text, name, url = (
                    table[column][i].as_py() if column else None
                    for column in (source.text_column, source.id_column, source.url_column)
                )
            except UnicodeDecodeError as wrong:
                yield BadRecord(where, f"is not UTF-8 at byte {wrong.start + 1}")
                continue
            if not isinstance(text, str):
                kind = "null" if text is None else type(text).__name__
                yield BadRecord(where, f"{source.text_column!r} is {kind}; expected a string")
                continue
            if len(text) > self.limit:
                yield BadRecord(
                    where, f"is {len(text):,} characters long; the limit is {self.limit:,}"
                )
                continue
            yield Record(number, text, _string(name), _string(url)), share


class _Builtin:
    """Iterator over the documents of built-in text."""

    def __init__(self, part: InputPart, source: TextSource, limit: int):
        self._documents = builtin.documents(source.builtin, part.part)
        self._number = 0

    def __iter__(self):
        return self

    def __next__(self) -> tuple[Record, float]:
        document = next(self._documents)
        self._number += 1
        return Record(self._number, document.text, document.id), 0.0


_READERS = {"jsonl": _Jsonl, "text": _Text, "parquet": _Parquet, "builtin": _Builtin}


def write_bad_records(path: Path, rows: list[list[str]]) -> None:
    """Lists the records that were skipped, a JSON line each."""
    lines = (orjson.dumps({"where": where, "reason": reason}) for where, reason in rows)
    files.write_bytes(path, b"".join(line + b"\n" for line in lines))

"""Rows of JSONL and Parquet files, with the place of each for error messages."""

import contextlib
import functools
import gzip
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from danube_jax.console import warn
from danube_jax.errors import UserError
from danube_jax.untrusted import READ_ERRORS, parse_json

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
ON_BAD_ROW = ("stop", "skip")

Row = Mapping[str, Any]
T = TypeVar("T")


def row_files(path: str | Path) -> list[Path]:
    """The file itself, or the files of a folder that can be read, in the order of their names.

    Raises:
      UserError: there is none.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES) and p.is_file())
        if not found:
            raise UserError(f"{path}: no data files; expected names that end in {_suffixes()}")
        return found
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected one whose name ends in {_suffixes()}")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: an unknown kind of file; expected a name in {_suffixes()}")
    return [path]


def _suffixes() -> str:
    return ", ".join(SUFFIXES)


def convert_rows(
    path: str | Path,
    convert: Callable[[Row], list[T]],
    *,
    on_bad_row: str = "stop",
    enough: Callable[[int], bool] = lambda count: False,
) -> tuple[list[T], int]:
    """Reads the rows of a file or folder and converts them.

    Args:
      path: as for `row_files`.
      convert: row → what becomes of it; raises `UserError` with what is wrong, but not where.
      on_bad_row: 'stop' at the first row that cannot be used, or 'skip' it.
      enough: whether so many results will do, asked after each row; what follows is not read.

    Returns:
      (all that the rows became, in their order; the number of rows skipped).

    Raises:
      UserError: a bad row (with file and line), a file that cannot be read, or no row at all.
    """
    out: list[T] = []
    rows = skipped = 0
    first = ""
    for where, load in _places(path):
        rows += 1
        try:
            out += convert(load())
        except UserError as error:
            if on_bad_row == "stop":
                raise UserError(
                    f"{where}: {error}; mend the row, or leave such rows out with "
                    "--config.chat.on_bad_row=skip"
                ) from None
            skipped += 1
            first = first or f"{where}: {error}"
        if enough(len(out)):
            break
    if not rows:
        raise UserError(f"{path}: there are no rows; expected at least one")
    if skipped:
        warn(f"{path}: {skipped:,} of {rows:,} rows skipped; the first: {first}")
    if skipped == rows:
        raise UserError(f"{path}: none of the {rows:,} rows can be used; the first: {first}")
    return out, skipped


def _places(path: str | Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    """(where a row stands, what loads it) of every row."""
    for file in row_files(path):
        if file.suffix == ".parquet":
            yield from _parquet_rows(file)
        elif file.name.endswith((".json", ".json.gz")):
            yield from _json_list(file)
        else:
            yield from _json_lines(file)


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    """The file's bytes; what is wrong with it becomes one line.

    Raises:
      UserError: it cannot be read or is damaged.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            yield stream
    except READ_ERRORS as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file}: cannot be read: {reason}") from None


def _json_lines(file: Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield f"{file}, line {number}", lambda line=line: _object(_parse(line))


def _json_list(file: Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    with _open(file) as stream:
        try:
            value = _parse(stream.read())
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
    if not isinstance(value, list):
        raise UserError(f"{file}: expected a JSON list of rows, or one row a line in a .jsonl file")
    for number, row in enumerate(value, 1):
        yield f"{file}, row {number}", lambda row=row: _object(row)


def _parse(data: bytes) -> Any:
    try:
        return parse_json(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(error)) from None
    except ValueError as error:
        raise UserError(f"no JSON ({error})") from None


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte {error.object[error.start]:#04x} at {error.start})"


def _object(value: Any) -> Row:
    if not isinstance(value, Mapping):
        raise UserError(f"expected a JSON object, got {type(value).__name__}")
    return value


def _parquet_rows(file: Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{file}: reading Parquet needs pyarrow, which is not installed: pip install pyarrow"
        ) from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as table:
            for batch in table.iter_batches(1024):
                for i in range(batch.num_rows):
                    number += 1
                    yield f"{file}, row {number}", functools.partial(_parquet_row, batch, i)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: cannot be read as Parquet: {reason}") from None


def _parquet_row(batch: Any, index: int) -> Row:
    try:
        (row,) = batch.slice(index, 1).to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(error)) from None
    except (ValueError, OverflowError) as error:  # a date beyond the calendar, say
        raise UserError(f"cannot be read ({error})") from None
    return row

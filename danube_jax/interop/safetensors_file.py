"""The safetensors format: a JSON header, then raw tensors. Read and written tensor by tensor.

Format: 8 bytes little-endian length of the header; the header, a JSON object from a tensor's name
to its `dtype`, `shape` and `data_offsets` within the rest of the file; the rest, without holes.
Files are read, not mapped, so that a converter's memory is the tensors that it holds.
"""

import contextlib
import dataclasses
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from danube_jax.array_checksums import rows_a_block
from danube_jax.errors import UserError
from danube_jax.untrusted import parse_json

DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Known to the format, of no use as weights here; a file with them can still be listed.
_OTHER_ITEM_SIZES = {
    **{"F64": 8, "I64": 8, "U64": 8, "C64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
    **{"F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1},
}
MAX_HEADER_BYTES = 100_000_000
_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor stands."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # from the start of the file
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of a file, by name.

    Raises:
      UserError: the file is missing, truncated or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", _exactly(file.read(8), 8))
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = parse_json(file.read(length), strict=True)
        header.pop("__metadata__", None)
        entries = {name: _entry(name, value, 8 + length) for name, value in header.items()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged or no safetensors file ({error}); fetch it again"
        ) from None
    last = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.begin != last:
            raise UserError(f"{path}: damaged: tensor {name} does not follow the one before it")
        last = entry.end
    if last != size:
        kind = "truncated" if size < last else "damaged"
        raise UserError(
            f"{path}: {kind}: its header asks for {last:,} bytes, the file has {size:,}; "
            "fetch it again"
        )
    return entries


def _exactly(data: bytes, length: int) -> bytes:
    if len(data) != length:
        raise ValueError(f"only {len(data)} bytes long")
    return data


def _entry(name: str, value: Mapping[str, Any], start: int) -> Entry:
    dtype, shape = str(value["dtype"]), tuple(map(_whole, value["shape"]))
    begin, end = map(_whole, value["data_offsets"])
    itemsize = DTYPES[dtype].itemsize if dtype in DTYPES else _OTHER_ITEM_SIZES.get(dtype)
    if itemsize is None:
        raise ValueError(f"tensor {name} has the unknown dtype {dtype}")
    elements = int(np.prod(shape, dtype=object))
    if min((*shape, begin), default=0) < 0 or end - begin != elements * itemsize:
        raise ValueError(f"tensor {name}: {end - begin} bytes for shape {shape} of {dtype}")
    return Entry(dtype, shape, start + begin, start + end)


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} where a whole number is expected")
    return value


def read_into(path: Path, entry: Entry, out: np.ndarray) -> None:
    """Reads one tensor's bytes into a contiguous array of its size.

    Raises:
      UserError: the file cannot be read to the tensor's end.
    """
    with _opened(path, entry.begin) as file:
        _fill(file, out, path)


@dataclasses.dataclass(frozen=True)
class RowBlock:
    """Some rows of a matrix, and where their bytes stand where that is known.

    Attributes:
      rows: [rows, columns], contiguous.
      descriptor: an open file, or None.
      offset: of the bytes in it.
    """

    rows: np.ndarray
    descriptor: int | None = None
    offset: int = 0


def read_row_blocks(path: Path, entry: Entry) -> Iterator[RowBlock]:
    """The rows of one tensor (a vector is one row) in blocks; each is gone with the next.

    Raises:
      UserError: the file cannot be read to the tensor's end.
    """
    dtype = DTYPES[entry.dtype]
    rows, columns = entry.shape if len(entry.shape) == 2 else (1, int(np.prod(entry.shape)))
    step = min(rows, rows_a_block(columns, dtype.itemsize))
    buffer = np.empty((step, columns), dtype)
    with _opened(path, entry.begin) as file:
        for start in range(0, rows, step):
            block = buffer[: min(step, rows - start)]
            _fill(file, block, path)
            offset = entry.begin + start * columns * dtype.itemsize
            yield RowBlock(block, file.fileno(), offset)


@contextlib.contextmanager
def _opened(path: Path, position: int) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(position)
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _fill(file: BinaryIO, out: np.ndarray, path: Path) -> None:
    view = memoryview(out.reshape(-1).view(np.uint8))
    while len(view):
        count = file.readinto(view)
        if not count:
            raise UserError(f"{path}: truncated while it was read; fetch it again")
        view = view[count:]


class Writer:
    """Writes one file tensor by tensor, in the order in which they were announced."""

    def __init__(self, path: Path, tensors: Sequence[tuple[str, np.dtype, tuple[int, ...]]]):
        """Opens `path` and writes the header.

        Args:
          path: the file to make.
          tensors: name, dtype and shape of each.
        """
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        self._left = list(tensors)[::-1]
        for name, dtype, shape in tensors:
            end = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            header[name] = {
                "dtype": NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes the next tensor, which must be the one announced."""
        expected, dtype, shape = self._left.pop()
        assert (name, array.dtype, array.shape) == (expected, dtype, shape), (name, expected)
        self._write(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            view = view[self._file.write(view) :]

    def close(self) -> None:
        """Ends the file, on disk."""
        assert not self._left, self._left[-1]
        os.fsync(self._file.fileno())
        self._file.close()

    def abort(self) -> None:
        """Closes an unfinished file."""
        self._file.close()

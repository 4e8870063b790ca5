"""Damages files as disks, cables and interrupted copies do, by a seed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

KINDS = ("flip", "flip", "flip", "truncate", "zeros", "delete")  # how often each is drawn


def damage(path: Path, kind: str, rng: np.random.Generator) -> str:
    """Damages a file; returns what was done, for the message of a failed test."""
    data = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
        return f"{path.name} deleted"
    if kind == "truncate":
        length = int(rng.integers(0, len(data))) if data else 0
        path.write_bytes(data[:length])
        return f"{path.name} cut to {length} of {len(data)} bytes"
    if kind == "zeros":  # a block that was never written
        begin = int(rng.integers(0, max(1, len(data) - 16)))
        data[begin : begin + 512] = bytes(len(data[begin : begin + 512]))
        path.write_bytes(data)
        return f"{path.name}: zeros from byte {begin} of {len(data)}"
    place, bit = int(rng.integers(0, len(data))), int(rng.integers(0, 8))
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"{path.name}: bit {bit} of byte {place} of {len(data)} flipped"


@contextlib.contextmanager
def damaged(path: Path, kind: str, rng: np.random.Generator) -> Iterator[str]:
    """The file is damaged within the block, and restored after it."""
    before = path.read_bytes()
    try:
        yield damage(path, kind, rng)
    finally:
        path.write_bytes(before)

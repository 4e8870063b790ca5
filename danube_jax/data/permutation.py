"""Pseudo-random permutations that are computed element by element, without a table."""

import functools
import hashlib
import json
import math

import numpy as np

ROUNDS = 6


def permute(index: np.ndarray, size: int, *key: int | str) -> np.ndarray:
    """Where a permutation of 0..size-1 sends each index.

    A Feistel network over pairs (i // columns, i % columns), with rows × columns only just above
    `size`; what falls beyond `size` is sent through again, which keeps it a bijection.

    Args:
      index: integer array of any shape, each in [0, size).
      size: number of elements, below 2**62.
      key: seed and names; each key gives another permutation.

    Returns:
      int64 array of the same shape.
    """
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    keys = _round_keys(key)
    out = _feistel(np.asarray(index, np.uint64), rows, columns, keys)
    outside = out >= size
    while outside.any():
        out[outside] = _feistel(out[outside], rows, columns, keys)
        outside = out >= size
    return out.astype(np.int64)


def draw(bound: int, *key: int | str) -> int:
    """A pseudo-random integer in [0, bound) that depends on `key` alone."""
    return int(_round_keys(key)[0]) % bound


@functools.lru_cache(4096)
def _round_keys(key: tuple[int | str, ...]) -> np.ndarray:
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def _feistel(index: np.ndarray, rows: int, columns: int, keys: np.ndarray) -> np.ndarray:
    left, right = np.divmod(index, np.uint64(columns))
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        left = (left + _mix(right ^ first) % np.uint64(rows)) % np.uint64(rows)
        right = (right + _mix(left ^ second) % np.uint64(columns)) % np.uint64(columns)
    return left * np.uint64(columns) + right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64; array arithmetic wraps around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

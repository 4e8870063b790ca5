"""Checksums of arrays: what a checkpoint records of its contents, and checks when it is read."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
BLOCK_BYTES = 1 << 20  # what is read, summed and written at a time stays in a core's cache


@jax.jit
def checksums(tree: PyTree) -> PyTree:
    """A uint32 checksum a leaf: its words times odd weights by position, summed modulo 2^32.

    Any change of a single word changes the sum, since an odd weight is invertible; the order of
    summation, and so the sharding, does not matter.
    """

    def checksum(leaf: jax.Array) -> jax.Array:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        words = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
        index = jnp.zeros(leaf.shape, jnp.uint32)
        for dim, size in enumerate(leaf.shape):
            index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, dim)
        return jnp.sum((words + jnp.uint32(1)) * (2 * index + 1), dtype=jnp.uint32)

    return jax.tree.map(checksum, tree)


def named_checksums(tree: PyTree) -> dict[str, int]:
    """`checksums` by the leaf's path in the tree."""
    sums = jax.tree_util.tree_leaves_with_path(checksums(tree))
    return {jax.tree_util.keystr(path): int(np.asarray(value)) for path, value in sums}


class MatrixChecksum:
    """The same checksum of a matrix that comes in blocks of rows, several times as fast on a CPU.

    With w the words, i and j their row and column, and a position of i s + j t, the sum of
    (w + 1) (2 (i s + j t) + 1) needs nothing but the sums of w + 1 along rows and along columns.
    """

    def __init__(self, rows: int, columns: int, transposed: bool = False):
        """Begins a matrix [rows, columns].

        Args:
          rows, columns: its shape.
          transposed: whether the array that the checksum is of is the matrix's transpose.
        """
        self._strides = (1, rows) if transposed else (columns, 1)
        self._columns = np.zeros(columns, np.uint32)
        self._row_part = self.rows = 0  # rows given so far

    def update(self, block: np.ndarray) -> None:
        """Adds the next rows, in any float dtype; contiguous."""
        words = block.view(f"u{block.dtype.itemsize}").astype(np.uint32)
        count, columns = words.shape
        sums = words.sum(axis=1, dtype=np.uint32).astype(np.uint64) + np.uint64(columns)
        index = np.arange(self.rows, self.rows + count, dtype=np.uint64)
        self._row_part += int((sums * index).sum(dtype=np.uint64))
        self._columns += words.sum(axis=0, dtype=np.uint32)
        self._columns += np.uint32(count)
        self.rows += count

    def value(self) -> int:
        """The checksum of all rows given."""
        row_stride, column_stride = self._strides
        index = np.arange(len(self._columns), dtype=np.uint64)
        weights = 2 * np.uint64(column_stride) * index + np.uint64(1)
        column_part = int((self._columns * weights).sum(dtype=np.uint64))
        return (2 * row_stride * self._row_part + column_part) % 2**32


def host_checksum(array: np.ndarray) -> int:
    """The checksum of a vector, or of a matrix contiguous in either order, on the host."""
    transposed = array.ndim == 2 and not array.flags.c_contiguous
    matrix = array.T if transposed else array.reshape(1, -1) if array.ndim < 2 else array
    checksum = MatrixChecksum(*matrix.shape, transposed=transposed)
    for block in row_blocks(matrix):
        checksum.update(block)
    return checksum.value()


def row_blocks(matrix: np.ndarray) -> Iterator[np.ndarray]:
    """Blocks of whole rows that stay in a core's cache."""
    rows = rows_a_block(matrix.shape[1], matrix.dtype.itemsize)
    for start in range(0, matrix.shape[0], rows):
        yield matrix[start : start + rows]


def rows_a_block(columns: int, itemsize: int) -> int:
    """How many rows of a matrix fit into a core's cache."""
    return max(1, BLOCK_BYTES // max(1, columns * itemsize))

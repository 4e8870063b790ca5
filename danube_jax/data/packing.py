"""Packing: several sequences of different length in one row, without one seeing another.

A row holds its sequences one after another. `segment_ids` tell them apart (attention stays within a
segment), `positions` begin again in each, and no token is to predict the first one of the next, so
that every sequence has the loss and the gradients that it has alone.
"""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

from danube_jax.data.chat_examples import Example, ExamplePair

Batch = dict[str, np.ndarray]


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each item goes, longest first, where it leaves the least room.

    Uses at most 11/9 of the fewest possible rows plus one (Johnson, 1973).

    Args:
      lengths: size of each item, 1 to `capacity`.
      capacity: size of a row.

    Returns:
      The items of each row, by index, in the order in which they were given; rows in the order of
      their first item.

    Raises:
      ValueError: an item is longer than a row.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and (lengths.max() > capacity or lengths.min() < 1):
        raise ValueError(f"items of {lengths.min()} to {lengths.max()} for rows of {capacity}")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, row), sorted
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        at = bisect.bisect_left(room, (length, -1))
        if at == len(room):
            rows.append([item])
            row, left = len(rows) - 1, capacity - length
        else:
            left, row = room.pop(at)
            rows[row].append(item)
            left -= length
        if left:
            bisect.insort(room, (left, row))
    return sorted(sorted(row) for row in rows)


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows of items.

    Attributes:
      rows: the items of each row, by index.
      items: most items in a row.
      used: places that hold a token, over all rows.
    """

    rows: tuple[tuple[int, ...], ...]
    items: int
    used: int

    @classmethod
    def build(cls, lengths: Sequence[int] | np.ndarray, capacity: int, packing: str) -> "Packed":
        """'best_fit' as the function of that name; 'none' gives every item a row of its own."""
        if packing == "best_fit":
            rows = best_fit(lengths, capacity)
        else:
            rows = [[item] for item in range(len(lengths))]
        most = max((len(row) for row in rows), default=0)
        return cls(tuple(map(tuple, rows)), most, int(np.sum(lengths)))


def empty_rows(shape: tuple[int, int], pad_id: int) -> Batch:
    """Rows of padding: `tokens`, `targets`, `segment_ids`, `positions` int32, `weights` float32."""
    batch = {key: np.full(shape, pad_id, np.int32) for key in ("tokens", "targets")}
    batch |= {key: np.zeros(shape, np.int32) for key in ("segment_ids", "positions")}
    batch["weights"] = np.zeros(shape, np.float32)
    return batch


def fill_row(batch: Batch, row: int, examples: Sequence[Example]) -> None:
    """Writes examples side by side into a row; the n-th is segment n, from 1; padding is 0."""
    at = 0
    for segment, example in enumerate(examples, 1):
        part = slice(at, at + example.length)
        batch["tokens"][row, part] = example.ids[:-1]
        batch["targets"][row, part] = example.ids[1:]
        batch["weights"][row, part] = example.mask[1:]
        batch["segment_ids"][row, part] = segment
        batch["positions"][row, part] = np.arange(example.length)
        at += example.length


def pack_examples(
    rows: Sequence[Sequence[Example]], width: int, pad_id: int, *, height: int | None = None
) -> Batch:
    """Rows of examples as arrays [height or len(rows), width]; rows beyond are padding.

    A `targets` entry of weight 0 is not to be predicted.
    """
    batch = empty_rows((height or len(rows), width), pad_id)
    for i, examples in enumerate(rows):
        fill_row(batch, i, examples)
    return batch


def pack_pairs(
    rows: Sequence[Sequence[ExamplePair]],
    width: int,
    pairs: int,
    pad_id: int,
    *,
    height: int | None = None,
) -> Batch:
    """Rows of preference pairs as arrays [height or len(rows), width].

    Pair p of a row is its segments 2 p + 1 (chosen) and 2 p + 2 (rejected). `pairs` float32
    [rows, pairs] is 1 for each pair that there is.
    """
    sides = [[side for pair in row for side in (pair.chosen, pair.rejected)] for row in rows]
    batch = pack_examples(sides, width, pad_id, height=height)
    counts = np.array([len(row) for row in rows] + [0] * (len(batch["tokens"]) - len(rows)))
    batch["pairs"] = (np.arange(pairs) < counts[:, None]).astype(np.float32)
    return batch

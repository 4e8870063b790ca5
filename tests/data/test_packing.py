"""Best-fit packing: every item once, no row too full, close to the fewest rows."""

import numpy as np
import pytest

from danube_jax.data.chat_examples import Example, ExamplePair
from danube_jax.data.packing import Packed, best_fit, pack_examples, pack_pairs


@pytest.mark.parametrize("seed", range(5))
def test_every_item_is_in_one_row_and_rows_are_nearly_full(seed):
    lengths = np.random.default_rng(seed).integers(1, 65, 700)
    rows = best_fit(lengths, 64)
    assert sorted(item for row in rows for item in row) == list(range(700))
    loads = np.array([lengths[row].sum() for row in rows])
    assert loads.max() <= 64
    fewest = -(-lengths.sum() // 64)
    assert len(rows) <= 11 / 9 * fewest + 1
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


def test_an_item_goes_where_it_leaves_the_least_room():
    # 5 and 4 open rows of 6 with room 1 and 2; the 2 fits the second exactly, the 1 the first.
    assert best_fit([5, 4, 2, 1], 6) == [[0, 3], [1, 2]]
    assert best_fit([], 6) == []
    with pytest.raises(ValueError, match="7"):
        best_fit([7], 6)
    packed = Packed.build([5, 4, 2, 1], 6, "none")
    assert (packed.rows, packed.items, packed.used) == (((0,), (1,), (2,), (3,)), 1, 12)


def example(*ids, trained=1):
    """An example whose last `trained` tokens are trained on."""
    mask = np.zeros(len(ids), bool)
    mask[len(ids) - trained :] = True
    return Example(np.array(ids, np.int32), mask)


def test_rows_hold_tokens_targets_masks_and_positions():
    batch = pack_examples([[example(1, 2, 3), example(4, 5, trained=1)]], 5, 9, height=2)
    assert batch["tokens"].tolist() == [[1, 2, 4, 9, 9], [9] * 5]
    assert batch["targets"].tolist() == [[2, 3, 5, 9, 9], [9] * 5]
    assert batch["weights"].tolist() == [[0, 1, 1, 0, 0], [0] * 5]
    assert batch["segment_ids"].tolist() == [[1, 1, 2, 0, 0], [0] * 5]
    assert batch["positions"].tolist() == [[0, 1, 0, 0, 0], [0] * 5]


def test_pairs_are_two_segments_each():
    pair = ExamplePair(example(1, 2), example(1, 3, 4, trained=2))
    batch = pack_pairs([[pair, pair], [pair]], 7, 2, 0)
    assert batch["segment_ids"].tolist() == [[1, 2, 2, 3, 4, 4, 0], [1, 2, 2, 0, 0, 0, 0]]
    assert batch["pairs"].tolist() == [[1, 1], [1, 0]]

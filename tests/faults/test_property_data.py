"""Properties of what the data are made of: permutations, packing, phases, mixtures, stores."""

import fractions
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from properties import holds_for

from danube_jax.data import permutation
from danube_jax.data.chat_examples import Example, ExamplePair
from danube_jax.data.packing import best_fit, pack_examples, pack_pairs
from danube_jax.data.phases import (
    MixTable,
    Phase,
    PhaseSchedule,
    SampleOrder,
    largest_remainder,
    sequences_read,
    spread_evenly,
)
from danube_jax.data.token_store import TokenStore
from danube_jax.data.token_store_writer import TokenStoreWriter

KEYS = st.lists(st.one_of(st.integers(-(2**40), 2**40), st.text(max_size=8)), max_size=4)


@holds_for(10, size=st.integers(1, 2_000), key=KEYS)
def test_a_permutation_visits_everything_once(size, key):
    order = permutation.permute(np.arange(size), size, *key)
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


@holds_for(
    20,
    size=st.integers(1, 2**61),
    places=st.lists(st.integers(0, 2**61 - 1), unique=True, min_size=1, max_size=50),
    key=KEYS,
)
def test_a_large_permutation_sends_no_two_to_one_place(size, places, key):
    index = np.unique(np.array([place % size for place in places], np.int64))
    order = permutation.permute(index, size, *key)
    assert len(np.unique(order)) == len(index)
    assert order.min() >= 0
    assert order.max() < size
    np.testing.assert_array_equal(order[::-1], permutation.permute(index[::-1], size, *key))


CAPACITY = st.integers(1, 60)


@holds_for(60, capacity=CAPACITY, data=st.data())
def test_packing_places_every_item_once_and_never_too_many(capacity, data):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    rows = best_fit(lengths, capacity)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    filled = sorted(sum(lengths[item] for item in row) for row in rows)
    assert all(size <= capacity for size in filled)
    # No two rows would fit into one, so at most one of them is half empty.
    assert len(filled) < 2 or filled[0] + filled[1] > capacity


def _example(data, longest: int) -> Example:
    count = data.draw(st.integers(2, longest + 1))
    ids = data.draw(st.lists(st.integers(0, 999), min_size=count, max_size=count))
    mask = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return Example(np.array(ids, np.int32), np.array([False, *mask[1:]]))


def _segments(batch, row: int):
    """(tokens with the last target, weights) of the sequences of a row, read from the arrays."""
    found = []
    for segment in range(1, batch["segment_ids"][row].max(initial=0) + 1):
        (places,) = np.nonzero(batch["segment_ids"][row] == segment)
        assert len(places)
        np.testing.assert_array_equal(np.diff(places), 1)  # not split
        np.testing.assert_array_equal(batch["positions"][row, places], np.arange(len(places)))
        tokens, targets = batch["tokens"][row, places], batch["targets"][row, places]
        np.testing.assert_array_equal(tokens[1:], targets[:-1])
        found.append(([*tokens, targets[-1]], batch["weights"][row, places]))
    return found


@holds_for(40, width=st.integers(1, 40), data=st.data())
def test_packed_rows_hold_every_token_of_every_example_once(width, data):
    examples = [_example(data, width) for _ in range(data.draw(st.integers(1, 12)))]
    rows = best_fit([example.length for example in examples], width)
    batch = pack_examples([[examples[i] for i in row] for row in rows], width, pad_id=7)
    assert all(value.shape == (len(rows), width) for value in batch.values())
    for number, row in enumerate(rows):
        found = _segments(batch, number)
        assert len(found) == len(row)
        for (ids, weights), item in zip(found, row, strict=True):
            np.testing.assert_array_equal(ids, examples[item].ids)
            np.testing.assert_array_equal(weights, examples[item].mask[1:])
    padding = batch["segment_ids"] == 0
    assert padding.sum() == len(rows) * width - sum(example.length for example in examples)
    assert not batch["weights"][padding].any()
    assert (batch["tokens"][padding] == 7).all()


@holds_for(20, width=st.integers(2, 40), data=st.data())
def test_packed_pairs_keep_their_sides_together(width, data):
    pairs = [
        ExamplePair(_example(data, width // 2), _example(data, width // 2))
        for _ in range(data.draw(st.integers(1, 8)))
    ]
    rows = best_fit([pair.length for pair in pairs], width)
    most = max(map(len, rows))
    batch = pack_pairs([[pairs[i] for i in row] for row in rows], width, most, pad_id=0)
    for number, row in enumerate(rows):
        found = _segments(batch, number)
        sides = [side for item in row for side in (pairs[item].chosen, pairs[item].rejected)]
        assert [list(ids) for ids, _ in found] == [list(side.ids) for side in sides]
        assert batch["pairs"][number].tolist() == [1.0] * len(row) + [0.0] * (most - len(row))


WEIGHTS = st.lists(
    st.one_of(st.floats(1e-6, 1e6), st.integers(1, 10**6)), min_size=1, max_size=9
).map(tuple)


@holds_for(60, weights=WEIGHTS, total=st.integers(0, 10_000))
def test_shares_are_whole_and_within_one(weights, total):
    counts = largest_remainder(weights, total)
    assert sum(counts) == total
    whole = sum(map(fractions.Fraction, weights))
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - total * fractions.Fraction(weight) / whole) < 1


@holds_for(40, counts=st.lists(st.integers(0, 150), min_size=1, max_size=9))
def test_every_prefix_of_a_mixture_is_fair(counts):
    total = sum(counts)
    order = spread_evenly(counts)
    assert np.bincount(order, minlength=len(counts)).tolist() == counts
    for i, count in enumerate(counts):
        # Exact in integers: |seen · total - n · count| < total for every prefix of n entries.
        seen = np.cumsum(order == i)
        assert (np.abs(seen * total - np.arange(1, total + 1) * count) < max(total, 1)).all()


@holds_for(20, weights=WEIGHTS, period=st.integers(1, 400), data=st.data())
def test_a_mixture_counts_what_its_table_repeats(weights, period, data):
    table = MixTable.build(weights, period)
    sequences = data.draw(st.integers(0, 5 * period))
    repeated = np.resize(table.source, sequences) if sequences else table.source[:0]
    assert table.totals(sequences) == np.bincount(repeated, minlength=len(weights)).tolist()
    for i in range(len(weights)):
        (places,) = np.nonzero(table.source == i)
        np.testing.assert_array_equal(table.rank[places], np.arange(len(places)))


@st.composite
def schedules(draw, most_steps: int = 12):
    """A schedule of one to four phases over up to four sources."""
    names = "abcd"[: draw(st.integers(1, 4))]
    phases, step, token, sequence = [], 0, 0, 0
    for index in range(draw(st.integers(1, 4))):
        context = 2 ** draw(st.integers(1, 5))
        batch = context * draw(st.integers(1, 6))
        steps = draw(st.integers(1, most_steps))
        weights = [draw(st.sampled_from((0, 0, 0.1, 0.5, 1, 3))) for _ in names]
        if not any(weights):
            weights[draw(st.integers(0, len(names) - 1))] = 1
        mixture = tuple((n, float(w)) for n, w in zip(names, weights, strict=True) if w)
        phases.append(
            Phase(index, f"p{index}", step, steps, token, steps * batch, batch, context, sequence,
                  mixture)
        )  # fmt: skip
        step, token = step + steps, token + steps * batch
        sequence += steps * (batch // context)
    used = {name for phase in phases for name, _ in phase.mixture}
    sources = tuple(name for name in names if name in used)
    return PhaseSchedule(tuple(phases), max(phase.context for phase in phases), sources)


@holds_for(40, schedule=schedules())
def test_tokens_and_sequences_are_exact_at_every_boundary(schedule):
    tokens = sequences = 0
    for phase in schedule.phases:
        begin, end = phase.first_step, phase.first_step + phase.steps
        for step in {begin, begin + 1, end - 1} & set(range(begin, end)):
            assert schedule.phase_at_step(step) is phase
            inside = step - begin
            assert schedule.tokens_at_step(step) == tokens + inside * phase.batch_tokens
            first = schedule.first_sequence_at_step(step)
            assert first == sequences + inside * (phase.batch_tokens // phase.context)
        if begin:
            assert schedule.phase_at_step(begin - 1) is schedule.phases[phase.index - 1]
        tokens += phase.tokens
        sequences += phase.steps * (phase.batch_tokens // phase.context)
        assert schedule.tokens_at_step(end) == tokens
    assert (schedule.total_tokens, schedule.total_sequences) == (tokens, sequences)


@holds_for(12, schedule=schedules(), data=st.data())
def test_what_a_run_reads_is_exact_and_repeats_nothing_too_early(schedule, data):
    sizes = {name: data.draw(st.integers(schedule.block + 1, 3_000)) for name in schedule.sources}
    order = SampleOrder(schedule, sizes, seed=data.draw(st.integers(0, 99)))
    source, start = order.locate(np.arange(schedule.total_sequences))
    context = np.concatenate([[p.context] * p.num_sequences for p in schedule.phases])
    for place, name in enumerate(schedule.sources):
        chosen = source == place
        assert (start[chosen] >= 0).all()
        assert (start[chosen] + context[chosen] + 1 <= sizes[name]).all()
        use = order.use[name]
        if use.epochs <= 1:  # then no position is an input twice
            seen = np.zeros(sizes[name], int)
            for first, length in zip(start[chosen], context[chosen], strict=True):
                seen[first : first + length] += 1
            assert seen.max() <= 1
    step = data.draw(st.integers(0, schedule.total_steps))
    counted = sequences_read(schedule, step)
    for phase, counts in zip(schedule.phases, counted, strict=True):
        steps = min(max(step - phase.first_step, 0), phase.steps)
        numbers = slice(phase.first_sequence, phase.first_sequence + steps * phase.sequences)
        for name, count in counts.items():
            assert (source[numbers] == schedule.sources.index(name)).sum() == count
            weights = dict(phase.mixture)
            whole = sum(map(fractions.Fraction, weights.values()))
            share = fractions.Fraction(weights[name]) / whole
            # Less than one from the table's rate, which is less than one a table from the share.
            assert abs(count - share * steps * phase.sequences) < 2


@holds_for(15, data=st.data())
def test_a_token_store_gives_back_what_was_added(data):
    vocab_size = data.draw(st.sampled_from((300, 2**16, 2**16 + 1, 200_000)))
    documents = data.draw(
        st.lists(
            st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=40),
            min_size=1,
            max_size=20,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        shard = data.draw(st.integers(1, 60))
        with TokenStoreWriter(
            path, vocab_size=vocab_size, tokenizer="t", provenance={}, shard_tokens=shard
        ) as writer:
            for ids in documents:
                writer.add(ids, 3)
            writer.finish()
        store = TokenStore.open(path)
        store.verify()
        expected = np.concatenate([np.array(ids) for ids in documents])
        length = data.draw(st.integers(1, len(expected)))
        starts = np.arange(len(expected) - length + 1)
        windows = np.lib.stride_tricks.sliding_window_view(expected, length)
        np.testing.assert_array_equal(store.read(starts, length), windows)
        begins = np.cumsum([0, *map(len, documents)])[:-1]
        np.testing.assert_array_equal(store.document_starts(), begins)

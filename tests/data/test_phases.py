import fractions

import numpy as np
import pytest

from danube_jax.data import permutation, phases
from danube_jax.data.phases import MixTable, PhaseSchedule, SampleOrder
from danube_jax.errors import UserError


def locate_all(order):
    """Per phase, in time order: (phase, sources [N], starts [N])."""
    for phase in order.schedule.phases:
        numbers = np.arange(phase.num_sequences) + phase.first_sequence
        yield phase, *order.locate(numbers)


LENGTHENING = [
    ("short", 1280, 8, {"a": 0.5, "b": 0.5}),
    ("middle", 640, 16, {"a": 0.25, "b": 0.25, "c": 0.5}, 128),
    ("long", 960, 32, {"a": 0.2, "b": 0, "c": 0.8}, 96),
]


def test_boundaries(make_run):
    schedule = PhaseSchedule.from_config(make_run(LENGTHENING))
    assert [p.first_step for p in schedule.phases] == [0, 20, 25]
    assert [p.first_token for p in schedule.phases] == [0, 1280, 1920]
    assert [p.first_sequence for p in schedule.phases] == [0, 160, 200]
    assert schedule.total_steps == 35
    assert schedule.total_tokens == 2880
    assert schedule.total_sequences == 230
    expected = {0: "short", 19: "short", 20: "middle", 21: "middle", 24: "middle", 25: "long"}
    expected |= {26: "long", 34: "long"}
    assert {step: schedule.phase_at_step(step).name for step in expected} == expected
    tokens = {0: 0, 19: 1216, 20: 1280, 21: 1408, 24: 1792, 25: 1920, 26: 2016, 34: 2784, 35: 2880}
    assert {step: schedule.tokens_at_step(step) for step in tokens} == tokens
    sequences = {19: 152, 20: 160, 21: 168, 24: 192, 25: 200, 26: 203}
    assert {step: schedule.first_sequence_at_step(step) for step in sequences} == sequences
    for step in (-1, 35):
        with pytest.raises(IndexError, match="outside the run of 35 steps"):
            schedule.phase_at_step(step)
    with pytest.raises(IndexError):
        schedule.tokens_at_step(36)


def test_three_trillion_tokens_are_exact(make_run):
    batch = 1_179_648
    steps = [1_695_421, 593_397, 254_313]
    contexts = [2048, 2048, 8192]
    rows = [
        (f"p{i}", n * batch, context, {"a": 0.7, "b": 0.3}, batch)
        for i, (n, context) in enumerate(zip(steps, contexts, strict=True))
    ]
    run = make_run(rows)
    schedule = PhaseSchedule.from_config(run)
    assert schedule.total_tokens == sum(steps) * batch > 2.9e12
    assert schedule.tokens_at_step(sum(steps) - 1) == (sum(steps) - 1) * batch
    tokens = {"a": 2_500_000_000_001, "b": 3_000_000_000}
    order = SampleOrder(schedule, tokens, seed=1)
    windows = sum(sum(use.windows) for use in order.use.values())
    assert windows == schedule.total_sequences
    last = schedule.total_sequences - 1
    sources, starts = order.locate(np.arange(last - 99, last + 1))
    for source, start in zip(sources, starts, strict=True):
        assert 0 <= start <= tokens[schedule.sources[source]] - 8193


@pytest.mark.parametrize("seed", range(20))
def test_largest_remainder_against_its_definition(seed):
    rng = np.random.default_rng(seed)
    weights = tuple((rng.dirichlet(np.ones(rng.integers(1, 9)) * 0.4) * 7).tolist())
    total = int(rng.integers(1, 500))
    counts = phases.largest_remainder(weights, total)
    whole = sum(map(fractions.Fraction, weights))
    shares = [fractions.Fraction(w) * total / whole for w in weights]
    assert sum(counts) == total
    assert all(int(s) <= c <= int(s) + 1 for c, s in zip(counts, shares, strict=True))
    raised = [s - int(s) for c, s in zip(counts, shares, strict=True) if c > int(s)]
    kept = [s - int(s) for c, s in zip(counts, shares, strict=True) if c == int(s)]
    assert not raised or not kept or min(raised) >= max(kept)


@pytest.mark.parametrize("period", [1, 2, 13, 640, 65_536])
@pytest.mark.parametrize(
    "weights", [(1.0,), (0.5, 0.5), (0.9, 0.1), (3, 1, 1e-9), (0.7, 0.1, 0.1, 0.05, 0.03, 0.02)]
)
def test_every_prefix_of_the_table_is_fair(weights, period):
    table = MixTable.build(weights, period)
    taken = np.cumsum(table.source[:, None] == np.arange(len(weights)), axis=0)
    due = np.arange(1, period + 1)[:, None] * table.counts
    assert np.abs(taken * period - due).max() < period
    assert table.counts.sum() == period
    for i in range(len(weights)):
        np.testing.assert_array_equal(
            table.rank[table.source == i], np.arange((table.source == i).sum())
        )
    for sequences in (0, 1, period, 3 * period + period // 2):
        repeated = np.resize(table.source, sequences)
        expected = np.bincount(repeated, minlength=len(weights))
        assert table.totals(sequences) == expected.tolist()


@pytest.mark.parametrize("size", [*range(1, 40), 100, 1023, 1024, 1025])
def test_permutation_is_a_bijection(size):
    for key in ((0, "a"), (0, "b"), (1, "a")):
        image = permutation.permute(np.arange(size), size, *key)
        np.testing.assert_array_equal(np.sort(image), np.arange(size))
        one_by_one = [permutation.permute(np.array([i]), size, *key)[0] for i in range(size)]
        np.testing.assert_array_equal(image, one_by_one)


def test_permutation_is_well_mixed():
    size = 20_000
    index = np.arange(size)
    image = permutation.permute(index, size, 7)
    other = permutation.permute(index, size, 8)
    assert (image == other).mean() < 0.001
    assert abs(np.corrcoef(index, image)[0, 1]) < 0.03
    neighbours = np.abs(np.diff(image))
    assert abs(neighbours.mean() / size - 1 / 3) < 0.01


def test_permutation_of_a_huge_set():
    size = 10**15 + 37
    image = permutation.permute(np.arange(50_000), size, "key")
    assert image.min() >= 0
    assert image.max() < size
    assert len(np.unique(image)) == 50_000


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "tokens", [{"a": 2000, "b": 1500, "c": 3000}, {"a": 129, "b": 97, "c": 33}]
)
def test_no_position_is_read_twice_before_the_source_is_used_up(make_run, tokens, seed):
    run = make_run(LENGTHENING, seed=seed)
    order = SampleOrder(PhaseSchedule.from_config(run), tokens, seed)
    block = 32
    for i, name in enumerate(order.sources):
        an_epoch = (tokens[name] - 1) // block
        reads, first_block, lost = {}, 0, 0
        for phase, sources, starts in locate_all(order):
            mine = starts[sources == i]
            a_block = block // phase.context
            for number, start in enumerate(mine.tolist()):
                assert 0 <= start <= tokens[name] - phase.context - 1
                epoch = (first_block * a_block + number) // (a_block * an_epoch)
                count = reads.setdefault(epoch, np.zeros(tokens[name], int))
                count[start : start + phase.context] += 1
            first_block += -(-len(mine) // a_block)
            lost += block - phase.context
        for epoch, count in reads.items():
            assert count.max() == 1
            if epoch < max(reads):
                tail = tokens[name] - 1 - an_epoch * block
                assert (count == 0).sum() <= 1 + tail + lost
        assert len(reads) == -(-first_block // an_epoch)
        assert order.use[name].epochs == fractions.Fraction(first_block, an_epoch)


def test_epochs_and_seeds_and_sources_have_their_own_order(make_run):
    rows = [("only", 64 * 64, 16, {"a": 0.5, "b": 0.5})]
    schedule = PhaseSchedule.from_config(make_run(rows))
    tokens = {"a": 64 * 16 + 9, "b": 64 * 16 + 9}

    def starts(seed, source):
        sources, at = SampleOrder(schedule, tokens, seed).locate(np.arange(256))
        return at[sources == source]

    first, second = np.split(starts(0, 0), 2)
    assert len(first) == 64
    assert (first % 16 == first[0] % 16).all()
    assert not np.array_equal(first - first[0] % 16, second - second[0] % 16)
    assert not np.array_equal(starts(0, 0), starts(1, 0))
    assert not np.array_equal(starts(0, 0), starts(0, 1))
    offsets = {int(starts(seed, 0)[0]) % 16 for seed in range(40)}
    assert offsets <= set(range(9))
    assert len(offsets) > 4


def test_realised_mix_is_exact(make_run):
    weights = {"a": 0.613, "b": 0.2, "c": 0.187, "never": 0.0}
    rows = [("only", 200_000 * 8, 8, weights, 8)]
    schedule = PhaseSchedule.from_config(make_run(rows))
    assert schedule.sources == ("a", "b", "c")
    order = SampleOrder(schedule, dict.fromkeys("abc", 10_000), 0)
    sources, _ = order.locate(np.arange(200_000))
    for begin in range(0, 3 * 65_536, 65_536):
        counts = np.bincount(sources[begin : begin + 65_536], minlength=3)
        for i, name in enumerate("abc"):
            assert abs(counts[i] - 65_536 * weights[name]) < 1
    assert np.bincount(sources).tolist() == [order.use[n].windows[0] for n in "abc"]


def test_random_access_equals_reading_on(make_run):
    order = SampleOrder(
        PhaseSchedule.from_config(make_run(LENGTHENING)), {"a": 200, "b": 300, "c": 97}, 3
    )
    everything = order.locate(np.arange(230))
    shuffled = np.random.default_rng(0).permutation(230)
    for whole, part in zip(everything, order.locate(shuffled), strict=True):
        np.testing.assert_array_equal(whole[shuffled], part)
    with pytest.raises(IndexError):
        order.locate(np.array([230]))


def test_repetition_cap_names_the_source_and_what_would_be_valid(make_run):
    rows = [("only", 6400, 32, {"a": 0.5, "b": 0.5})]
    run = make_run(rows, max_epochs=2.5)
    schedule = PhaseSchedule.from_config(run)

    def check(tokens):
        phases.check_repetition(run, phases.source_use(schedule, {"a": tokens, "b": 10_000}))

    with pytest.raises(UserError, match=r"sources\.a.* needs 3,200 tokens .*at least 1,281 tokens"):
        check(1280)
    check(1281)
    with pytest.raises(UserError, match=r"max_epochs of at least 2\.57"):
        check(1279)
    with pytest.raises(UserError, match="expected at least 33 tokens"):
        check(32)
    with pytest.raises(UserError, match=r"sources\.b: no token store"):
        phases.source_use(schedule, {"a": 5000})


def test_fingerprint_reports_what_changed_by_name(make_run):
    stores = {"a": "1", "b": "2", "c": "3"}
    old = phases.data_fingerprint(make_run(LENGTHENING), stores, "t")
    assert phases.describe_mismatch(old, dict(old)) == []
    assert old == phases.data_fingerprint(make_run(LENGTHENING), stores, "t")

    def changed(rows=LENGTHENING, stores=stores, tokenizer="t", **options):
        new = phases.data_fingerprint(make_run(rows, **options), stores, tokenizer)
        return [line.split(" (")[0] for line in phases.describe_mismatch(old, new)]

    assert changed(stores={**stores, "b": "9"}) == ["source b changed"]
    assert changed(tokenizer="u") == ["tokenizer changed"]
    assert changed(seed=5) == ["training.seed changed"]
    assert changed(mask_documents=True) == ["data.mask_documents changed"]
    heavier = [*LENGTHENING[:2], ("long", 960, 32, {"a": 0.3, "c": 0.8}, 96)]
    assert changed(rows=heavier) == ["phase 2"]
    assert changed(rows=[*LENGTHENING, ("more", 64, 32, {"a": 1})]) == ["phase 3"]
    assert changed(num_workers=3) == []


def test_order_is_the_one_that_earlier_checkpoints_were_trained_in(make_run):
    schedule = PhaseSchedule.from_config(make_run(LENGTHENING))
    order = SampleOrder(schedule, {"a": 700, "b": 1100, "c": 900}, seed=5)
    sources, starts = order.locate(np.arange(0, 230, 23))
    # A change here needs another phases.ORDER_VERSION.
    assert phases.ORDER_VERSION == 1
    assert sources.tolist() == [0, 1, 0, 1, 0, 1, 0, 0, 2, 0]
    assert starts.tolist() == [312, 125, 656, 1037, 40, 773, 344, 400, 480, 75]

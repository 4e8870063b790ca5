import os
import pickle
import signal

import numpy as np
import psutil
import pytest

from danube_jax.config import DataConfig
from danube_jax.data import loader
from danube_jax.data.phases import PhaseSchedule
from danube_jax.errors import UserError

ROWS = [
    ("short", 2560, 8, {"a": 0.5, "b": 0.5}, 256),
    ("middle", 640, 16, {"a": 0.25, "b": 0.25, "c": 0.5}, 128),
    ("long", 1280, 32, {"a": 0.2, "b": 0, "c": 0.8}, 128),
]


@pytest.fixture
def stores(make_store):
    return {"a": make_store("a", 700), "b": make_store("b", 1100), "c": make_store("c", 900)}


@pytest.fixture
def run(make_run):
    return make_run(ROWS, microbatch_tokens=32, mask_documents=True, seed=5)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)


def flat(store):
    return store.read(np.array([0]), store.tokens)[0]


def owners(store):
    starts = store.document_starts()
    return np.repeat(np.arange(len(starts)), np.diff([*starts, store.tokens]))


def test_batches_against_brute_force(run, stores):
    source = loader.BatchSource(run, stores, devices=2)
    schedule = source.schedule
    texts, documents = ([f(stores[n]) for n in source.order.sources] for f in (flat, owners))
    assert len(source) == 10 + 5 + 10
    counted = 0
    for step in range(len(source)):
        phase, batch = schedule.phase_at_step(step), source[step]
        rows = 2 * 32 // phase.context
        micro = phase.sequences // rows
        shape = (micro, rows, phase.context)
        assert {key: value.shape for key, value in batch.items()} == dict.fromkeys(batch, shape)
        assert [batch[k].dtype for k in ("tokens", "targets", "weights", "segment_ids")] == [
            np.dtype(d) for d in (np.int32, np.int32, np.float32, np.int32)
        ]
        for a in range(micro):
            for r in range(rows):
                number = schedule.first_sequence_at_step(step) + a * rows + r
                (which,), (start,) = source.order.locate(np.array([number]))
                window = slice(start, start + phase.context + 1)
                text, owner = texts[which][window], documents[which][window]
                np.testing.assert_array_equal(batch["tokens"][a, r], text[:-1])
                np.testing.assert_array_equal(batch["targets"][a, r], text[1:])
                np.testing.assert_array_equal(batch["weights"][a, r], owner[1:] == owner[:-1])
                np.testing.assert_array_equal(batch["segment_ids"][a, r], owner[:-1] - owner[0] + 1)
        counted += batch["tokens"].size
        expected = schedule.tokens_at_step(step + 1)
        assert counted == expected
    assert counted == schedule.total_tokens == sum(phase.tokens for phase in run.phases)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_hold_consecutive_rows_of_the_same_batch(run, stores, processes):
    whole = loader.BatchSource(run, stores, devices=4)
    parts = [
        loader.BatchSource(run, stores, devices=4, process_index=i, process_count=processes)
        for i in range(processes)
    ]
    for step in range(len(whole)):
        batches = [part[step] for part in parts]
        joined = {key: np.concatenate([b[key] for b in batches], axis=1) for key in batches[0]}
        assert_same(joined, whole[step])


def test_sequences_do_not_depend_on_devices_and_micro_batches(make_run, stores):
    cuts = [(1, None), (1, 32), (4, 32), (2, 64)]
    sources = [
        loader.BatchSource(make_run(ROWS, microbatch_tokens=m), stores, devices=d) for d, m in cuts
    ]
    for step in range(len(sources[0])):
        first, *others = (
            {k: v.reshape(-1, v.shape[-1]) for k, v in s[step].items()} for s in sources
        )
        for other in others:
            assert_same(first, other)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_do_not_change_the_stream(run, stores, workers):
    source = loader.BatchSource(run, stores, devices=2)
    batches = list(loader.make_loader(source, 7, 19, num_workers=workers, prefetch=3))
    assert len(batches) == 12
    for step, batch in zip(range(7, 19), batches, strict=True):
        assert_same(batch, source[step])


def test_resuming_at_any_step_equals_the_uninterrupted_stream(run, stores):
    source = loader.BatchSource(run, stores, devices=1)
    stream = list(loader.make_loader(source))
    assert len(stream) == len(source)
    for start in range(len(source) + 2):
        resumed = list(loader.make_loader(source, start, prefetch=1))
        assert len(resumed) == max(0, len(source) - start)
        for got, expected in zip(resumed[:3], stream[start:], strict=False):
            assert_same(got, expected)


def test_without_masks_every_target_counts(make_run, stores):
    batch = loader.BatchSource(make_run(ROWS), stores)[0]
    assert set(batch) == {"tokens", "targets", "weights"}
    assert (batch["weights"] == 1).all()


def test_source_pickles_without_the_tokens(make_run, make_store):
    stores = {"a": make_store("big", 400_000)}
    source = loader.BatchSource(make_run([("only", 64 * 50, 32, {"a": 1})]), stores)
    before = source[3]
    data = pickle.dumps(source)
    assert len(data) < 20_000
    assert_same(pickle.loads(data)[3], before)


def test_dead_worker_raises(make_run, make_store):
    stores = {"a": make_store("a", 5_000)}
    source = loader.BatchSource(make_run([("only", 64 * 10_000, 32, {"a": 1})]), stores)
    known = {child.pid for child in psutil.Process().children(recursive=True)}
    batches = loader.make_loader(source, num_workers=1, prefetch=1)
    next(batches)
    started = [p for p in psutil.Process().children(recursive=True) if p.pid not in known]
    workers = [p for p in started if "spawn_main" in " ".join(p.cmdline())]
    assert workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError):
        list(batches)
    batches.close()


def test_what_does_not_divide_is_refused_with_valid_values(make_run, stores):
    schedule = PhaseSchedule.from_config(make_run(ROWS))
    short, _, long = schedule.phases

    def cut(phase, devices, micro):
        return loader.micro_batches(make_run(ROWS, microbatch_tokens=micro), phase, devices)

    assert cut(short, 1, None) == (1, 32)
    assert cut(short, 2, 16) == (8, 4)
    assert cut(short, 32, 8) == (1, 32)
    assert cut(long, 2, 32) == (2, 2)
    with pytest.raises(UserError, match="valid values are 8, 16, 32, 64"):
        cut(short, 4, 24)
    with pytest.raises(UserError, match=r"microbatch_tokens: 16 .* valid values are 32, 64, 128"):
        cut(long, 1, 16)
    with pytest.raises(UserError, match="a multiple of 24 tokens, such as 264"):
        cut(short, 3, None)
    with pytest.raises(UserError, match="hosts"):
        loader.BatchSource(make_run(ROWS), stores, devices=3, process_count=2)


def test_start_is_refused_where_a_source_repeats_too_often(make_run, stores):
    with pytest.raises(UserError, match=r"config\.data\.sources\.a\.max_epochs"):
        loader.BatchSource(make_run(ROWS, max_epochs=1.0), stores)


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 500, 10_000])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_heldout_batches_score_each_target_once(stores, tokens, processes):
    store = stores["a"]
    text, owner = flat(store), owners(store)
    options = {"context": 32, "batch_rows": 4, "tokens": tokens, "mask_documents": True}
    shares = [
        list(
            loader.heldout_batches(
                store, **options, process_index=i, process_count=processes, pad_id=7
            )
        )
        for i in range(processes)
    ]
    targets = min(tokens, store.tokens - 1)
    assert {len(share) for share in shares} == {-(-targets // (4 * 32))}
    joined = {
        key: np.concatenate(
            [np.concatenate([b[key] for b in group]) for group in zip(*shares, strict=True)]
        )
        for key in shares[0][0]
    }
    assert joined["tokens"].shape == (4 * len(shares[0]), 32)
    scored = joined["segment_ids"].ravel() > 0
    assert scored.sum() == targets
    assert scored[:targets].all()
    np.testing.assert_array_equal(joined["tokens"].ravel()[:targets], text[:targets])
    np.testing.assert_array_equal(joined["targets"].ravel()[:targets], text[1 : targets + 1])
    same = (owner[1:] == owner[:-1])[:targets]
    np.testing.assert_array_equal(joined["weights"].ravel()[:targets], same)
    assert (joined["weights"].ravel()[targets:] == 0).all()
    assert (joined["tokens"].ravel()[targets:] == 7).all()
    unmasked = loader.heldout_batches(store, **{**options, "mask_documents": False})
    assert sum(batch["weights"].sum() for batch in unmasked) == targets


def test_open_stores_checks_tokenizer_and_bytes(stores):
    paths = {name: str(store.path) for name, store in stores.items()}
    assert loader.open_stores(DataConfig(), paths, "none").keys() == stores.keys()
    with pytest.raises(UserError, match=r"sources\.a: .* was written with the tokenizer none"):
        loader.open_stores(DataConfig(), paths, "other")
    shard = stores["b"].path / "tokens-00000.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"tokens-00000\.npy: sha256"):
        loader.open_stores(DataConfig(), paths)
    loader.open_stores(DataConfig(verify="never"), paths)

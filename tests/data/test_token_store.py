import concurrent.futures
import contextlib
import itertools
import json
import pickle

import numpy as np
import pytest

from danube_jax.data import token_store
from danube_jax.data.token_store import TokenStore
from danube_jax.data.token_store_writer import TokenStoreWriter
from danube_jax.errors import UserError


def make_documents(count=40, vocab_size=1000, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(vocab_size, size=rng.integers(1, 30)) for _ in range(count)]


def open_writer(path, **changes):
    settings = {"vocab_size": 1000, "tokenizer": "abc", "provenance": {"from": "a test"}}
    return TokenStoreWriter(path, **{**settings, "shard_tokens": 64, **changes})


def write_store(path, documents, **changes):
    with open_writer(path, **changes) as writer:
        for i, document in enumerate(documents):
            writer.add(document, i)
        return writer.finish()


@pytest.fixture
def documents():
    return make_documents()


@pytest.fixture
def store(tmp_path, documents):
    return write_store(tmp_path / "store", documents)


def test_counts_are_exact(store, documents):
    assert store.tokens == sum(map(len, documents))
    assert store.documents == len(documents)
    assert store.bytes == sum(range(len(documents)))
    assert store.dtype == np.uint16
    assert store.provenance == {"from": "a test"}
    assert len(list(store.path.glob("tokens-*.npy"))) > 3
    manifest = json.loads((store.path / "store.json").read_text())
    assert max(shard["tokens"] for shard in manifest["shards"]) <= 64


@pytest.mark.parametrize("length", [1, 7, 64, 200])
def test_every_window_equals_the_flat_text(store, documents, length):
    flat = np.concatenate(documents)
    starts = np.random.default_rng(1).permutation(len(flat) - length + 1)
    windows = store.read(starts, length)
    assert windows.dtype == np.uint16
    np.testing.assert_array_equal(windows, [flat[s : s + length] for s in starts])


@pytest.mark.parametrize("length", [1, 7, 64, 200])
def test_segment_ids_against_brute_force(store, documents, length):
    owner = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
    starts = np.arange(len(owner) - length + 1)
    expected = [owner[s : s + length] - owner[s] + 1 for s in starts]
    got = store.segment_ids(starts, length)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, expected)


def test_document_starts(store, documents):
    lengths = [len(d) for d in documents]
    np.testing.assert_array_equal(store.document_starts(), np.cumsum([0, *lengths[:-1]]))


@pytest.mark.parametrize("start", [-1, None])
def test_window_outside_the_store(store, start):
    start = store.tokens - 4 if start is None else start
    with pytest.raises(IndexError, match="do not lie in"):
        store.read(np.array([start]), 5)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32), (70_000, np.uint32)]
)
def test_dtype_follows_the_vocabulary(tmp_path, vocab_size, dtype):
    top = [vocab_size - 1, 0]
    store = write_store(tmp_path, [top], vocab_size=vocab_size)
    assert store.dtype == dtype
    np.testing.assert_array_equal(TokenStore.open(tmp_path).read(np.array([0]), 2), [top])


def test_pickled_store_reads_the_same_and_carries_no_tokens(tmp_path):
    store = write_store(tmp_path, [np.arange(1000)] * 50, shard_tokens=10_000)
    store.read(np.array([0]), 1000)
    data = pickle.dumps(store)
    assert len(data) < 5_000
    window = np.array([123])
    np.testing.assert_array_equal(pickle.loads(data).read(window, 9), store.read(window, 9))


@pytest.mark.parametrize("killed_after", [0, 1, 17, 39])
def test_continued_preparation_gives_the_same_bytes(tmp_path, store, documents, killed_after):
    path = tmp_path / "killed"
    with open_writer(path) as writer:
        for i, document in enumerate(documents[:killed_after]):
            writer.add(document, i)
    with pytest.raises(UserError, match="not finished: run it again"):
        TokenStore.open(path)
    with (path / "ledger.jsonl").open("ab") as ledger:
        ledger.write(b'{"file": "tokens-0000')
    with open_writer(path) as writer:
        assert writer.documents_done <= killed_after
        for i, document in itertools.islice(enumerate(documents), writer.documents_done, None):
            writer.add(document, i)
        continued = writer.finish()
    assert continued.fingerprint == store.fingerprint
    files = sorted(file.name for file in path.iterdir())
    assert files == sorted(file.name for file in store.path.iterdir())
    for name in files:
        assert (path / name).read_bytes() == (store.path / name).read_bytes()


def test_writer_refuses_a_finished_store_and_other_settings(tmp_path, store):
    with pytest.raises(UserError, match="is finished"):
        open_writer(store.path)
    open_writer(tmp_path / "begun").__exit__()
    with pytest.raises(UserError, match="another tokenizer"):
        open_writer(tmp_path / "begun", tokenizer="other")


def test_two_writers_at_once(tmp_path):
    with open_writer(tmp_path), pytest.raises(UserError, match="another process"):
        open_writer(tmp_path)


@pytest.mark.parametrize("tokens", [[], [1000], [-1], [[1]], [0.5]])
def test_writer_refuses_impossible_tokens(tmp_path, tokens):
    with open_writer(tmp_path) as writer, pytest.raises(UserError, match="document 0"):
        writer.add(tokens, 1)


def test_empty_store_is_refused(tmp_path):
    with open_writer(tmp_path) as writer, pytest.raises(UserError, match="at least one"):
        writer.finish()


def test_fingerprint_follows_content_and_not_place(tmp_path, store, documents):
    assert write_store(tmp_path / "same", documents).fingerprint == store.fingerprint
    changed = [*documents[:-1], (documents[-1] + 1) % 1000]
    assert write_store(tmp_path / "other", changed).fingerprint != store.fingerprint
    other = write_store(tmp_path / "tokenizer", documents, tokenizer="xyz")
    assert other.fingerprint != store.fingerprint


def test_verify_names_the_file_with_a_flipped_byte(store):
    store.verify()
    for name in ("tokens-00001.npy", "offsets-00002.npy"):
        path = store.path / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        with pytest.raises(UserError, match=name):
            TokenStore.open(store.path).verify()
        path.write_bytes(whole)


def test_open_refuses_what_is_not_a_whole_store(tmp_path, store):
    def refused(match):
        with pytest.raises(UserError, match=match):
            TokenStore.open(store.path)

    with pytest.raises(UserError, match="no such folder"):
        TokenStore.open(tmp_path / "nowhere")

    shard = store.path / "tokens-00001.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    refused("tokens-00001.npy: is .* bytes long, expected")
    shard.write_bytes(whole[:40])
    refused("tokens-00001.npy: its header cannot be read")
    np.save(shard, np.zeros(3, np.int32))
    refused("tokens-00001.npy: holds int32")
    shard.unlink()
    refused("tokens-00001.npy: missing")
    shard.write_bytes(whole)
    TokenStore.open(store.path)

    manifest_file = store.path / "store.json"
    manifest = json.loads(manifest_file.read_text())
    manifest_file.write_text(json.dumps(manifest | {"bytes": manifest["bytes"] + 1}))
    refused("its checksum differs")
    del manifest["sealed"], manifest["seal"]  # as who edits it on purpose
    for change, match in (
        ({"format": "other"}, "format 'other' is unknown"),
        ({"version": 99}, "version 99 is unknown"),
        ({"shards": [{}]}, "not a valid manifest"),
        ({"shards": [], "tokens": 0, "documents": 0}, "is empty"),
        ({"tokens": 1}, "its totals say 1"),
    ):
        manifest_file.write_text(json.dumps({**manifest, **change}))
        refused(match)
    manifest_file.write_text("{")
    refused("cannot be read as JSON")


def test_every_bit_of_an_arrays_header_counts_or_changes_nothing(store, documents):
    path = store.path / "offsets-00001.npy"
    whole = path.read_bytes()
    header = 10 + int.from_bytes(whole[8:10], "little")
    refusals = 0
    for bit in range(8 * header):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=path.name):
            TokenStore.open(store.path).verify()
        with contextlib.suppress(UserError):
            opened = TokenStore.open(store.path)
            np.testing.assert_array_equal(opened.read(np.array([0]), 8)[0], documents[0][:8])
            continue
        refusals += 1
    assert refusals > 4 * header


def test_threads_may_map_shards_at_once(monkeypatch, store, documents):
    def fails(*_):
        raise SystemError("AST constructor recursion depth mismatch")

    monkeypatch.setattr(token_store, "MAX_OPEN_SHARDS", 2)
    reader = TokenStore.open(store.path)
    # Python 3.11 may fail so where threads parse at once, as np.load does with a file's header.
    monkeypatch.setattr("ast.literal_eval", fails)
    flat = np.concatenate(documents)
    starts = np.random.default_rng(0).permutation(len(flat) - 8)
    expected = [flat[s : s + 8] for s in starts]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda part: reader.read(part, 8), np.array_split(starts, 64)))
    np.testing.assert_array_equal(np.concatenate(parts), expected)

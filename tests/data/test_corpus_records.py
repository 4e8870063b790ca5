"""Strict reading: every kind of broken input is named with its place, or skipped and counted."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from corpus_config import make, write_jsonl

from danube_jax.data.corpus.inputs import divide, list_inputs
from danube_jax.data.corpus.records import RecordReader
from danube_jax.data.corpus.tally import Tally
from danube_jax.errors import UserError


def read(tmp_path, source, **changes):
    """(texts, ids, tally) of a source read in all its tasks."""
    corpus = make(tmp_path / "out", {"a": source}, **changes)
    tasks = divide(list_inputs(corpus), corpus.task_bytes)
    tally = Tally()
    reader = RecordReader(corpus, tasks, tally, None)
    found = [document for rank in range(len(tasks)) for document in reader.run(rank=rank)]
    return [d.text for d in found], [d.id for d in found], tally


ROWS = b'{"text": "one"}\n{"text": "two"}\n'


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


LONG = b"".join(b'{"text": "%d %s"}\n' % (i, bytes([97 + i % 26]) * 200) for i in range(3_000))

BROKEN = {
    "json": ("a.jsonl", ROWS + b'{"text": "thr\n', r"a\.jsonl, line 3: is not JSON"),
    "encoding": (
        "a.jsonl",
        ROWS + b'{"text": "caf\xe9"}\n',
        r"line 3: is not UTF-8 at byte 14 of the line",
    ),
    "column": ("a.jsonl", ROWS + b'{"body": "x"}\n', r"line 3: has no column 'text', only 'body'"),
    "null": ("a.jsonl", ROWS + b'{"text": null}\n', r"line 3: 'text' is null"),
    "array": ("a.jsonl", ROWS + b"[1]\n", r"line 3: holds a JSON list; expected an object"),
    "nul": ("a.jsonl", ROWS + b'{"text": "a\\u0000b"}\n', r"line 3: holds a NUL character"),
    "raw_nul": ("a.jsonl", ROWS + b'{"text": "a\0b"}\n', r"line 3: holds a NUL character"),
    "surrogate": ("a.jsonl", ROWS + b'{"text": "\\ud800"}\n', r"line 3: is not JSON"),
    "empty": ("a.jsonl", b"", r"a\.jsonl: holds no records"),
    "long": (
        "a.jsonl",
        ROWS + b'{"text": "' + b"x" * 5_000 + b'"}\n',
        r"line 3: is 5,013 bytes long; the limit is 1,000",
    ),
    "gzip": (
        "a.jsonl.gz",
        truncated(gzip.compress(LONG)),
        r"line \d+: cannot be read \(Compressed",
    ),
    "zstd": (
        "a.jsonl.zst",
        truncated(zstandard.compress(LONG)),
        r"line \d+: cannot be read \(the compressed file breaks off",
    ),
    "not_gzip": ("a.jsonl.gz", ROWS, r"line 1: cannot be read \(Not a gzipped file"),
    "text": ("a.txt", b"fine\ncaf\xe9\n", r"a\.txt, line 2: is not UTF-8 at byte 9"),
    "long_text": ("a.txt", b"x" * 1_001, r"a\.txt: is longer than the limit of 1,000 bytes"),
    "parquet": ("a.parquet", b"PAR1 no", r"a\.parquet: cannot be read as parquet"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_input_stops_with_its_place(tmp_path, kind):
    name, data, message = BROKEN[kind]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, tmp_path / name, max_document_bytes=1_000)
    assert "config.on_bad_record" in str(caught.value)


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_input_can_be_skipped_and_is_listed(tmp_path, kind):
    name, data, _ = BROKEN[kind]
    (tmp_path / name).write_bytes(data)
    texts, _, tally = read(
        tmp_path, tmp_path / name, max_document_bytes=1_000, on_bad_record="skip"
    )
    assert tally.num_bad_records == 1
    assert name in tally.bad_records[0][0]
    if data.startswith(ROWS) and name == "a.jsonl":
        assert texts == ["one", "two"]
    if kind in ("gzip", "zstd"):
        assert texts == [json.loads(line)["text"] for line in LONG.splitlines()[: len(texts)]]


def test_records_after_a_bad_one_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\nno\n{"text": "' + b"x" * 3_000 + b'"}\n{"text": "two"}\n')
    texts, _, tally = read(tmp_path, path, max_document_bytes=1_000, on_bad_record="skip")
    assert texts == ["one", "two"]
    assert [row[0][-6:] for row in tally.bad_records] == ["line 2", "line 3"]


TEXTS = [f"text {i} " + "äb\u2028" * (i % 50) for i in range(700)]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2", ".xz"])
def test_parts_of_a_file_hold_every_record_once(tmp_path, suffix):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS, name=[f"id {i}" for i in range(700)])
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
    compress |= {".bz2": bz2.compress, ".xz": lzma.compress}
    target = tmp_path / f"a.jsonl{suffix}"
    target.write_bytes(compress[suffix](path.read_bytes()))
    source = {"path": str(target), "id_column": "name"}
    whole = read(tmp_path, source)
    assert whole[0] == TEXTS
    assert whole[1] == [f"id {i}" for i in range(700)]
    parts = read(tmp_path, source, task_bytes=3_000)
    assert sorted(parts[1]) == sorted(whole[1])
    if not suffix:
        assert parts[0] == TEXTS


def test_a_bad_line_in_a_later_part_has_its_true_number(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[613] = b"broken\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"a\.jsonl, line 614: is not JSON"):
        read(tmp_path, path, task_bytes=4_000)


def test_parquet_rows_and_columns(tmp_path):
    table = pyarrow.table({"body": TEXTS, "key": list(range(700))})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=100)
    source = {"path": str(path), "text_column": "body", "id_column": "key"}
    texts, ids, _ = read(tmp_path, source, task_bytes=5_000)
    assert sorted(zip(map(int, ids), texts, strict=True)) == list(enumerate(TEXTS))
    with pytest.raises(UserError, match=r"a\.parquet: has no column 'text', only 'body', 'key'"):
        read(tmp_path, path)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(UserError, match=r"a\.parquet, row 2: 'text' is null"):
        read(tmp_path, path)


def test_text_files_and_separators(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "b.txt").write_text("second\n%\nthird", encoding="utf-8")
    (tmp_path / "t" / "a.txt.gz").write_bytes(gzip.compress("first é".encode()))
    (tmp_path / "t" / "ignored.bin").write_bytes(b"\xff")
    assert read(tmp_path, tmp_path / "t")[0] == ["first é", "second\n%\nthird"]
    source = {"path": str(tmp_path / "t" / "*.txt"), "separator": "\n%\n"}
    assert read(tmp_path, source)[0] == ["second", "third"]


def test_addresses_of_fsspec(tmp_path):
    import fsspec

    with fsspec.open("memory://corpus/a.jsonl", "wb") as file:
        file.write(ROWS)
    texts, ids, _ = read(tmp_path, "memory://corpus/*.jsonl")
    assert texts == ["one", "two"]
    assert ids[0].startswith("memory://")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", "does not exist; expected a file, folder or glob"),
        ("none/*.jsonl", "no file matches"),
        ("a.dat", r"config\.sources\.a\.format: cannot be told"),
        ("nosuch://x/a.jsonl", "cannot be opened"),
    ],
)
def test_sources_that_cannot_be_found(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.dat").write_bytes(b"x")
    with pytest.raises(UserError, match=message):
        read(tmp_path, source)

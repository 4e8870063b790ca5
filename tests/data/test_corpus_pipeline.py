"""The preparation as a whole: stores, workers, resuming, refusals."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pydoc_data.topics import topics

import numpy as np
import pytest
from corpus_config import make, write_jsonl
from tokenizer_models import byte_level_folder

from danube_jax.data.corpus import pipeline
from danube_jax.data.corpus.pipeline import prepare
from danube_jax.data.corpus.statistics import Statistics
from danube_jax.data.corpus.tokenise import WriteStores, placed
from danube_jax.data.corpus.tokenizer_sample import read_documents
from danube_jax.data.token_store import TokenStore
from danube_jax.data.tokenizer import open_tokenizer, train_bpe
from danube_jax.errors import UserError

TEXTS = [text for _, text in sorted(topics.items())]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_jsonl(folder / "a" / "0.jsonl", TEXTS[:30])
    write_jsonl(folder / "a" / "1.jsonl.gz", TEXTS[30:45])
    write_jsonl(folder / "b.jsonl", [*TEXTS[45:60], TEXTS[3], TEXTS[50]])
    return folder


def preparation(inputs, output, **changes):
    sources = {"a": inputs / "a", "b": inputs / "b.jsonl"}
    return make(output, sources, task_bytes=20_000, heldout_fraction=0.2, **changes)


@pytest.fixture(scope="module")
def prepared(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared") / "out"
    prepare(preparation(inputs, output))
    return output


def texts_of(output, name, part, tokenizer=None):
    store = TokenStore.open(output / "stores" / name / part)
    tokenizer = open_tokenizer(tokenizer or output / "tokenizer.model")
    starts = np.append(store.document_starts(), store.tokens)
    rows = [
        store.read(starts[i : i + 1], int(starts[i + 1] - starts[i]))[0]
        for i in range(store.documents)
    ]
    framing = (tokenizer.bos_id, tokenizer.eos_id)
    return [tokenizer.decode([i for i in row.tolist() if i not in framing]) for row in rows]


def tree(output):
    """Every file's bytes, without the times that tallies hold."""
    out = {}
    for path in sorted(output.rglob("*")):
        if path.is_file() and path.name not in ("statistics.json", ".lock", "report.html"):
            out[str(path.relative_to(output))] = path.read_bytes()
    return out


def test_stores_hold_the_texts_once_split_by_hash_and_shuffled(prepared):
    found = {
        (name, part): texts_of(prepared, name, part)
        for name in ("a", "b")
        for part in ("train", "heldout")
    }
    expected = {"a": TEXTS[:45], "b": TEXTS[45:60]}  # copies of earlier texts are gone
    for name, texts in expected.items():
        assert sorted(found[name, "train"] + found[name, "heldout"]) == sorted(set(texts))
        for part in ("train", "heldout"):
            shares = [placed(0, text)[0] for text in found[name, part]]
            assert all((share < 0.2) == (part == "heldout") for share in shares)
    order = [TEXTS.index(text) for text in found["a", "train"]]
    assert order != sorted(order)


def test_a_small_store_holds_out_a_tenth_by_the_same_hashes(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:40])
    off = {"steps__minhash__enabled": False}
    prepare(make(tmp_path / "out", {"a": path}, heldout_fraction=1e-6, **off))
    found = texts_of(tmp_path / "out", "a", "heldout")
    assert sorted(found) == sorted(sorted(TEXTS[:40], key=lambda text: placed(0, text)[0])[:4])
    assert sorted(found + texts_of(tmp_path / "out", "a", "train")) == sorted(TEXTS[:40])
    none = make(tmp_path / "none", {"a": path}, heldout_fraction=0.0, **off)
    assert set(prepare(none).values["stores"]["a"]) == {"train"}


def test_statistics_add_up(prepared):
    values = Statistics.load(prepared / "statistics.json").values
    steps = values["tally"]["steps"]
    assert steps["a"]["read"]["documents_in"] == 45
    assert steps["b"]["exact"]["removed"]["duplicate"][0] == 2
    rows = [row for parts in values["stores"].values() for row in parts.values()]
    kept = {text for text in TEXTS[:60]}
    assert sum(row["bytes"] for row in rows) == sum(len(text.encode()) for text in kept)
    assert sum(row["documents"] for row in rows) == len(kept)


def test_several_workers_give_the_same_bytes(inputs, prepared, tmp_path):
    prepare(preparation(inputs, tmp_path / "out", executor__workers=3))
    several, one = tree(tmp_path / "out"), tree(prepared)
    assert several.keys() == one.keys()
    assert [name for name in one if several[name] != one[name]] == []


ODD = [
    f"{i}: \ttabs, trailing  spaces  \n\n  indents, café, 漢字, \U0001f600, e\u0301, {'x' * i}\r\n"
    for i in range(40)
]


@pytest.mark.parametrize("kind", ["sentencepiece", "hugging_face"])
def test_stores_give_back_the_text_byte_by_byte(tmp_path, kind):
    """Both tokenizers lose nothing, so neither may the way to them and back."""
    tokenizer = train_bpe(iter(TEXTS[:20]), tmp_path / "t.model", 400).path
    if kind == "hugging_face":
        tokenizer = byte_level_folder(tmp_path / "hf", {"eos_token": "<|endoftext|>"})
    path = write_jsonl(tmp_path / "a.jsonl", ODD)
    changes = {"steps__minhash__enabled": False, "heldout_fraction": 0.2, "task_bytes": 1_000}
    changes |= {"tokenizer__train_vocab_size": 0, "tokenizer__path": str(tokenizer)}
    for workers in (1, 2):
        output = tmp_path / str(workers)
        prepare(make(output, {"a": path}, executor__workers=workers, **changes))
    assert tree(tmp_path / "1") == tree(tmp_path / "2")
    found = [texts_of(output, "a", part, tokenizer) for part in ("train", "heldout")]
    assert sorted(found[0] + found[1]) == sorted(ODD)
    assert all(found)


def test_sources_at_addresses_give_the_same_stores(tmp_path, prepared, inputs):
    sources = {"a": f"file://{inputs}/a", "b": f"file://{inputs}/b.json*"}
    prepare(
        make(
            tmp_path / "out",
            sources,
            task_bytes=20_000,
            heldout_fraction=0.2,
            executor__workers=2,
        )
    )
    for name in ("a", "b"):
        for part in ("train", "heldout"):
            one, other = (
                TokenStore.open(p / "stores" / name / part) for p in (tmp_path / "out", prepared)
            )
            assert one.fingerprint == other.fingerprint


def test_a_second_run_does_nothing(inputs, prepared):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*") if path.is_file()}
    again = prepare(preparation(inputs, prepared))
    assert again.values["stores"]["a"]["train"]["documents"] > 0
    after = {path: path.stat().st_mtime_ns for path in prepared.rglob("*") if path.is_file()}
    del before[prepared / ".lock"], after[prepared / ".lock"]
    assert after == before


def _prepare(corpus):
    os.setpgrp()
    prepare(corpus)


def test_a_killed_run_goes_on(inputs, prepared, tmp_path):
    corpus = preparation(inputs, tmp_path / "out")
    process = multiprocessing.get_context("spawn").Process(target=_prepare, args=(corpus,))
    process.start()
    first = tmp_path / "out" / "work" / "clean" / "completions" / "00000"
    while process.is_alive() and not first.exists():
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "out" / "statistics.json").exists()
    assert first.exists()
    done = first.stat().st_mtime_ns
    documents = tmp_path / "out" / "work" / "clean" / "documents" / "00000.jsonl.zst"
    written = documents.stat().st_mtime_ns
    assert done >= written
    kept = tmp_path / "first"
    os.link(documents, kept)
    prepare(corpus)
    assert kept.stat().st_mtime_ns == written  # the finished task was not done again
    assert tree(tmp_path / "out") == tree(prepared)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heldout_fraction": 0.3}, r"another config\.heldout_fraction \(0\.2, now 0\.3\)"),
        ({"steps__minhash__buckets": 9}, r"another config\.steps\.minhash\.buckets"),
    ],
)
def test_another_config_is_refused(inputs, prepared, changes, message):
    changes = {"heldout_fraction": 0.2} | changes
    sources = {"a": inputs / "a", "b": inputs / "b.jsonl"}
    with pytest.raises(UserError, match=message):
        prepare(make(prepared, sources, task_bytes=20_000, **changes))


def test_changed_input_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:20])
    prepare(make(tmp_path / "out", {"a": path}))
    write_jsonl(path, TEXTS[:21])
    with pytest.raises(UserError, match=r"set of input files \(.*a\.jsonl is new, gone or of"):
        prepare(make(tmp_path / "out", {"a": path}))


def test_a_mended_file_can_be_read_after_a_first_try(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:20])
    good = path.read_bytes()
    path.write_bytes(good + b"{broken")
    with pytest.raises(UserError, match=r"a\.jsonl, line 21: is not JSON"):
        prepare(make(tmp_path / "out", {"a": path}))
    path.write_bytes(good)
    statistics = prepare(make(tmp_path / "out", {"a": path}))
    assert dict(statistics.steps())["read"]["documents_in"] == 20


def with_sets(folder):
    """A preparation that removes what the evaluation sets in `folder` hold."""
    decontamination = {"enabled": True, "path": str(folder / "sets")}
    changes = {f"steps__decontamination__{key}": value for key, value in decontamination.items()}
    return make(folder / "out", {"a": folder / "a.jsonl"}, steps__minhash__buckets=2, **changes)


def write_set(folder, name, text):
    """An evaluation set of one question: words out of the middle of a text."""
    words = text.split()
    write_jsonl(folder / "sets" / f"{name}.jsonl", [" ".join(words[20:50])])


def stop_before(monkeypatch, stage):
    """The next preparation stops before a stage, as one that is killed there."""
    run = pipeline.Runner.run

    def stopping(self, name, *args):
        if name == stage:
            raise KeyboardInterrupt
        run(self, name, *args)

    monkeypatch.setattr(pipeline.Runner, "run", stopping)


def test_evaluation_sets_that_change_before_the_first_task(tmp_path, monkeypatch):
    """Their runs of words were noted by then, and are noted anew."""
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:20])
    write_set(tmp_path, "exam", TEXTS[3])
    stop_before(monkeypatch, "clean")
    with pytest.raises(KeyboardInterrupt):
        prepare(with_sets(tmp_path))
    monkeypatch.undo()
    assert (tmp_path / "out" / "work" / "clean" / "decontamination.npz").is_file()
    write_set(tmp_path, "exam", TEXTS[5])
    prepare(with_sets(tmp_path))
    kept = {row["text"] for row in read_documents(tmp_path / "out" / "documents")}
    assert set(TEXTS[:20]) - kept == {TEXTS[5]}


@pytest.mark.parametrize("stage", ["select", None], ids=["stopped", "finished"])
def test_evaluation_sets_that_change_later_are_refused(tmp_path, monkeypatch, stage):
    """Changed, new or gone, with documents already removed for the old ones."""
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:20])
    write_set(tmp_path, "exam", TEXTS[3])
    if stage:
        stop_before(monkeypatch, stage)
        with pytest.raises(KeyboardInterrupt):
            prepare(with_sets(tmp_path))
        monkeypatch.undo()
    else:
        prepare(with_sets(tmp_path))
    before = tree(tmp_path / "out")
    message = r"was prepared with another file of decontamination\.path/{}\.jsonl; delete it"
    write_set(tmp_path, "exam", TEXTS[5])
    with pytest.raises(UserError, match=message.format("exam")):
        prepare(with_sets(tmp_path))
    write_set(tmp_path, "exam", TEXTS[3])
    write_set(tmp_path, "more", TEXTS[5])
    with pytest.raises(UserError, match=message.format("more")):
        prepare(with_sets(tmp_path))
    (tmp_path / "sets" / "more.jsonl").rename(tmp_path / "sets" / "exam.jsonl")
    with pytest.raises(UserError, match=message.format("exam")):
        prepare(with_sets(tmp_path))
    assert tree(tmp_path / "out") == before
    write_set(tmp_path, "exam", TEXTS[3])
    prepare(with_sets(tmp_path))
    kept = {row["text"] for row in read_documents(tmp_path / "out" / "documents")}
    assert set(TEXTS[:20]) - kept == {TEXTS[3]}


def test_half_written_signatures_of_a_killed_task_are_not_read(
    inputs, prepared, tmp_path, monkeypatch
):
    corpus = preparation(inputs, tmp_path / "out")
    stop_before(monkeypatch, "minhash_buckets")
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus)
    monkeypatch.undo()
    folder = tmp_path / "out" / "work" / "clean" / "signatures" / "bucket_000"
    assert (folder / "00001.minhash.sig").is_file()
    (folder / ".00001.minhash.sig.8335.tmp").write_bytes(bytes(7))
    prepare(corpus)
    assert tree(tmp_path / "out") == tree(prepared)


def test_a_store_that_was_finished_by_a_killed_run_loses_its_ledger(inputs, prepared, tmp_path):
    """The kill came between its manifest and the removal of the ledger."""
    output = tmp_path / "out"
    shutil.copytree(prepared, output)
    (output / "stores" / "a" / "train" / "ledger.jsonl").write_text("{}\n")
    corpus = preparation(inputs, output)
    WriteStores(corpus, corpus.tokenizer, tmp_path / "pieces", output / "stores", {}).run(rank=0)
    assert tree(output) == tree(prepared)


def test_repeated_paragraphs_go_but_their_first_stays(tmp_path):
    line = "A line of a notice that stands under every page of this site, and says the same."
    texts = [f"{text[:900]}\n\n{line}\n\n{text[900:1800]}" for text in TEXTS if len(text) > 1800]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    prepare(make(tmp_path / "out", {"a": path}, steps__repeated_text__enabled=True))
    found = texts_of(tmp_path / "out", "a", "train")
    assert sum(line in text for text in found) == 1
    assert len(found) > 30


def test_removed_documents_are_written_on_demand(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [*TEXTS[:20], "too short", TEXTS[0]])
    off = ("language", "gopher_repetition", "fineweb", "unicode", "masking")
    loose = {"steps__gopher_quality__min_alphabetic_words": 0.0}
    prepare(make(tmp_path / "out", {"a": path}, off=off, keep_removed=True, **loose))
    rows = [
        row for folder in (tmp_path / "out" / "removed").iterdir() for row in read_documents(folder)
    ]
    reasons = {row["metadata"]["filter_reason"] for row in rows}
    assert "gopher_quality: too_few_words" in reasons
    assert "too short" in {row["text"] for row in rows}
    kept = list(read_documents(tmp_path / "out" / "documents"))
    assert len(kept) + len(rows) == 22


def test_page_shows_stores_reasons_and_samples(prepared):
    from danube_jax.data.corpus.html import page

    text = page(Statistics.load(prepared / "statistics.json"))
    for expected in ("a/train", "exact duplicates", "duplicate: ", "<svg", "kept"):
        assert expected in text
    assert "<script" not in text
    assert json.loads((prepared / "statistics.json").read_text())["format"]

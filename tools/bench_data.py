"""Measures the loader from token stores on disk to batches in memory, or a preparation by step.

Example:
  python tools/bench_data.py
  python tools/bench_data.py --store=DIR --context=16384 --workers=2 --json=data.json
  python tools/bench_data.py --prepare --text='books/*.jsonl.gz'
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from danube_jax import command_line, config, files
from danube_jax.data import loader
from danube_jax.data.token_store import TokenStore
from danube_jax.data.token_store_writer import TokenStoreWriter
from danube_jax.errors import UserError

_STORE = flags.DEFINE_list("store", [], "Folders of token stores, one a source; none: synthetic.")
_CONTEXT = flags.DEFINE_integer("context", 2_048, "Tokens a sequence.")
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 1_179_648, "Tokens a step.")
_STEPS = flags.DEFINE_integer("steps", 40, "Steps a repeat.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Repeats; the first steps warm each one up.")
_WORKERS = flags.DEFINE_integer("workers", 0, "Grain worker processes; 0 reads with threads.")
_PREFETCH = flags.DEFINE_integer("prefetch", 4, "Batches held ready.")
_NUM_SOURCES = flags.DEFINE_integer("num_sources", 3, "Synthetic sources.")
_STORE_TOKENS = flags.DEFINE_integer("store_tokens", 200_000_000, "Tokens a synthetic source.")
_MASK = flags.DEFINE_bool("mask_documents", False, "Also make segment ids.")
_COLD = flags.DEFINE_bool("cold", False, "Drop the stores from the page cache before a repeat.")
_JSON = flags.DEFINE_string("json", None, "Also write the result to this file.")
_PREPARE = flags.DEFINE_bool("prepare", False, "Measure tools/prepare_data.py's road instead.")
_TEXT = flags.DEFINE_string(
    "text", None, "With --prepare: JSONL, parquet or text; default: Python's docstrings."
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "With --prepare: a tokenizer; default: Mistral's, of mistral-common."
)

WARMUP_STEPS = 4
DOCUMENT_TOKENS = 800  # mean length of a synthetic document
VOCAB_SIZE = 32_000


def make_store(path: Path, tokens: int, seed: int) -> TokenStore:
    """Writes a store of random ids in documents of random length."""
    rng = np.random.default_rng(seed)
    text = rng.integers(VOCAB_SIZE, size=min(tokens, 2**24), dtype=np.uint16)
    provenance = {"source": "random ids of tools/bench_data.py"}
    left = tokens
    with TokenStoreWriter(
        path, vocab_size=VOCAB_SIZE, tokenizer="none", provenance=provenance
    ) as writer:
        while left:
            length = min(left, len(text), 1 + int(rng.exponential(DOCUMENT_TOKENS)))
            start = int(rng.integers(len(text) - length + 1))
            writer.add(text[start : start + length], length)
            left -= length
        return writer.finish()


def make_config(names: list[str]) -> config.RunConfig:
    """A run of one phase over the named sources with weights 1, 1/2, 1/3, ..."""
    steps = WARMUP_STEPS + _STEPS.value
    sources = {name: {"path": name, "max_epochs": 1e9} for name in names}
    return config.parse_config(
        {
            "data": {
                "sources": sources,
                "tokenizer": {"path": "none"},
                "mask_documents": _MASK.value,
            },
            "training": {"batch_tokens": _BATCH_TOKENS.value},
            "model": {"max_position_embeddings": max(1, _CONTEXT.value)},
            "phases": [
                {
                    "name": "benchmark",
                    "tokens": steps * _BATCH_TOKENS.value,
                    "context_length": _CONTEXT.value,
                    "mixture": {name: 1 / (i + 1) for i, name in enumerate(names)},
                }
            ],
        }
    )


def drop_from_cache(folder: Path) -> None:
    """Asks the system to forget the files' pages; nothing may have them mapped."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(run: config.RunConfig, stores: dict[str, TokenStore]) -> list[float]:
    """Tokens a second of every repeat."""
    rates = []
    for _ in range(_REPEATS.value):
        stores = {name: TokenStore.open(store.path) for name, store in stores.items()}
        if _COLD.value:
            for store in stores.values():
                drop_from_cache(store.path)
        source = loader.BatchSource(run, stores)
        batches = loader.make_loader(source, num_workers=_WORKERS.value, prefetch=_PREFETCH.value)
        for _ in range(WARMUP_STEPS):
            next(batches)
        begin, tokens = time.perf_counter(), 0
        for batch in batches:
            tokens += batch["tokens"].size
        # What the warm-up left in the buffer costs nothing, so it is not counted.
        ready = min(_PREFETCH.value, _STEPS.value - 1) * _BATCH_TOKENS.value
        rates.append((tokens - ready) / (time.perf_counter() - begin))
        batches.close()
        del batches, source
    return rates


def describe(rates: list[float], stores: dict[str, TokenStore]) -> dict[str, object]:
    """The result with what it was measured on."""
    return {
        "tokens_per_second": {
            "median": statistics.median(rates),
            "min": min(rates),
            "max": max(rates),
            "repeats": rates,
        },
        "context": _CONTEXT.value,
        "batch_tokens": _BATCH_TOKENS.value,
        "steps": _STEPS.value,
        "workers": _WORKERS.value,
        "prefetch": _PREFETCH.value,
        "mask_documents": _MASK.value,
        "cold": _COLD.value,
        "sources": len(stores),
        "dtype": next(iter(stores.values())).dtype.name,
        "tokens_on_disk": sum(store.tokens for store in stores.values()),
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("grain", "numpy")},
    }


def show(result: dict[str, object]) -> None:
    """Prints the result as a table."""
    rate = result["tokens_per_second"]
    where = "disk" if result["cold"] else "page cache"
    table = Table(title=f"Loader, {where} to batch")
    for column in ("batch", "sources", "workers", "masks", "median", "min", "max"):
        table.add_column(column, justify="right")
    rows = result["batch_tokens"] // result["context"]
    table.add_row(
        f"{rows:,} x {result['context']:,} {result['dtype']}",
        str(result["sources"]),
        str(result["workers"]),
        "yes" if result["mask_documents"] else "no",
        *(f"{rate[key] / 1e6:,.1f} M tokens/s" for key in ("median", "min", "max")),
    )
    Console(width=110).print(table)


def measure_preparation(folder: Path) -> dict[str, object]:
    """Prepares text with one worker and all default steps; MB/s of every step and of the whole.

    Rates are over processor time, and over the bytes that reach a step. The whole road's time a
    megabyte is the sum of the steps' times, each for every byte, as if no step removed anything.
    """
    from danube_jax.data.corpus.config import corpus_config, parse_corpus_config, text_source
    from danube_jax.data.corpus.pipeline import prepare
    from danube_jax.data.corpus.tokenizer_sample import read_documents
    from danube_jax.data.tokenizer import load_tokenizer

    wanted = corpus_config()
    wanted.output = str(folder / "corpus")
    chosen = {"path": _TEXT.value} if _TEXT.value else {"builtin": "docstrings"}
    wanted.sources = {"text": text_source(**chosen)}
    if _TOKENIZER.value:
        wanted.tokenizer.path = _TOKENIZER.value
    else:
        wanted.tokenizer.builtin = "mistral"
    wanted.executor.workers = 1
    # Words of code would end many documents early; what is measured is the work on kept text.
    wanted.steps.gopher_quality.min_alphabetic_words = 0.0
    corpus = parse_corpus_config(wanted)
    begin = time.perf_counter()
    statistics = prepare(corpus)
    wall = time.perf_counter() - begin
    steps, seconds = {}, 0.0
    for name, counts in statistics.steps():
        if counts["bytes_in"] and counts["seconds"]:
            rate = counts["bytes_in"] / counts["seconds"] / 1e6
            rows = counts["documents_in"] / counts["seconds"]
            steps[name] = {"mb_per_second": rate, "documents_per_second": rows}
            seconds += 1 / rate
    texts = [row["text"] for row in read_documents(folder / "corpus" / "documents")]
    tokenizer = load_tokenizer(corpus.tokenizer)
    size, library = sum(len(text.encode()) for text in texts), time.process_time()
    for i in range(0, len(texts), 64):
        tokenizer.encode_batch(texts[i : i + 64], bos=True, eos=True, threads=1)
    library = size / (time.process_time() - library) / 1e6
    read = dict(statistics.steps())["read"]
    return {
        "steps": steps,
        "whole_road_mb_per_second": 1 / seconds,
        "wall_mb_per_second": read["bytes_in"] / wall / 1e6,
        "tokenizer_library_mb_per_second": library,
        "text_mb": read["bytes_in"] / 1e6,
        "documents": read["documents_in"],
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {
            name: metadata.version(name) for name in ("datatrove", "numpy", "sentencepiece")
        },
    }


def show_preparation(result: dict[str, object]) -> None:
    """Prints the rates as a table."""
    table = Table(title=f"Preparation, one core, {result['text_mb']:.1f} MB", title_justify="left")
    for column in ("step", "MB/s", "documents/s"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, row in result["steps"].items():
        rates = (row["mb_per_second"], row["documents_per_second"])
        table.add_row(name, *(f"{rate:,.1f}" for rate in rates))
    table.add_row("all steps", f"{result['whole_road_mb_per_second']:.2f}", "")
    table.add_row("wall clock, all stages", f"{result['wall_mb_per_second']:.2f}", "")
    rate = result["tokenizer_library_mb_per_second"]
    table.add_row("tokenizer library alone", f"{rate:.1f}", "")
    Console(width=110).print(table)


def main(argv: Sequence[str]) -> int:
    """Checks the flags, makes or opens the stores, measures and reports."""
    command_line.parse_flags(argv, __doc__)
    if _PREPARE.value:
        with tempfile.TemporaryDirectory() as folder:
            result = measure_preparation(Path(folder))
        show_preparation(result)
        if _JSON.value:
            files.write_json(_JSON.value, result)
        print(json.dumps(result))
        return 0
    for flag in (_STEPS, _REPEATS, _PREFETCH, _NUM_SOURCES, _STORE_TOKENS):
        if flag.value < 1:
            raise UserError(f"--{flag.name}: {flag.value} is not possible; expected at least 1")
    if _WORKERS.value < 0:
        raise UserError(f"--workers: {_WORKERS.value} is not possible; expected 0 or more")
    names = _STORE.value or [f"synthetic{i}" for i in range(_NUM_SOURCES.value)]
    run = make_config(names)
    with tempfile.TemporaryDirectory() as folder:
        stores = {}
        for i, name in enumerate(names):
            if _STORE.value:
                stores[name] = TokenStore.open(name)
            else:
                stores[name] = make_store(Path(folder) / name, _STORE_TOKENS.value, seed=i)
        result = describe(measure(run, stores), stores)
    show(result)
    if _JSON.value:
        files.write_json(_JSON.value, result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    command_line.run(main)

"""Training a tokenizer on a sample of prepared documents."""

from collections.abc import Iterator
from pathlib import Path

import orjson

from danube_jax.console import info
from danube_jax.data.corpus.config import CorpusConfig
from danube_jax.data.corpus.records import open_input
from danube_jax.data.corpus.tokenise import placed
from danube_jax.data.tokenizer import Tokenizer, train_bpe

SAMPLE_BYTES = 200_000_000


def read_documents(folder: Path) -> Iterator[dict]:
    """The rows of a folder of prepared documents, in order."""
    for path in sorted(folder.glob("*.jsonl.zst")):
        stream, raw = open_input(str(path))
        with raw, stream:
            for line in stream:
                yield orjson.loads(line)


def train_on_documents(
    corpus: CorpusConfig, folder: Path, path: Path, vocab_size: int
) -> Tokenizer:
    """Trains on the documents of the training part, the first 200 MB of them."""
    info(f"data: training a tokenizer of {vocab_size:,} ids")

    def texts() -> Iterator[str]:
        size = 0
        for row in read_documents(folder):
            part, _ = placed(corpus.seed, row["text"], corpus.heldout_fraction)
            if part == "train" and size < SAMPLE_BYTES:
                size += len(row["text"])
                yield row["text"]

    return train_bpe(texts(), path, vocab_size)

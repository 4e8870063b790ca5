"""Training a tokenizer on a sample of prepared documents."""

from collections.abc import Iterator
from pathlib import Path

import orjson
from datatrove.data import Document

from danube_jax.console import info
from danube_jax.data.corpus.records import open_input
from danube_jax.data.corpus.tokenise import Placement
from danube_jax.data.tokenizer import Tokenizer, train_bpe

SAMPLE_BYTES = 200_000_000


def read_documents(folder: Path) -> Iterator[dict]:
    """The rows of a folder of prepared documents, in order."""
    for path in sorted(folder.glob("*.jsonl.zst")):
        yield from read_rows(path)


def read_rows(path: Path) -> Iterator[dict]:
    """The rows of one file of prepared documents."""
    stream, raw = open_input(str(path))
    with raw, stream:
        for line in stream:
            yield orjson.loads(line)


def train_on_documents(
    placement: Placement, folder: Path, path: Path, vocab_size: int
) -> Tokenizer:
    """Trains on the documents of the training parts, the first 200 MB of them."""
    info(f"data: training a tokenizer of {vocab_size:,} ids")

    def texts() -> Iterator[str]:
        size = 0
        for row in read_documents(folder):
            document = Document(**row)
            part, _ = placement.part(placement.store(document), document.text)
            if part == "train" and size < SAMPLE_BYTES:
                size += len(document.text)
                yield document.text

    return train_bpe(texts(), path, vocab_size)

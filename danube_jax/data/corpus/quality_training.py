"""Examples for quality models: pieces of documents, and a model trained inside a preparation."""

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from danube_jax.console import info
from danube_jax.data.corpus import quality_trees
from danube_jax.data.corpus.config import QualityStep
from danube_jax.data.corpus.rule import SOURCE
from danube_jax.data.corpus.tokenizer_sample import read_rows

PIECE_CHARACTERS = 4_000
ROUNDS = 60  # more of them say 0 and 1 only, which ranks nothing
MAX_FILES = 64  # of a preparation's documents that are read for examples


def sample(texts: Iterable[str], limit: int, piece: int = PIECE_CHARACTERS) -> list[str]:
    """At most `limit` pieces of the texts, those with the lowest hashes.

    A long text is cut into pieces of `piece` characters; a rest that is shorter than half of that
    is left out.
    """

    def rows() -> Iterator[tuple[bytes, str]]:
        for text in texts:
            for i in range(0, len(text), piece):
                part = text[i : i + piece]
                if len(part) >= min(piece, len(text)) // 2:
                    data = part.encode("utf-8", "surrogatepass")
                    yield hashlib.blake2b(data, digest_size=8).digest(), part

    return [text for _, text in heapq.nsmallest(limit, rows())]


def train_on_sources(step: QualityStep, documents: Path, path: Path) -> None:
    """Trains a model on documents of the good and the bad sources, and writes it.

    Args:
      step: which sources, and how many documents of them.
      documents: a preparation's documents so far, a file a task.
      path: the model's file.

    Raises:
      UserError: too few documents of a kind.
    """
    paths = sorted(documents.glob("*.jsonl.zst"))
    kinds = (step.good_sources, step.bad_sources)
    texts = [sample(_texts_of(paths, sources), step.train_documents) for sources in kinds]
    scorer = quality_trees.train(*texts, rounds=ROUNDS)
    scorer.save(path)
    report = scorer.report
    info(
        f"data: trained a quality model on {report['training']['good']:,} documents of "
        f"{', '.join(step.good_sources)} and {report['training']['bad']:,} of "
        f"{', '.join(step.bad_sources)}; held-out ROC-AUC {report['roc_auc']:.3f}"
    )


def _texts_of(paths: Sequence[Path], sources: Sequence[str]) -> Iterator[str]:
    """The texts of some sources; where they fill many files, those of evenly spread ones."""
    mine = [path for path in paths if _source_of(path) in sources]
    for path in mine[:: max(1, len(mine) // MAX_FILES)]:
        yield from (row["text"] for row in read_rows(path))


def _source_of(path: Path) -> str | None:
    """The source of a task's documents, which is the same for all of them."""
    first = next(read_rows(path), None)
    return first and first["metadata"][SOURCE]

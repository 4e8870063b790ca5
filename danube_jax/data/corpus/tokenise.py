"""From documents to token stores: split by hash, tokenised by task, shuffled on writing.

Which store and part a document belongs to follows from its source, score and hash, and from bounds
that the scores and hashes of all documents give. A task appends its documents' tokens to a file a
store and notes each one's rank in the shuffle. Another stage gathers a store's documents in the
order of these ranks. What a store holds follows from the documents and the seed alone.
"""

import dataclasses
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.batching import batched

from danube_jax import files
from danube_jax.config import TokenizerConfig
from danube_jax.data.corpus.config import CorpusConfig, QualityStep
from danube_jax.data.corpus.quality import SCORE, bucket_bounds, bucket_of
from danube_jax.data.corpus.rule import SOURCE
from danube_jax.data.corpus.tally import Tally, utf8_size
from danube_jax.data.token_store import MANIFEST, is_finished, token_dtype
from danube_jax.data.token_store_writer import LEDGER, TokenStoreWriter
from danube_jax.data.tokenizer import Tokenizer, load_tokenizer

PARTS = ("train", "heldout")
BATCH_DOCUMENTS = 64
PLACE = np.dtype([("source", "<u4"), ("score", "<f4"), ("share", "<f8")])
ROW = np.dtype([("rank", "<u8"), ("length", "<u4"), ("bytes", "<u4")])


def placed(seed: int, text: str) -> tuple[float, int]:
    """(share in [0, 1) that decides whether it is held out, rank in the shuffle) of a document."""
    data = f"{seed}\0{text}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(data, digest_size=16).digest()
    share = int.from_bytes(digest[:8], "little") / 2**64
    return share, int.from_bytes(digest[8:], "little")


@dataclasses.dataclass(frozen=True)
class Placement:
    """Which store and part a document belongs to.

    Attributes:
      seed: of the hash.
      quality: the settings of buckets.
      bucket_bounds: scores at which buckets begin.
      heldout_bounds: store → the share below which a document is held out.
    """

    seed: int
    quality: QualityStep
    bucket_bounds: tuple[float, ...]
    heldout_bounds: Mapping[str, float]

    @classmethod
    def of(cls, corpus: CorpusConfig, folder: Path) -> "Placement":
        """The bounds that follow from what `NotePlaces` wrote."""
        quality = corpus.steps.quality
        parts = [np.fromfile(path, PLACE) for path in sorted(Path(folder).glob("*.places"))]
        rows = np.concatenate([*parts, np.zeros(0, PLACE)])
        divided = quality.enabled and quality.buckets
        bounds = bucket_bounds(quality, rows["score"]) if divided else ()
        bucket = np.zeros(len(rows), int)
        for bound in bounds:
            bucket += np.round(rows["score"].astype(np.float64), 4) < bound
        heldout = {}
        for i, source in enumerate(corpus.sources):
            for j, name in enumerate(quality.buckets if divided else ("",)):
                mine = (rows["source"] == i) & (bucket == j)
                store = f"{source}_{name}" if name else source
                heldout[store] = _heldout_bound(corpus, rows["share"][mine])
        return cls(corpus.seed, quality, bounds, heldout)

    def store(self, document: Document) -> str:
        """The name of a document's store."""
        source = document.metadata[SOURCE]
        if not (self.quality.enabled and self.quality.buckets):
            return source
        bucket = bucket_of(self.quality, self.bucket_bounds, document.metadata[SCORE])
        return f"{source}_{bucket}"

    def part(self, store: str, text: str) -> tuple[str, int]:
        """(part, rank in the shuffle) of a document of a store."""
        share, rank = placed(self.seed, text)
        return PARTS[share < self.heldout_bounds[store]], rank


def _heldout_bound(corpus: CorpusConfig, shares: np.ndarray) -> float:
    """The fraction or, where it would hold out too few, what holds out enough."""
    fraction = corpus.heldout_fraction
    least = min(corpus.min_heldout_documents, len(shares) // 10) if fraction else 0
    if np.count_nonzero(shares < fraction) >= least:
        return fraction
    return float(np.nextafter(np.partition(shares, least - 1)[least - 1], 1.0))


class NotePlaces(PipelineStep):
    """Notes source, score and hash of the documents that pass."""

    type, name = "⚖ - PLACES", "places"

    def __init__(self, corpus: CorpusConfig, folder: Path):
        super().__init__()
        self.seed, self.folder = corpus.seed, Path(folder)
        self.numbers = {source: i for i, source in enumerate(corpus.sources)}

    def run(self, data, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        rows = []
        for document in data:
            number = self.numbers[document.metadata[SOURCE]]
            share, _ = placed(self.seed, document.text)
            rows.append((number, document.metadata.get(SCORE, 0.0), share))
            yield document
        files.write_bytes(self.folder / f"{rank:05d}.places", np.array(rows, PLACE).tobytes())


def store_names(corpus: CorpusConfig) -> list[str]:
    """The stores a preparation writes: a source, or a source and quality bucket, each."""
    buckets = corpus.steps.quality.buckets if corpus.steps.quality.enabled else ()
    if not buckets:
        return list(corpus.sources)
    return [f"{source}_{bucket}" for source in corpus.sources for bucket in buckets]


class Tokenise(PipelineStep):
    """Writes the tokens of the documents that pass, a file a store and task."""

    type, name = "🔢 - TOKENIZER", "tokens"

    def __init__(
        self, placement: Placement, tokenizer: TokenizerConfig, folder: Path, tally: Tally
    ):
        super().__init__()
        self.placement, self.tokenizer, self.folder = placement, tokenizer, Path(folder)
        self.tally = tally

    def run(self, data, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        tokenizer = load_tokenizer(self.tokenizer)
        writers: dict[tuple[str, str], _PieceWriter] = {}
        for batch in batched(data, BATCH_DOCUMENTS):
            begin = time.process_time()
            texts = [document.text for document in batch]
            encoded = tokenizer.encode_batch(texts, bos=True, eos=True, threads=1)
            seconds = (time.process_time() - begin) / len(batch)
            for document, ids in zip(batch, encoded, strict=True):
                begin = time.process_time()
                source, size = document.metadata[SOURCE], utf8_size(document.text)
                store = self.placement.store(document)
                part, order = self.placement.part(store, document.text)
                if (store, part) not in writers:
                    path = self.folder / store / part / f"{rank:05d}"
                    writers[store, part] = _PieceWriter(path, tokenizer)
                writers[store, part].add(ids, order, size)
                spent = seconds + time.process_time() - begin
                self.tally.add(source, "tokenise", size, size, spent, "")
                self.tally.length(source, "tokens", len(ids))
                yield document
        for writer in writers.values():
            writer.close()


class _PieceWriter:
    """Tokens of one task for one store."""

    def __init__(self, path: Path, tokenizer: Tokenizer):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._dtype = path, token_dtype(tokenizer.vocab_size)
        self._file = open(path.with_suffix(".tokens"), "wb")  # noqa: SIM115
        self._rows: list[tuple[int, int, int]] = []

    def add(self, ids: Sequence[int], order: int, size: int) -> None:
        self._file.write(np.array(ids, self._dtype).tobytes())
        self._rows.append((order, len(ids), size))

    def close(self) -> None:
        self._file.close()
        files.write_bytes(self._path.with_suffix(".rows"), np.array(self._rows, ROW).tobytes())


class WriteStores(PipelineStep):
    """Gathers the documents of a store and part, a task each, in shuffled order."""

    type, name = "💽 - WRITER", "token stores"

    def __init__(
        self,
        corpus: CorpusConfig,
        tokenizer: TokenizerConfig,
        folder: Path,
        output: Path,
        provenance: dict[str, Any],
    ):
        super().__init__()
        self.corpus, self.tokenizer, self.provenance = corpus, tokenizer, provenance
        self.folder, self.output = Path(folder), Path(output)
        self.targets = [(store, part) for store in store_names(corpus) for part in PARTS]

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        store, part = self.targets[rank]
        paths = sorted((self.folder / store / part).glob("*.rows"))
        target = self.output / store / part
        if is_finished(target):
            (target / LEDGER).unlink(missing_ok=True)  # where a kill came before its removal
            return
        if not paths:
            return
        tokenizer = load_tokenizer(self.tokenizer)
        dtype = token_dtype(tokenizer.vocab_size)
        rows = [np.fromfile(path, ROW) for path in paths]
        tokens = [np.memmap(path.with_suffix(".tokens"), dtype, "r") for path in paths]
        piece = np.repeat(np.arange(len(rows)), [len(part_rows) for part_rows in rows])
        starts = np.concatenate(
            [
                np.cumsum(part_rows["length"], dtype=np.int64) - part_rows["length"]
                for part_rows in rows
            ]
        )
        table = np.concatenate(rows)
        order = np.argsort(table["rank"], kind="stable")
        provenance = self.provenance | {"store": store, "part": part}
        with TokenStoreWriter(
            target,
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.fingerprint,
            provenance=provenance,
            shard_tokens=self.corpus.shard_tokens,
        ) as writer:
            for i in order[writer.documents_done :].tolist():
                begin = int(starts[i])
                ids = tokens[piece[i]][begin : begin + int(table["length"][i])]
                writer.add(ids, int(table["bytes"][i]))
            writer.finish()


def finished_stores(corpus: CorpusConfig, output: Path) -> dict[str, dict[str, Path]]:
    """Store → part → folder, of those that hold documents."""
    out: dict[str, dict[str, Path]] = {}
    for store in store_names(corpus):
        for part in PARTS:
            folder = output / store / part
            if (folder / MANIFEST).is_file():
                out.setdefault(store, {})[part] = folder
    return out

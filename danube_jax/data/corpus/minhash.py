"""MinHash signatures on word arrays, in the files that datatrove's bucket stage reads.

Shape suffixes: N: shingles of a document, H: hash functions (buckets × hashes a bucket).
"""

import itertools
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.hashing import HashConfig

from danube_jax import files
from danube_jax.data.corpus import words
from danube_jax.data.corpus.config import MinHashStep
from danube_jax.data.corpus.rule import NUMBER, SOURCE, Rule
from danube_jax.data.corpus.tally import Tally, utf8_size

BLOCK = 1_024  # shingles hashed at once, so that the block stays in the cache
TOP_BITS = np.uint64(3)  # datatrove takes hashes below 2^61 - 1


def datatrove_config(step: MinHashStep) -> MinhashConfig:
    """The settings as datatrove's blocks take them."""
    return MinhashConfig(
        n_grams=step.ngram_words,
        num_buckets=step.buckets,
        hashes_per_bucket=step.hashes_per_bucket,
        seed=step.seed,
        hash_config=HashConfig(precision=64),
    )


class MinHasher:
    """Signatures of texts."""

    def __init__(self, step: MinHashStep):
        self.step = step
        random = np.random.Generator(np.random.PCG64(step.seed))
        shape = step.buckets * step.hashes_per_bucket
        self._factor_H = random.integers(2**64, size=shape, dtype=np.uint64) | np.uint64(1)
        self._offset_H = random.integers(2**64, size=shape, dtype=np.uint64)

    def shingles(self, text: str) -> np.ndarray:
        """uint64 [N]: the different runs of words, letter case and punctuation apart.

        A text with fewer words than a run has is one shingle.
        """
        hashes_W = words.plain_words(text).hashes_W
        return np.unique(words.ngrams(hashes_W, min(self.step.ngram_words, len(hashes_W))))

    def signature(self, text: str) -> np.ndarray | None:
        """uint64 [H] below 2^61: the least value of every hash function; None without words.

        The chance that two texts agree in a place is their Jaccard similarity over shingles.
        """
        if not len(words.plain_words(text)):
            return None
        shingles_N = self.shingles(text)
        best_H = np.full(len(self._factor_H), np.iinfo(np.uint64).max, np.uint64)
        for i in range(0, len(shingles_N), BLOCK):
            block = shingles_N[i : i + BLOCK, None]
            np.minimum(best_H, (block * self._factor_H + self._offset_H).min(axis=0), out=best_H)
        return best_H >> TOP_BITS


class MinHashSignatures(PipelineStep):
    """Writes the signatures of the documents that pass, and lets them pass."""

    type, name = "🫂 - DEDUP", "MinHash signatures"

    def __init__(self, folder: Path, step: MinHashStep, tally: Tally):
        super().__init__()
        self.folder, self.step, self.tally = Path(folder), step, tally

    def run(self, data, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        hasher = MinHasher(self.step)
        signatures, numbers = [], []
        for number, document in enumerate(data):
            begin = time.process_time()
            signature = hasher.signature(document.text)
            seconds, size = time.process_time() - begin, utf8_size(document.text)
            source = document.metadata[SOURCE]
            self.tally.add(source, "minhash_signatures", size, size, seconds, "")
            if signature is not None:
                signatures.append(signature)
                numbers.append(number)
            yield document
        shape = (len(signatures), self.step.buckets, self.step.hashes_per_bucket)
        stacked = np.array(signatures, np.uint64).reshape(shape)
        fields = [(f"hash{i}", "<u8") for i in range(shape[2])]
        for bucket in range(shape[1]):
            rows = np.zeros(shape[0], [*fields, ("doc", "<u4")])
            for i, (name, _) in enumerate(fields):
                rows[name] = stacked[:, bucket, i]
            rows["doc"] = numbers
            rows.sort(order=rows.dtype.names)
            path = self.folder / f"bucket_{bucket:03d}" / f"{rank:05d}.minhash.sig"
            files.write_bytes(path, rows.tobytes())


class Cluster(PipelineStep):
    """Joins the pairs that datatrove's bucket stage found; the first of a cluster stays.

    datatrove's own stage keeps the document around which a cluster grew; here a source's rank in
    the config decides.
    """

    type, name = "🫂 - DEDUP", "MinHash clusters"

    def __init__(
        self, folder: Path, output: Path, sources: tuple[str, ...], across_sources: bool = True
    ):
        super().__init__()
        self.folder, self.output = Path(folder), Path(output)
        self.sources, self.across_sources = sources, across_sources

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        parts = [np.fromfile(path, "<u4") for path in sorted(self.folder.glob("*.dups"))]
        pairs = np.concatenate([*parts, np.zeros(0, "<u4")]).reshape(-1, 4).astype(np.uint64)
        first = (pairs[:, 0] << np.uint64(32)) | pairs[:, 1]
        second = (pairs[:, 2] << np.uint64(32)) | pairs[:, 3]
        if not self.across_sources:
            _, numbers = np.unique(np.array(self.sources), return_inverse=True)
            same = numbers[pairs[:, 0].astype(int)] == numbers[pairs[:, 2].astype(int)]
            first, second = first[same], second[same]
        nodes, index = np.unique(np.concatenate([first, second]), return_inverse=True)
        gone = nodes[_not_first(len(nodes), *np.split(index, 2))] if len(nodes) else nodes
        tasks = (gone >> np.uint64(32)).astype(int)
        documents = (gone & np.uint64(2**32 - 1)).astype(np.uint32)
        bounds = np.searchsorted(tasks, np.arange(len(self.sources) + 1)).tolist()
        for task, (first_row, end) in enumerate(itertools.pairwise(bounds)):
            rows = documents[first_row:end].astype("<u4")
            files.write_bytes(self.output / f"{task:06d}.remove", rows.tobytes())


def _not_first(count: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """bool [count]: whether a node is connected with a lower one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = coo_array((np.ones(len(first), bool), (first, second)), shape=(count, count))
    _, component = connected_components(edges, directed=False)
    lowest = np.full(component.max() + 1, count)
    np.minimum.at(lowest, component, np.arange(count))
    return lowest[component] != np.arange(count)


class RemoveNearDuplicates(Rule):
    """Removes documents that `Cluster` noted."""

    name, key = "MinHash", "minhash"

    def __init__(self, folder: Path, tally: Tally | None = None, **kwargs):
        super().__init__(tally, **kwargs)
        self.folder = Path(folder)

    def run(self, data, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        numbers = (self.folder / f"{rank:06d}.remove").read_bytes()
        self._gone = frozenset(struct.unpack(f"<{len(numbers) // 4}I", numbers))
        yield from super().run(data, rank, world_size)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return (False, "near duplicate") if doc.metadata[NUMBER] in self._gone else True

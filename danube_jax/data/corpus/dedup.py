"""Exact deduplication of documents and of lines or paragraphs, over all sources.

Each task notes 128-bit hashes of its documents and 64-bit hashes of their pieces with their
places; one pass over the sorted hashes finds all but the first of equal ones. "First" is by
source, file and place, so the result depends on nothing else.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from danube_jax import files
from danube_jax.data.corpus.config import RepeatedTextStep
from danube_jax.data.corpus.rule import NUMBER, Rule
from danube_jax.data.corpus.tally import Tally

BREAKS = {"line": "\n", "paragraph": re.compile(r"\n[ \t]*\n\s*")}
DOCUMENT = np.dtype([("high", "<u8"), ("low", "<u8"), ("doc", "<u4")])
PIECE = np.dtype([("hash", "<u8"), ("doc", "<u4"), ("piece", "<u4")])


def normalise(text: str) -> str:
    """What makes two texts equal: letter case and white space do not."""
    return " ".join(text.casefold().split())


def pieces_of(text: str, unit: str) -> list[str]:
    """The lines or paragraphs of a text."""
    return text.split("\n") if unit == "line" else BREAKS["paragraph"].split(text)


def _digest(text: str, size: int) -> bytes:
    data = normalise(text).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=size).digest()


class ExactSignatures(PipelineStep):
    """Notes hashes of the documents that pass, and of their pieces where these are wanted."""

    type, name = "🫂 - DEDUP", "exact signatures"

    def __init__(self, folder: Path, documents: bool, pieces: RepeatedTextStep):
        super().__init__()
        self.folder, self.documents, self.pieces = Path(folder), documents, pieces

    def run(self, data, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        documents, pieces = bytearray(), bytearray()
        for number, document in enumerate(data):
            place = number.to_bytes(4, "little")
            if self.documents:
                documents += _digest(document.text, 16) + place
            if self.pieces.enabled:
                for i, piece in enumerate(pieces_of(document.text, self.pieces.unit)):
                    if len(piece) >= self.pieces.min_characters:
                        pieces += _digest(piece, 8) + place + i.to_bytes(4, "little")
            yield document
        for name, buffer in (("documents", documents), ("pieces", pieces)):
            files.write_bytes(self.folder / name / f"{rank:05d}.bin", bytes(buffer))


class FindRepeats(PipelineStep):
    """Finds all but the first of equal hashes, and notes for every task what has to go."""

    type, name = "🫂 - DEDUP", "exact repeats"

    def __init__(self, folder: Path, output: Path, tasks: int):
        super().__init__()
        self.folder, self.output, self.tasks = Path(folder), Path(output), tasks

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        # Documents that go need not stand in the way of their pieces elsewhere.
        ranks, rows = self._load("documents", DOCUMENT)
        gone = _repeats((rows["high"], rows["low"]), (ranks, rows["doc"]))
        removed = [rows["doc"][mine][gone[mine]] for mine in self._tasks(ranks)]
        ranks, rows = self._load("pieces", PIECE)
        alive = np.ones(len(rows), bool)
        for mine, documents in zip(self._tasks(ranks), removed, strict=True):
            alive[mine] = ~np.isin(rows["doc"][mine], documents)
        ranks, rows = ranks[alive], rows[alive]
        gone = _repeats((rows["hash"],), (ranks, rows["doc"], rows["piece"]))
        for task, mine in enumerate(self._tasks(ranks)):
            pieces = rows[mine][gone[mine]]
            with files.atomic_writer(self.output / f"{task:05d}.npz") as file:
                np.savez(
                    file,
                    documents=np.sort(removed[task]),
                    pieces=np.stack([pieces["doc"], pieces["piece"]], axis=1),
                )

    def _tasks(self, ranks: np.ndarray) -> list[slice]:
        """Where the rows of each task lie; ranks rise."""
        bounds = np.searchsorted(ranks, np.arange(self.tasks + 1))
        return [slice(a, b) for a, b in itertools.pairwise(bounds.tolist())]

    def _load(self, name: str, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        parts = [
            np.fromfile(self.folder / name / f"{task:05d}.bin", dtype) for task in range(self.tasks)
        ]
        ranks = np.repeat(np.arange(self.tasks, dtype=np.uint32), [len(part) for part in parts])
        return ranks, np.concatenate(parts)


def _repeats(values: tuple[np.ndarray, ...], places: tuple[np.ndarray, ...]) -> np.ndarray:
    """bool, for every row: whether an earlier place holds the same values."""
    order = np.lexsort((*places[::-1], *values))
    repeats = np.zeros(len(order), bool)
    if len(order):
        same = np.ones(len(order) - 1, bool)
        for value in values:
            ordered = value[order]
            same &= ordered[1:] == ordered[:-1]
        repeats[order[1:]] = same
    return repeats


class RemoveRepeats(Rule):
    """Removes documents and pieces that `FindRepeats` noted."""

    name, key = "exact deduplication", "exact"

    def __init__(
        self, folder: Path, pieces: RepeatedTextStep, tally: Tally | None = None, **kwargs
    ):
        super().__init__(tally, **kwargs)
        self.folder, self.pieces = Path(folder), pieces

    def run(self, data, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        with np.load(self.folder / f"{rank:05d}.npz") as saved:
            self._documents = frozenset(saved["documents"].tolist())
            self._pieces: dict[int, set[int]] = {}
            for number, piece in saved["pieces"].tolist():
                self._pieces.setdefault(number, set()).add(piece)
        yield from super().run(data, rank, world_size)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        number = doc.metadata[NUMBER]
        if number in self._documents:
            return False, "duplicate"
        repeated = self._pieces.get(number)
        if repeated:
            unit = self.pieces.unit
            pieces = pieces_of(doc.text, unit)
            kept = [piece for i, piece in enumerate(pieces) if i not in repeated]
            self.edited(doc, f"{unit}s dropped", len(repeated))
            doc.text = ("\n" if unit == "line" else "\n\n").join(kept).strip()
            if len(doc.text) < self.pieces.min_document_characters:
                return False, f"too short without repeated {unit}s"
        return True

"""Removal of training text that evaluation sets hold, by runs of words."""

import gzip
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document

from danube_jax import files
from danube_jax.data.corpus import words
from danube_jax.data.corpus.config import DecontaminationStep
from danube_jax.data.corpus.inputs import import_pyarrow
from danube_jax.data.corpus.rule import SOURCE, Rule
from danube_jax.data.corpus.tally import Tally
from danube_jax.errors import UserError
from danube_jax.untrusted import READ_ERRORS, parse_json

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")


def build_index(step: DecontaminationStep, path: Path) -> dict[str, int]:
    """Writes the runs of words of the evaluation sets as sorted hashes, an array a length.

    A text of at least `ngram_words` words gives all its runs of that length; a shorter one of at
    least `min_words` is looked for whole.

    Returns:
      File name → texts taken from it.

    Raises:
      UserError: there is no folder or no set in it, or a set cannot be read.
    """
    folder = Path(step.path)
    found = sorted(p for p in folder.rglob("*") if p.name.removesuffix(".gz").endswith(SUFFIXES))
    if not found:
        raise UserError(
            f"config.steps.decontamination.path: no evaluation sets in {step.path!r}; expected a "
            "folder with JSONL, parquet or text files"
        )
    hashes: dict[int, list[np.ndarray]] = {}
    names: dict[int, list[np.ndarray]] = {}
    counts = {}
    for number, file in enumerate(found):
        taken = 0
        for text in _texts(file, step.columns):
            found_W = words.plain_words(text).hashes_W
            n = min(len(found_W), step.ngram_words)
            if n >= step.min_words:
                taken += 1
                grams_N = words.ngrams(found_W, n)
                hashes.setdefault(n, []).append(grams_N)
                names.setdefault(n, []).append(np.full(len(grams_N), number, np.int32))
        counts[str(file.relative_to(folder))] = taken
    arrays = {"sets": np.array([str(p.relative_to(folder)) for p in found])}
    for n, parts in hashes.items():
        unique, first = np.unique(np.concatenate(parts), return_index=True)
        arrays[f"hashes_{n}"], arrays[f"sets_{n}"] = unique, np.concatenate(names[n])[first]
    with files.atomic_writer(path) as out:
        np.savez(out, **arrays)
    return counts


def _texts(path: Path, columns: tuple[str, ...]) -> Iterator[str]:
    """All strings of a set's rows, or those of the named columns."""
    try:
        name = path.name.removesuffix(".gz")
        if name.endswith(".parquet"):
            rows: Any = import_pyarrow(str(path)).parquet.read_table(path).to_pylist()
        else:
            data = path.read_bytes()
            data = gzip.decompress(data) if path.suffix == ".gz" else data
            if name.endswith(".txt"):
                yield from data.decode().split("\n\n")
                return
            rows = (
                parse_json(data)
                if name.endswith(".json")
                else map(parse_json, filter(bytes.strip, data.splitlines()))
            )
        for row in rows:
            chosen = row
            if columns and isinstance(row, Mapping):
                chosen = [row[column] for column in columns if column in row]
            yield from _strings(chosen)
    except (*READ_ERRORS, ValueError) as error:
        raise UserError(f"{path}: evaluation set cannot be read ({error})") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


class Decontaminate(Rule):
    """Removes documents, or passages of them, that share a run of words with evaluation sets."""

    name, key = "decontamination", "decontamination"

    def __init__(
        self, step: DecontaminationStep, index: Path, tally: Tally | None = None, **kwargs
    ):
        super().__init__(tally, **kwargs)
        self.step, self.index = step, Path(index)
        self._arrays: dict[int, tuple[np.ndarray, np.ndarray]] | None = None
        self._sets: list[str] = []

    def _load(self) -> None:
        with np.load(self.index) as saved:
            lengths = [int(k.removeprefix("hashes_")) for k in saved if k.startswith("hashes_")]
            self._arrays = {n: (saved[f"hashes_{n}"], saved[f"sets_{n}"]) for n in lengths}
            self._sets = saved["sets"].tolist()

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self._arrays is None:
            self._load()
        found = words.plain_words(doc.text)
        hits = []  # (first word, words, set)
        for n, (hashes, sets) in self._arrays.items():
            grams_N = words.ngrams(found.hashes_W, n)
            places = np.minimum(np.searchsorted(hashes, grams_N), len(hashes) - 1)
            for i in np.flatnonzero(hashes[places] == grams_N).tolist():
                hits.append((i, n, self._sets[sets[places[i]]]))
        if not hits:
            return True
        hits.sort()
        doc.metadata["contaminated_by"] = hits[0][2]
        if self.tally is not None:
            for name in {hit[2] for hit in hits}:
                self.tally.category(doc.metadata.get(SOURCE, ""), "contaminated by", name)
        if self.step.action == "drop":
            return False, f"holds text of {hits[0][2]}"
        doc.text = self._cut(doc.text, found, hits)
        self.edited(doc, "documents with passages cut out")
        if len(doc.text) < self.step.min_document_characters:
            return False, "too short after cutting"
        return True

    def _cut(self, text: str, found: words.Words, hits: list[tuple[int, int, str]]) -> str:
        """The text without the runs and what stands around them."""
        margin = self.step.cut_characters
        kept, position = [], 0
        for first, n, _ in hits:
            last = first + n - 1
            begin = int(found.starts_W[first]) - margin
            end = int(found.starts_W[last] + found.lengths_W[last]) + margin
            if begin > position:
                kept.append(text[position:begin].strip())
            position = max(position, end)
        kept.append(text[position:].strip())
        return "\n\n".join(part for part in kept if part)

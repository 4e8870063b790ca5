"""What happened to the documents: counts, bytes, time, reasons, histograms and samples.

Every task of a stage fills one `Tally` and writes it as JSON; tallies add up in any order.
"""

import hashlib
import heapq
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from danube_jax import files

SAMPLE_CHARACTERS = 1_200
SCORE_BINS = 50
MAX_BAD_RECORDS = 1_000


def utf8_size(text: str) -> int:
    """Bytes of the text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def excerpt(text: str) -> str:
    """The beginning of a text and, where it is long, its end."""
    if len(text) <= SAMPLE_CHARACTERS:
        return text
    head, tail = SAMPLE_CHARACTERS * 2 // 3, SAMPLE_CHARACTERS // 3
    return f"{text[:head]} […] {text[-tail:]}"


class Tally:
    """Counts by source and step.

    Attributes:
      steps: source → step → {"documents_in", "bytes_in", "documents_out", "bytes_out",
        "seconds" of the processor, "removed": reason → [documents, bytes], "edited": what →
        number}.
      samples: source → step → reason (or "kept") → [[rank, id, excerpt], ...], the lowest ranks.
      histograms: source → name → bin → documents.
      bad_records: places and reasons of records that were skipped, the first thousand a task.
      num_bad_records: how many there were.
    """

    def __init__(self, max_samples: int = 0):
        self.max_samples = max_samples
        self.steps: dict[str, dict[str, dict[str, Any]]] = {}
        self.samples: dict[str, dict[str, dict[str, list]]] = {}
        self.histograms: dict[str, dict[str, dict[str, int]]] = {}
        self.bad_records: list[list[str]] = []
        self.num_bad_records = 0

    def step(self, source: str, step: str) -> dict[str, Any]:
        """The counts of a step for a source."""
        of_source = self.steps.setdefault(source, {})
        if step not in of_source:
            of_source[step] = {
                **dict.fromkeys(("documents_in", "bytes_in", "documents_out", "bytes_out"), 0),
                **{"seconds": 0.0, "removed": {}, "edited": {}},
            }
        return of_source[step]

    def add(
        self, source: str, step: str, before: int, after: int | None, seconds: float, reason: str
    ) -> None:
        """Counts one document of `before` bytes that left with `after`, or went for `reason`."""
        counts = self.step(source, step)
        counts["documents_in"] += 1
        counts["bytes_in"] += before
        counts["seconds"] += seconds
        if after is None:
            removed = counts["removed"].setdefault(reason, [0, 0])
            removed[0] += 1
            removed[1] += before
        else:
            counts["documents_out"] += 1
            counts["bytes_out"] += after

    def edited(self, source: str, step: str, what: str, number: int = 1) -> None:
        """Counts changes inside documents."""
        edits = self.step(source, step)["edited"]
        edits[what] = edits.get(what, 0) + number

    def sample(self, source: str, step: str, reason: str, name: str, text: str) -> None:
        """Offers a document as a sample; which ones stay depends on their names alone."""
        if not self.max_samples:
            return
        digest = hashlib.blake2b(f"{reason}\0{name}".encode(errors="replace"), digest_size=6)
        group = self.samples.setdefault(source, {}).setdefault(step, {}).setdefault(reason, [])
        rank = digest.hexdigest()
        if len(group) < self.max_samples or rank < group[-1][0]:
            group.append([rank, name, excerpt(text)])
            group.sort()
            del group[self.max_samples :]

    def length(self, source: str, name: str, size: int) -> None:
        """Counts a length by powers of two."""
        self._count(source, name, str(int(math.log2(max(1, size)))))

    def score(self, source: str, name: str, score: float) -> None:
        """Counts a score of 0 to 1 in `SCORE_BINS` bins."""
        self._count(source, name, str(min(SCORE_BINS - 1, max(0, int(score * SCORE_BINS)))))

    def category(self, source: str, name: str, value: str) -> None:
        """Counts a value such as a language."""
        self._count(source, name, value)

    def _count(self, source: str, name: str, value: str) -> None:
        bins = self.histograms.setdefault(source, {}).setdefault(name, {})
        bins[value] = bins.get(value, 0) + 1

    def bad_record(self, where: str, reason: str) -> None:
        """Notes a record that was skipped."""
        self.num_bad_records += 1
        if len(self.bad_records) < MAX_BAD_RECORDS:
            self.bad_records.append([where, reason])

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "steps": self.steps,
            "samples": self.samples,
            "histograms": self.histograms,
            "bad_records": self.bad_records,
            "num_bad_records": self.num_bad_records,
        }

    def save(self, path: Path) -> None:
        """Writes the tally as JSON."""
        files.write_json(path, self.to_dict())


def merge(tallies: Iterable[Mapping[str, Any]], max_samples: int) -> Tally:
    """One tally of many, as `Tally.to_dict` gives them; the order does not matter."""
    out = Tally(max_samples)
    for one in tallies:
        for source, steps in one["steps"].items():
            for step, counts in steps.items():
                add_counts(out.step(source, step), counts)
        for source, steps in one["samples"].items():
            for step, reasons in steps.items():
                for reason, rows in reasons.items():
                    of_step = out.samples.setdefault(source, {}).setdefault(step, {})
                    both = [*of_step.get(reason, []), *rows]
                    of_step[reason] = heapq.nsmallest(max_samples, both)
        for source, names in one["histograms"].items():
            for name, bins in names.items():
                total = out.histograms.setdefault(source, {}).setdefault(name, {})
                for value, number in bins.items():
                    total[value] = total.get(value, 0) + number
        out.bad_records += one["bad_records"]
        out.num_bad_records += one["num_bad_records"]
    out.bad_records = sorted(out.bad_records)[:MAX_BAD_RECORDS]
    return out


def add_counts(total: dict[str, Any], counts: Mapping[str, Any]) -> None:
    """Adds one step's counts to another's, in place."""
    for key in ("documents_in", "bytes_in", "documents_out", "bytes_out", "seconds"):
        total[key] += counts[key]
    for reason, (documents, size) in counts["removed"].items():
        removed = total["removed"].setdefault(reason, [0, 0])
        removed[0] += documents
        removed[1] += size
    for what, number in counts["edited"].items():
        total["edited"][what] = total["edited"].get(what, 0) + number


def load_all(folder: Path) -> list[dict[str, Any]]:
    """The tallies that tasks wrote into a folder."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]

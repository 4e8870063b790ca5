"""The form of a step that looks at one document at a time: a datatrove filter that keeps count."""

import time
from collections.abc import Iterator

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result
from datatrove.utils.typeshelper import StatHints

from danube_jax.data.corpus.tally import Tally, utf8_size

SOURCE = "source"  # keys of a document's metadata
NUMBER = "_number"  # its place in the file of the last stage; not written


class Rule(BaseFilter):
    """Keeps, changes or removes documents.

    A subclass defines `filter(document)`, which returns True or ``(False, reason)`` and may change
    `document.text`; `key` names it in the statistics. Without a tally it is a plain filter.
    """

    key = "rule"

    def __init__(self, tally: Tally | None = None, exclusion_writer=None):
        super().__init__(exclusion_writer)
        self.tally = tally

    def edited(self, document: Document, what: str, number: int = 1) -> None:
        """Counts changes made inside a document."""
        if self.tally is not None:
            self.tally.edited(document.metadata.get(SOURCE, ""), self.key, what, number)

    def run(self, data, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Filters a stream of documents."""
        for document in data:
            before = document.text
            begin = time.process_time()
            kept, reason = get_filter_result(self.filter(document))
            seconds = time.process_time() - begin
            self.stat_update(StatHints.total)
            self.count(document, before, bool(kept), reason or "removed", seconds)
            if kept:
                self.stat_update(StatHints.forwarded)
                yield document
                continue
            self.stat_update(StatHints.dropped, f"dropped_{reason}")
            if self.exclusion_writer:
                document.metadata["filter_reason"] = f"{self.key}: {reason}"
                self.exclusion_writer.write(document, rank)

    def count(
        self, document: Document, before: str, kept: bool, reason: str, seconds: float
    ) -> None:
        """Notes in the tally what became of a document."""
        if self.tally is None:
            return
        source = document.metadata.get(SOURCE, "")
        size = utf8_size(before)
        after = None
        if kept:
            after = size if document.text is before else utf8_size(document.text)
        self.tally.add(source, self.key, size, after, seconds, reason)
        if not kept:
            self.tally.sample(source, self.key, reason, document.id, before)

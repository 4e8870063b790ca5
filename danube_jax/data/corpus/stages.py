"""Blocks at the ends of a stage: reading what the last one wrote, and noting what happened."""

from collections.abc import Iterator
from pathlib import Path

import orjson
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers.jsonl import JsonlWriter

from danube_jax.data.corpus.records import Heartbeat, open_input
from danube_jax.data.corpus.rule import NUMBER, SOURCE
from danube_jax.data.corpus.tally import Tally, utf8_size

FILE = "{:05d}.jsonl.zst"


def document_writer(folder: Path) -> JsonlWriter:
    """datatrove's writer: a compressed JSON line a document, a file a task."""
    return _DocumentWriter(str(folder), output_filename="${rank}.jsonl.zst", compression="zstd")


class _DocumentWriter(JsonlWriter):
    def _default_adapter(self, document: Document) -> dict:
        metadata = {key: value for key, value in document.metadata.items() if key != NUMBER}
        return {"id": document.id, "text": document.text, "metadata": metadata}


class StageReader(PipelineStep):
    """Reads the documents that the same task wrote in an earlier stage; maybe none."""

    type, name = "📖 - READER", "documents"

    def __init__(self, folder: Path, progress: Path):
        super().__init__()
        self.folder, self.progress = Path(folder), Path(progress)

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self.progress.mkdir(parents=True, exist_ok=True)
        heartbeat = Heartbeat(self.progress / f"{rank:05d}.json")
        path = self.folder / FILE.format(rank)
        if path.exists():
            stream, raw = open_input(str(path))
            with raw, stream:
                for number, line in enumerate(stream):
                    document = Document(**orjson.loads(line))
                    document.metadata[NUMBER] = number
                    heartbeat.input_bytes = raw.tell()
                    heartbeat.documents += 1
                    heartbeat.text_bytes += utf8_size(document.text)
                    heartbeat.beat()
                    yield document
        heartbeat.beat(force=True)


class SaveTally(PipelineStep):
    """Writes the tally of a task once its documents have passed.

    Args:
      tally: what the other blocks of the stage count in.
      folder: a file a task.
      final: count also the lengths, scores and samples of the documents that pass here.
      removed: the writer that the stage's rules share, closed here.
    """

    type, name = "📊 - STATS", "tally"

    def __init__(
        self,
        tally: Tally,
        folder: Path,
        final: bool = False,
        removed: JsonlWriter | None = None,
    ):
        super().__init__()
        self.tally, self.folder, self.final, self.removed = tally, Path(folder), final, removed

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for document in data or ():
            if self.final:
                source = document.metadata[SOURCE]
                self.tally.length(source, "bytes_kept", utf8_size(document.text))
                self.tally.sample(source, "kept", "kept", document.id, document.text)
            yield document
        if self.removed is not None:
            self.removed.close()
        self.tally.save(self.folder / f"{rank:05d}.json")

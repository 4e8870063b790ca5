"""Small preparations for tests."""

import gzip
import json
from pathlib import Path
from typing import Any

from danube_jax.data.corpus.config import (
    CorpusConfig,
    corpus_config,
    parse_corpus_config,
    text_source,
)

OFF = ("language", "gopher_repetition", "gopher_quality", "fineweb", "unicode", "masking")


def make(output: Path, sources: dict[str, Any], *, off=OFF, **changes: Any) -> CorpusConfig:
    """A preparation with one worker; `changes` are dotted keys with '__' for dots."""
    config = corpus_config()
    config.output = str(output)
    config.sources = {
        name: text_source(**(row if isinstance(row, dict) else {"path": str(row)}))
        for name, row in sources.items()
    }
    config.executor.workers = 1
    for step in off:
        config.steps[step].enabled = False
    for key, value in {"tokenizer__train_vocab_size": 400, **changes}.items():
        node = config
        *path, last = key.split("__")
        for part in path:
            node = node[part]
        node[last] = value
    return parse_corpus_config(config)


def write_jsonl(path: Path, texts: list[str], **columns: list[str]) -> Path:
    """A JSONL file of texts and other columns; compressed where its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"text": t} | {k: v[i] for k, v in columns.items()} for i, t in enumerate(texts))
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path

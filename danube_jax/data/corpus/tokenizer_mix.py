"""A sample of a mix of sources for training a tokenizer, and how well tokenizers compress it."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from danube_jax.data.corpus.config import CorpusConfig
from danube_jax.data.corpus.inputs import list_inputs
from danube_jax.data.corpus.records import RecordReader
from danube_jax.data.corpus.tally import Tally, utf8_size
from danube_jax.data.corpus.tokenizer_sample import read_documents
from danube_jax.data.tokenizer import Tokenizer
from danube_jax.errors import UserError

MEASURED_BYTES = 2_000_000  # of each source, kept apart from what a tokenizer is trained on
MEASURED_SHARE = 0.05


@dataclasses.dataclass(frozen=True)
class Sample:
    """Texts a source, for training and for measuring."""

    train: Mapping[str, list[str]]
    measured: Mapping[str, list[str]]


def sample_mix(corpus: CorpusConfig, weights: Mapping[str, float], size: int) -> Sample:
    """Samples whole documents, as many bytes of each source as its weight says.

    Prepared documents are taken where `corpus.output` holds them, and the raw sources otherwise.
    Which ones are taken depends on their hashes. A source that has too little gives all it has.

    Args:
      corpus: the config.
      weights: source → weight.
      size: bytes in all.

    Raises:
      UserError: an unknown source, weights that are not possible, or no text.
    """
    unknown = sorted(set(weights) - set(corpus.sources))
    if unknown:
        raise UserError(
            f"--mix: {unknown[0]!r} is no source of the config; expected some of "
            f"{', '.join(corpus.sources)}"
        )
    total = sum(weights.values())
    if total <= 0 or min(weights.values()) < 0:
        raise UserError(f"--mix: {dict(weights)} is not possible; expected positive weights")
    train, measured = {}, {}
    for name, weight in weights.items():
        train[name], measured[name] = _sample(corpus, name, size * weight / total)
        if not train[name] and weight > 0:
            raise UserError(f"config.sources.{name}: no text to train on")
    return Sample(train, measured)


def _sample(corpus: CorpusConfig, name: str, size: float) -> tuple[list[str], list[str]]:
    """(training, measured) texts of a source: of the lowest hashes, then of the highest."""
    ranked: list[tuple[float, str]] = []
    for text in _texts(corpus, name):
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        ranked.append((int.from_bytes(digest, "big") / 2**64, text))
    ranked.sort()
    count = max(1, round(MEASURED_SHARE * len(ranked)))
    measured = _up_to([text for _, text in ranked[::-1][:count]], MEASURED_BYTES)
    train = _up_to([text for _, text in ranked[: len(ranked) - count]] or measured, size)
    return train, measured


def _texts(corpus: CorpusConfig, name: str) -> Iterator[str]:
    prepared = Path(corpus.output) / "documents"
    if prepared.is_dir():
        rows = read_documents(prepared)
        yield from (row["text"] for row in rows if row["metadata"]["source"] == name)
        return
    one = dataclasses.replace(corpus, sources={name: corpus.sources[name]})
    reader = RecordReader(one, (tuple(list_inputs(one)),), Tally(), None)
    yield from (document.text for document in reader.run())


def _up_to(texts: list[str], size: float) -> list[str]:
    """The first texts, the last of them cut, that hold about `size` bytes."""
    out: list[str] = []
    left = size
    for text in texts:
        if left <= 0:
            break
        part = text[: max(1, int(left))]
        out.append(part)
        left -= utf8_size(part)
    return out


def compression(
    tokenizers: Mapping[str, Tokenizer], texts: Mapping[str, list[str]]
) -> dict[str, dict[str, float]]:
    """Source → tokenizer → bytes of UTF-8 text a token, without BOS and EOS."""
    out: dict[str, dict[str, float]] = {}
    for source, rows in texts.items():
        size = sum(map(utf8_size, rows))
        out[source] = {
            name: size / max(1, sum(map(len, tokenizer.encode_batch(rows))))
            for name, tokenizer in tokenizers.items()
        }
    return out

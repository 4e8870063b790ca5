"""Trains a SentencePiece BPE tokenizer on text files, or on a sample of a corpus' mix.

Example:
  python tools/train_tokenizer.py --vocab_size=32000 --output=tokenizer.model books.jsonl.gz a.txt
  python tools/train_tokenizer.py --vocab_size=32000 --output=tokenizer.model \
    --config=configs/data/danube2.py --mix=web=0.8,instruct=0.2 --compare=mistral

With --config, documents are taken from the sources by weight (prepared ones where there are some),
and bytes a token are shown a source, on documents apart from the sample, beside a given tokenizer.

A `.jsonl` file holds a document a line, in the field "text"; any other file is one document. Both
may be compressed with gzip.
"""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from danube_jax import command_line
from danube_jax.config import TokenizerConfig
from danube_jax.data import tokenizer
from danube_jax.errors import UserError

_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 32_000, "Number of token ids.")
_OUTPUT = flags.DEFINE_string("output", None, "The .model file to write.")
_FIELD = flags.DEFINE_string("field", "text", "Field of a JSON line that holds the text.")
_CONFIG = config_flags.DEFINE_config_file("config", None, "A file in configs/data/.")
_MIX = flags.DEFINE_list("mix", [], "With --config: source=weight,...; default: all alike.")
_SAMPLE_MB = flags.DEFINE_float("sample_mb", 200.0, "With --config: size of the sample.", 0.001)
_COMPARE = flags.DEFINE_string(
    "compare", None, "With --config: a tokenizer's file or folder, or 'mistral'."
)


def read_documents(paths: list[Path], field: str) -> Iterator[str]:
    """The texts of the files, in order."""
    for path in paths:
        opener = gzip.open if path.suffix == ".gz" else open
        name = path.name.removesuffix(".gz")
        try:
            with opener(path, "rt", encoding="utf-8") as file:
                if not name.endswith(".jsonl"):
                    yield file.read()
                    continue
                for number, line in enumerate(file, 1):
                    yield parse_line(line, field, f"{path}, line {number}")
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); expected UTF-8 text") from None


def parse_line(line: str, field: str, where: str) -> str:
    """The text of one JSON line."""
    try:
        text = json.loads(line)[field]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{where}: {error!r}; expected a JSON object with the field {field!r}"
        ) from None
    if not isinstance(text, str):
        raise UserError(f"{where}: {field!r} is {type(text).__name__}; expected a string")
    return text


def train_on_mix() -> None:
    """Trains on a sample of the config's sources, and shows how well it compresses them."""
    from danube_jax.data.corpus import tokenizer_mix
    from danube_jax.data.corpus.config import parse_corpus_config

    corpus = parse_corpus_config(command_line.config_dict(_CONFIG))
    weights = dict.fromkeys(corpus.sources, 1.0)
    if _MIX.value:
        try:
            weights = {n: float(w) for n, w in (row.split("=") for row in _MIX.value)}
        except ValueError:
            raise UserError(
                f"--mix: {','.join(_MIX.value)!r}; expected source=weight,..., such as web=0.8"
            ) from None
    tokenizers = {}
    if _COMPARE.value:
        given = {"builtin" if _COMPARE.value == "mistral" else "path": _COMPARE.value}
        tokenizers[_COMPARE.value] = tokenizer.load_tokenizer(TokenizerConfig(**given))
    sample = tokenizer_mix.sample_mix(corpus, weights, int(_SAMPLE_MB.value * 1e6))
    texts = (text for rows in sample.train.values() for text in rows)
    trained = tokenizer.train_bpe(texts, _OUTPUT.value, _VOCAB_SIZE.value)
    print(f"{trained.path}: {trained.vocab_size:,} ids, fingerprint {trained.fingerprint[:12]}")
    tokenizers = {str(trained.path): trained} | tokenizers
    found = tokenizer_mix.compression(tokenizers, sample.measured)
    table = Table(title="bytes a token, on documents apart from the sample", title_justify="left")
    table.add_column("source")
    table.add_column("sample, MB", justify="right")
    for name in tokenizers:
        table.add_column(f"{name}\n{tokenizers[name].vocab_size:,} ids", justify="right")
    for source, row in found.items():
        size = sum(len(text.encode()) for text in sample.train[source]) / 1e6
        table.add_row(source, f"{size:,.2f}", *(f"{value:.3f}" for value in row.values()))
    Console(width=120).print(table)


def main(argv: Sequence[str]) -> int:
    """Checks the command line, trains, and says what was written; returns the exit status."""
    arguments = command_line.parse_flags(argv, __doc__, required=("output",), positional=True)
    if _CONFIG.value is not None:
        if arguments:
            raise UserError(f"{arguments[0]!r}: give either --config or files, not both")
        train_on_mix()
        return 0
    for flag in (_MIX, _COMPARE):
        if flag.value:
            raise UserError(f"--{flag.name} needs --config")
    if not arguments:
        raise UserError("no input files; see --help for an example")
    paths = [Path(name) for name in arguments]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
    documents = read_documents(paths, _FIELD.value)
    trained = tokenizer.train_bpe(documents, _OUTPUT.value, _VOCAB_SIZE.value)
    print(f"{trained.path}: {trained.vocab_size:,} ids, fingerprint {trained.fingerprint[:12]}")
    return 0


if __name__ == "__main__":
    command_line.run(main)

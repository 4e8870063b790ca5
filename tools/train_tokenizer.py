"""Trains a SentencePiece BPE tokenizer on text files.

Example:
  python tools/train_tokenizer.py --vocab_size=32000 --output=tokenizer.model books.jsonl.gz a.txt

A `.jsonl` file holds a document a line, in the field "text"; any other file is one document. Both
may be compressed with gzip.
"""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from danube_jax import command_line
from danube_jax.data import tokenizer
from danube_jax.errors import UserError

_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 32_000, "Number of token ids.")
_OUTPUT = flags.DEFINE_string("output", None, "The .model file to write.")
_FIELD = flags.DEFINE_string("field", "text", "Field of a JSON line that holds the text.")


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


def main(argv: Sequence[str]) -> int:
    """Checks the command line, trains, and says what was written; returns the exit status."""
    arguments = command_line.parse_flags(argv, __doc__, required=("output",), positional=True)
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

"""lm-eval's cache of answers without pickle, and with a checksum on each.

lm-eval keeps answers in an SQLite file (`sqlitedict`), whose values it pickles: to read such a file
from someone else's folder would run what it says. Here a value is a line of JSON behind the
beginning of its SHA-256.
"""

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator
from typing import Any

from danube_jax.untrusted import parse_json

_DIGITS = 16


def encode(answer: Any) -> str:
    """A number, a text, or a tuple of numbers and booleans, as text."""
    text = json.dumps(answer)
    return f"{_checksum(text)} {text}"


def decode(stored: Any) -> Any:
    """What `encode` was given.

    Raises:
      sqlite3.DatabaseError: it is something else, or damaged.
    """
    checksum, _, text = stored.partition(" ") if isinstance(stored, str) else ("", "", "")
    if checksum != _checksum(text):
        raise sqlite3.DatabaseError("an answer in it is damaged, or of another program")
    answer = parse_json(text)
    return tuple(answer) if isinstance(answer, list) else answer


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


@contextlib.contextmanager
def without_pickle() -> Iterator[None]:
    """Has every cache that lm-eval opens inside the block keep its answers by this module."""
    import sqlitedict

    plain = sqlitedict.SqliteDict

    class Answers(plain):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options | {"encode": encode, "decode": decode})

    sqlitedict.SqliteDict = Answers
    try:
        yield
    finally:
        sqlitedict.SqliteDict = plain

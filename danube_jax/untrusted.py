"""Reading what others wrote: JSON of any content, misspelt keys, and words fit for a terminal."""

import json
import lzma
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from danube_jax.errors import UserError

_MOST_DIGITS = 100  # transformers writes 10**30 for a tokenizer without a limit
# What reading a file, compressed or not, raises where it is not there, damaged, or breaks off.
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]", re.ASCII)


def parse_json(text: str | bytes, *, strict: bool = False) -> Any:
    """`json.loads` whose every failure is a ValueError.

    Args:
      text: JSON; bytes are UTF-8.
      strict: for settings: an object that has a key twice is refused, instead of its last value
        taken, and so is a whole number that no float holds.

    Raises:
      ValueError: no JSON, no UTF-8, nested too deeply, or a text with half of a surrogate pair,
        which no tokenizer and no file of UTF-8 can take.
    """
    if isinstance(text, bytes):
        text = text.decode()
    try:
        value = json.loads(text, **(_STRICT if strict else {}))
        if _SURROGATE_ESCAPE.search(text):
            _refuse_surrogates(value)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice!r} stands in it twice")
    return out


def _whole(text: str) -> int:
    value = int(text)
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits")
    return value


_STRICT = {"object_pairs_hook": _unique, "parse_int": _whole}


def _refuse_surrogates(value: Any) -> None:
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("is not valid Unicode: a text holds half of a surrogate pair")
    elif isinstance(value, dict):
        for key, item in value.items():
            _refuse_surrogates(key)
            _refuse_surrogates(item)
    elif isinstance(value, list):
        for item in value:
            _refuse_surrogates(item)


def refuse_misspelt(content: Mapping[str, Any], known: Iterable[str], where: object) -> None:
    """Refuses a key that differs in one character from a known one that is not there.

    It would be passed over, and the default of the known one taken in silence: that is what a
    flipped bit or a slip of the finger looks like.

    Raises:
      UserError: there is such a key.
    """
    known = set(known)
    for key in content.keys() - known:
        for name in known - content.keys():
            if len(key) == len(name) and sum(a != b for a, b in zip(key, name, strict=True)) == 1:
                raise UserError(f"{where}: unknown key {key!r}; is it meant to be {name!r}?")

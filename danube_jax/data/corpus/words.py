"""Words of a text as arrays: one pass of NumPy instead of a linguistic tokenizer.

Runs of letters, digits and marks are words, and so are web addresses; a point, comma or colon
inside a number, a point inside an abbreviation and an opening bracket inside a word belong to it;
an apostrophe begins a word (don't: don, 't), as English tokenizers split it. Every other visible
character is a word of its own, but runs of one of `RUNS` are one. Words
are known by position, length and a 64-bit hash.

Shape suffixes: C: characters of the text, W: words, N: n-grams.
"""

import dataclasses
import functools
import re
import unicodedata

import numpy as np

SPACE, LETTER, SYMBOL = 0, 1, 2
RUNS = ".-–—~…"  # noqa: RUF001 (dashes are meant)
ADDRESS = re.compile(r"(?:https?|ftp)://[^\s<>\"]*[^\s<>\"'.,:;!?)\]]")
# What Gopher's rules take for a symbol rather than a part of a word, control characters included.
SYMBOLS = (
    "!/—”:％１〈&(、━\\【#%「」，】；+^]~“《„';’{|∶´[=-`*．（–？！：$～«〉,><》)?）。…@_.\"}►»"  # noqa: RUF001
    + "".join(chr(i) for i in (*range(9), *range(11, 32), *range(127, 160)))
)
# Characters that may make a word with their neighbours; a bit each.
ROLES = {"run": RUNS, "leading": "./@-", "inner": "_@&", "number": ",:.", "open": "([{"}
ROLES |= {"apostrophe": "'’", "point": ".", "hyphen": "-", "slash": "/"}  # noqa: RUF001
BIT = {name: 1 << i for i, name in enumerate(ROLES)}
_TABLE = 2**16
_POSITIONS = 64
_MIX = np.uint64(0xFF51AFD7ED558CCD)


@dataclasses.dataclass(frozen=True)
class Words:
    """The words of one text.

    Attributes:
      starts_W, lengths_W: int64, in characters.
      hashes_W: uint64, equal for equal words.
      is_symbol_W: bool, whether it is made of symbols alone.
      has_letter_W: bool, whether it holds an alphabetic character.
    """

    starts_W: np.ndarray
    lengths_W: np.ndarray
    hashes_W: np.ndarray
    is_symbol_W: np.ndarray
    has_letter_W: np.ndarray

    def __len__(self) -> int:
        return len(self.starts_W)


@dataclasses.dataclass(frozen=True)
class _Tables:
    """What is known of each character of the basic plane; others count as symbols."""

    kind: np.ndarray  # uint8
    alphabetic: np.ndarray  # bool
    symbol: np.ndarray  # bool
    lower: np.ndarray  # uint16
    role: np.ndarray  # uint16, bits of `ROLES`
    salt: np.ndarray  # uint64
    position: np.ndarray  # uint64 [64], odd


@functools.cache
def _tables() -> _Tables:
    characters = [chr(i) for i in range(_TABLE)]
    kind = np.full(_TABLE, SYMBOL, np.uint8)
    kind[[c.isalnum() or unicodedata.combining(c) > 0 for c in characters]] = LETTER
    kind[[c.isspace() for c in characters]] = SPACE
    kind[-1] = SYMBOL
    lower = np.arange(_TABLE, dtype=np.uint16)
    for i, c in enumerate(characters):
        small = c.lower()
        if small != c and len(small) == 1 and ord(small) < _TABLE:
            lower[i] = ord(small)
    symbol = np.zeros(_TABLE, bool)
    symbol[[ord(c) for c in SYMBOLS]] = True
    role = np.zeros(_TABLE, np.uint16)
    for name, members in ROLES.items():
        role[[ord(c) for c in members]] |= BIT[name]
    random = np.random.Generator(np.random.PCG64(20240513))
    return _Tables(
        kind,
        np.array([c.isalpha() for c in characters]),
        symbol,
        lower,
        role,
        random.integers(2**64, size=_TABLE, dtype=np.uint64),
        random.integers(2**64, size=_POSITIONS, dtype=np.uint64) | np.uint64(1),
    )


def code_points(text: str) -> np.ndarray:
    """[C] the characters' numbers, those beyond the basic plane cut to 65535."""
    if text.isascii():
        return np.frombuffer(text.encode(), np.uint8)
    codes_C = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    return np.minimum(codes_C, _TABLE - 1).astype(np.uint16)


@functools.lru_cache(maxsize=1)
def split(text: str) -> Words:
    """The words of a text; the last text's are kept, since several rules ask for them."""
    return _words(code_points(text), text)


@functools.lru_cache(maxsize=1)
def plain_words(text: str) -> Words:
    """The words without symbols, in lower case, for comparing texts."""
    words = _words(_tables().lower[code_points(text)])
    kept = ~words.is_symbol_W
    return Words(*(getattr(words, f.name)[kept] for f in dataclasses.fields(words)))


def _words(codes_C: np.ndarray, text: str = "") -> Words:
    """The words; where the text is given too, its web addresses are words."""
    tables = _tables()
    kind_C = tables.kind[codes_C]
    if "://" in text:
        for address in ADDRESS.finditer(text):
            kind_C[slice(*address.span())] = LETTER
    begins_C = _join(codes_C, kind_C)
    visible_C = kind_C != SPACE
    previous_C = np.empty_like(kind_C)
    previous_C[:1], previous_C[1:] = SPACE, kind_C[:-1]
    begins_C |= visible_C & (previous_C != kind_C)
    alone_C = kind_C == SYMBOL
    same_C = np.zeros(len(codes_C), bool)
    same_C[1:] = codes_C[1:] == codes_C[:-1]
    run_C = (tables.role[codes_C] & BIT["run"]) > 0
    begins_C |= alone_C & ~(same_C & run_C)
    starts_W = np.flatnonzero(begins_C)
    if not len(starts_W):
        empty = np.zeros(0, np.int64)
        return Words(empty, empty, empty.astype(np.uint64), empty.astype(bool), empty.astype(bool))
    seen = np.flatnonzero(visible_C)
    first_W = np.searchsorted(seen, starts_W)
    lengths_W = np.diff(np.append(first_W, len(seen)))
    position = np.arange(len(seen)) - np.repeat(first_W, lengths_W)
    codes = codes_C[seen]
    salted = tables.salt[codes] * tables.position[position & (_POSITIONS - 1)]
    return Words(
        starts_W,
        lengths_W,
        mix(np.add.reduceat(salted, first_W)),
        np.logical_and.reduceat(tables.symbol[codes], first_W),
        np.logical_or.reduceat(tables.alphabetic[codes], first_W),
    )


def _join(codes_C: np.ndarray, kind_C: np.ndarray) -> np.ndarray:
    """Makes inner points, commas and apostrophes part of words; bool [C], where words then begin.

    Changes `kind_C` in place.
    """
    begins_C = np.zeros(len(codes_C), bool)
    if len(codes_C) < 3:
        return begins_C
    tables = _tables()
    inner = 1 + np.flatnonzero(
        (kind_C[1:-1] == SYMBOL) & (kind_C[:-2] == LETTER) & (kind_C[2:] == LETTER)
    )
    role, before, after = tables.role[codes_C[inner]], codes_C[inner - 1], codes_C[inner + 1]
    letter_before, letter_after = tables.alphabetic[before], tables.alphabetic[after]
    digits = ~letter_before & ~letter_after
    sentence_end = (tables.lower[before] == before) & (tables.lower[after] != after)
    joined = (role & (BIT["inner"] | BIT["open"])) > 0
    joined |= ((role & BIT["point"]) > 0) & ~sentence_end
    joined |= ((role & BIT["number"]) > 0) & digits
    joined |= ((role & BIT["hyphen"]) > 0) & ~(letter_before & letter_after)
    joined |= ((role & BIT["slash"]) > 0) & ~letter_after
    apostrophe = (role & BIT["apostrophe"]) > 0
    leading = np.flatnonzero(
        (kind_C[1:-1] == SYMBOL) & (kind_C[:-2] == SPACE) & (kind_C[2:] == LETTER)
    )
    leading = 1 + leading[(tables.role[codes_C[leading + 1]] & BIT["leading"]) > 0]
    kind_C[inner[joined | apostrophe]] = LETTER
    kind_C[leading] = LETTER
    begins_C[inner[apostrophe]] = True
    return begins_C


def mix(hashes: np.ndarray) -> np.ndarray:
    """Spreads every bit of uint64 numbers over all (the finaliser of MurmurHash3)."""
    hashes = hashes ^ (hashes >> np.uint64(33))
    hashes *= _MIX
    return hashes ^ (hashes >> np.uint64(33))


def ngrams(hashes_W: np.ndarray, n: int) -> np.ndarray:
    """uint64 [max(0, W - n + 1)]: a hash of every run of n words."""
    count = len(hashes_W) - n + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    weights = _tables().position
    out_N = hashes_W[:count] * weights[0]
    for i in range(1, n):
        out_N += hashes_W[i : i + count] * weights[i]
    return mix(out_N)


@functools.cache
def hash_of(word: str) -> int:
    """The hash that a word of letters has among `Words.hashes_W`."""
    return int(_words(code_points(word)).hashes_W[0])

"""Rules of Gopher, C4 and FineWeb as datatrove filters, on arrays of words.

datatrove's own blocks take the same decisions from a linguistic tokenizer's words at a tenth of
the speed; the tests compare both.
"""

import re
from collections.abc import Sequence

import numpy as np
from datatrove.data import Document
from datatrove.utils.text import TERMINAL_PUNCTUATION

from danube_jax.data.corpus import words
from danube_jax.data.corpus.config import (
    C4Step,
    FineWebStep,
    GopherQualityStep,
    GopherRepetitionStep,
)
from danube_jax.data.corpus.rule import Rule
from danube_jax.data.corpus.tally import Tally
from danube_jax.data.corpus.words import Words

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
PARAGRAPH_BREAK = re.compile(r"\n{2,}")
LINE_BREAK = re.compile(r"\n+")
CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)")  # noqa: RUF001
POLICY = (
    *("terms of use", "privacy policy", "cookie policy"),
    *("uses cookies", "use of cookies", "use cookies"),
)
LINE_ENDS = (".", "?", "!", '"', "'")
FINEWEB_ENDS = tuple(TERMINAL_PUNCTUATION)

Decision = bool | tuple[bool, str]


class GopherRepetition(Rule):
    """Removes documents in which lines, paragraphs or runs of words repeat."""

    name, key = "Gopher repetition", "gopher_repetition"

    def __init__(self, step: GopherRepetitionStep, tally: Tally | None = None, **kwargs):
        super().__init__(tally, **kwargs)
        self.step = step
        self.top = [(n, getattr(step, f"top_{n}_gram")) for n in (2, 3, 4)]
        self.duplicate = [(n, getattr(step, f"duplicate_{n}_gram")) for n in range(5, 11)]

    def filter(self, doc: Document) -> Decision:
        text, step = doc.text, self.step
        if not text:
            return False, "empty"
        parts = (
            ("paragraph", PARAGRAPH_BREAK.split(text.strip())),
            ("line", LINE_BREAK.split(text)),
        )
        for unit, pieces in parts:
            count, characters = repeated(pieces)
            if exceeds(count, len(pieces), getattr(step, f"duplicate_{unit}s")):
                return False, f"duplicate_{unit}s"
            if exceeds(characters, len(text), getattr(step, f"duplicate_{unit}_characters")):
                return False, f"duplicate_{unit}_characters"
        found = words.split(text)
        for n, limit in self.top:
            if limit and exceeds_top_ngram(found, n, limit * len(text)):
                return False, f"top_{n}_gram"
        return self._duplicate_ngrams(found, len(text))

    def _duplicate_ngrams(self, found: Words, length: int) -> Decision:
        rules = [(n, limit) for n, limit in self.duplicate if limit]
        if not rules or len(found) < rules[0][0]:
            return True
        # A repeated run of n words consists of repeated runs of fewer, so what these cover bounds
        # what any longer ones do; nearly every document ends here.
        if covered_characters(found, rules[0][0]) <= min(rule[1] for rule in rules) * length:
            return True
        for n, limit in rules:
            if exceeds(covered_characters(found, n), length, limit) and exceeds(
                duplicate_characters(found, n), length, limit
            ):
                return False, f"duplicate_{n}_gram"
        return True


class GopherQuality(Rule):
    """Removes documents that do not look like prose: length, word length, symbols, stop words."""

    name, key = "Gopher quality", "gopher_quality"

    def __init__(self, step: GopherQualityStep, tally: Tally | None = None, **kwargs):
        super().__init__(tally, **kwargs)
        self.step = step
        self.stop_hashes = [words.hash_of(word) for word in STOP_WORDS]

    def filter(self, doc: Document) -> Decision:
        step, text = self.step, doc.text
        found = words.split(text)
        lengths = found.lengths_W[~found.is_symbol_W]
        count, total = len(lengths), len(found)
        if count < max(1, step.min_words):
            return False, "too_few_words"
        if step.max_words and count > step.max_words:
            return False, "too_many_words"
        mean = lengths.mean()
        if mean < step.min_mean_word_length:
            return False, "short_words"
        if step.max_mean_word_length and mean > step.max_mean_word_length:
            return False, "long_words"
        symbols = (text.count("#"), text.count("...") + text.count("…"))
        for name, number in zip(("hashes", "ellipses"), symbols, strict=True):
            if exceeds(number, total, step.max_symbols_per_word):
                return False, f"too_many_{name}"
        lines = text.splitlines()
        bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
        if exceeds(bullets, len(lines), step.max_bullet_lines):
            return False, "bullet_lines"
        ellipses = sum(line.rstrip().endswith(("...", "…")) for line in lines)
        if exceeds(ellipses, len(lines), step.max_ellipsis_lines):
            return False, "ellipsis_lines"
        if np.count_nonzero(found.has_letter_W) < step.min_alphabetic_words * total:
            return False, "few_alphabetic_words"
        if step.min_stop_words:
            present = sum(bool((found.hashes_W == value).any()) for value in self.stop_hashes)
            if present < step.min_stop_words:
                return False, "few_stop_words"
        return True


class C4(Rule):
    """Drops lines and pages by C4's rules; what is left of a page is its good lines."""

    name, key = "C4", "c4"

    def __init__(self, step: C4Step, tally: Tally | None = None, **kwargs):
        super().__init__(tally, **kwargs)
        self.step = step

    def filter(self, doc: Document) -> Decision:
        step, text = self.step, doc.text
        lower = text.lower()
        flags = {  # what is nowhere in the page need not be looked for in its lines
            "lorem": step.refuse_lorem_ipsum and "lorem ipsum" in lower,
            "javascript": step.drop_javascript and "javascript" in lower,
            "bracket": step.refuse_curly_bracket and "{" in text,
            "policy": step.drop_policy and any(phrase in lower for phrase in POLICY),
            "citation": step.drop_citations and "[" in text,
        }
        kept, sentences = [], 0
        lines = text.splitlines()
        for raw in lines:
            line = self._line(raw.strip(), flags)
            if line is False:
                return False, "lorem_ipsum" if "lorem ipsum" in raw.lower() else "curly_bracket"
            if line:
                kept.append(line)
                if sentences < step.min_sentences:
                    sentences += count_sentences(line)
        if sentences < step.min_sentences:
            return False, "few_sentences"
        if len(kept) < len(lines):
            self.edited(doc, "lines dropped", len(lines) - len(kept))
        doc.text = "\n".join(kept).strip()
        return True

    def _line(self, line: str, flags: dict[str, bool]) -> str | bool | None:
        """The line as it stays, None where it goes, False where the page goes."""
        step = self.step
        limit = step.max_word_length
        if 0 < limit < len(line) and any(len(word) > limit for word in line.split()):
            return None
        few_words = step.min_words_per_line > 0 and (
            len(line.split(None, step.min_words_per_line - 1)) < step.min_words_per_line
        )
        if flags["citation"]:
            line = CITATION.sub("", line)
        if step.terminal_punctuation and (not line.endswith(LINE_ENDS) or line.endswith("...")):
            return None
        if few_words:
            return None
        lower = line.lower() if flags["lorem"] or flags["javascript"] or flags["policy"] else ""
        if flags["lorem"] and "lorem ipsum" in lower:
            return False
        if flags["javascript"] and "javascript" in lower:
            return None
        if flags["bracket"] and "{" in line:
            return False
        if flags["policy"] and any(phrase in lower for phrase in POLICY):
            return None
        return line


class FineWeb(Rule):
    """Removes documents of unpunctuated, short or repeated lines, or of lists."""

    name, key = "FineWeb", "fineweb"

    def __init__(self, step: FineWebStep, tally: Tally | None = None, **kwargs):
        super().__init__(tally, **kwargs)
        self.step = step

    def filter(self, doc: Document) -> Decision:
        step, text = self.step, doc.text
        lines = [line for line in text.split("\n") if line.strip()]
        if not lines:
            return False, "empty"
        punctuated = sum(line.endswith(FINEWEB_ENDS) for line in lines)
        if punctuated < step.min_punctuated_lines * len(lines):
            return False, "unpunctuated_lines"
        short = sum(len(line) <= step.short_line_characters for line in lines)
        if exceeds(short, len(lines), step.max_short_lines):
            return False, "short_lines"
        newlines = text.count("\n")
        if exceeds(repeated(lines)[1], len(text) - newlines, step.max_duplicate_characters):
            return False, "duplicate_lines"
        if exceeds(newlines, len(words.split(text)), step.max_newlines_per_word):
            return False, "list"
        return True


def exceeds(part: float, whole: float, limit: float) -> bool:
    """Whether a share is above a limit; a limit of 0 is none."""
    return limit > 0 and part / whole > limit


def repeated(pieces: Sequence[str]) -> tuple[int, int]:
    """(number, characters) of the pieces that occurred before."""
    if len(set(pieces)) == len(pieces):
        return 0, 0
    seen: set[str] = set()
    count = characters = 0
    for piece in pieces:
        if piece in seen:
            count += 1
            characters += len(piece)
        else:
            seen.add(piece)
    return count, characters


def count_sentences(line: str) -> int:
    """Sentences of a line, the last of which may lack its point."""
    ends = [match.end() for match in SENTENCE_END.finditer(line)]
    return len(ends) + (not ends or bool(line[ends[-1] :].strip()))


def _ngram_lengths(found: Words, n: int) -> np.ndarray:
    """int64 [N]: characters of the words of every run of n words, without spaces."""
    sums = np.concatenate([[0], np.cumsum(found.lengths_W)])
    return sums[n:] - sums[:-n]


def exceeds_top_ngram(found: Words, n: int, limit: float) -> bool:
    """Whether the commonest run of n words, times its count, is longer than `limit` characters."""
    hashes_N = words.ngrams(found.hashes_W, n)
    if not len(hashes_N):
        return False
    ordered = np.sort(hashes_N)
    ends = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)
    counts = np.diff(ends, prepend=-1)
    top = counts.max()
    lengths_N = _ngram_lengths(found, n) + n - 1
    if top * lengths_N.max() <= limit:
        return False
    # Of equally common runs the first in the text counts.
    common = np.flatnonzero(np.isin(hashes_N, ordered[ends[counts == top]]))
    return bool(top * lengths_N[common[0]] > limit)


def _is_repeat(hashes_N: np.ndarray) -> np.ndarray:
    """bool [N]: whether the same value stands further left."""
    order = np.argsort(hashes_N, kind="stable")
    ordered = hashes_N[order]
    repeats_N = np.zeros(len(hashes_N), bool)
    repeats_N[order[1:]] = ordered[1:] == ordered[:-1]
    return repeats_N


def covered_characters(found: Words, n: int) -> int:
    """Characters of the words that lie in a run of n words that occurred before."""
    hashes_N = words.ngrams(found.hashes_W, n)
    if not len(hashes_N):
        return 0
    ordered = np.sort(hashes_N)
    if not (ordered[1:] == ordered[:-1]).any():
        return 0
    steps = np.zeros(len(found) + 1, np.int64)
    places = np.flatnonzero(_is_repeat(hashes_N))
    np.add.at(steps, places, 1)
    np.add.at(steps, places + n, -1)
    return int(found.lengths_W[np.cumsum(steps)[:-1] > 0].sum())


def duplicate_characters(found: Words, n: int) -> int:
    """Characters in repeated runs of n words, counted from left to right without overlap."""
    hashes_N = words.ngrams(found.hashes_W, n)
    lengths = _ngram_lengths(found, n).tolist()
    _, numbers = np.unique(hashes_N, return_inverse=True)
    seen, characters, i = set(), 0, 0
    numbers = numbers.tolist()
    while i < len(numbers):
        if numbers[i] in seen:
            characters += lengths[i]
            i += n
        else:
            seen.add(numbers[i])
            i += 1
    return characters

"""Decisions of the heuristic rules beside datatrove's own blocks."""

import functools
import random
from pydoc_data.topics import topics

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    fineweb_quality_filter,
    gopher_quality_filter,
    gopher_repetition_filter,
)

from danube_jax.data.corpus import heuristics, words
from danube_jax.data.corpus.config import (
    C4Step,
    FineWebStep,
    GopherQualityStep,
    GopherRepetitionStep,
)

REAL = [text for _, text in sorted(topics.items())]


def split_text(text, language=None):
    found = words.split(text)
    return [
        text[start : start + length]
        for start, length in zip(found.starts_W, found.lengths_W, strict=True)
    ]


def documents() -> list[str]:
    """Real text, and real text made worse in the ways that the rules look for."""
    rng = random.Random(0)
    out = list(REAL)
    for text in REAL[:40]:
        lines = text.split("\n")
        out.append("\n".join(rng.choices(lines[: len(lines) // 2 + 1], k=len(lines))))
        sentence = " ".join(text.split()[:12])
        out.append(text[:600] + f" {sentence}" * rng.randint(1, 30))
        out.append("\n".join(f"- {line}" for line in lines))
        out.append("\n".join(line + "..." for line in lines))
        out.append("".join(rng.sample(text[:3_000], min(3_000, len(text)))))
        out.append(" ".join(rng.choices(text.split(), k=rng.randint(5, 400))))
        out.append(text[:500] + " #" * rng.randint(0, 40))
        out.append("\n".join(word for word in text.split()[:200]))
        out.append("\n\n".join(rng.choices(text.split("\n\n"), k=9)))
    return [text for text in out if text.strip()]


DOCUMENTS = documents()


def kept(block, text):
    result = block.filter(Document(text, "x"))
    return bool(result[0] if isinstance(result, tuple) else result)


PAIRS = {
    "gopher_repetition": (
        heuristics.GopherRepetition(GopherRepetitionStep()),
        GopherRepetitionFilter,
        gopher_repetition_filter,
    ),
    "gopher_quality": (
        # Manuals are full of symbols: the default threshold would keep next to none.
        heuristics.GopherQuality(GopherQualityStep(min_alphabetic_words=0.6)),
        functools.partial(GopherQualityFilter, max_non_alpha_words_ratio=0.6),
        gopher_quality_filter,
    ),
    "fineweb": (heuristics.FineWeb(FineWebStep()), FineWebQualityFilter, fineweb_quality_filter),
}


@pytest.mark.parametrize("name", PAIRS)
def test_same_decisions_from_the_same_words(name, monkeypatch):
    ours, peer, module = PAIRS[name]
    monkeypatch.setattr(module, "split_into_words", split_text)
    decisions = [kept(ours, text) for text in DOCUMENTS]
    assert decisions == [kept(peer(), text) for text in DOCUMENTS]
    assert 0.05 < np.mean(decisions) < 0.95


@pytest.mark.parametrize("name", PAIRS)
def test_nearly_the_same_decisions_as_from_a_linguistic_tokenizer(name):
    pytest.importorskip("spacy", reason="datatrove's own word splitter needs spacy")
    ours, peer, _ = PAIRS[name]
    same = [kept(ours, text) == kept(peer(), text) for text in DOCUMENTS[::3]]
    # Where they differ, a share lies next to its threshold: symbols are counted a little apart.
    assert np.mean(same) >= 0.95


@pytest.mark.parametrize("terminal", [True, False])
def test_c4_keeps_the_same_lines(terminal):
    pytest.importorskip("spacy", reason="datatrove's own sentence splitter needs spacy")
    extra = [
        "Read our terms of use.\nThis is fine. " + "So is this one. " * 6,
        "Lorem ipsum dolor sit amet is here.\n" + "A sentence of words. " * 6,
        "Please enable Javascript in your browser.\n" + "A sentence of words. " * 6,
        "if (x) { return 1 } is some code.\n" + "A sentence of words. " * 6,
        "Some fact.[1] Another fact follows it.[citation needed]\n" + "And a third one. " * 6,
        "x" * 1_001 + " is a long word indeed.\n" + "A sentence of words. " * 6,
    ]
    ours = heuristics.C4(C4Step(terminal_punctuation=terminal))
    peer = C4QualityFilter(filter_no_terminal_punct=terminal)
    for text in [*DOCUMENTS[::5], *extra]:
        a, b = Document(text, "x"), Document(text, "x")
        result, expected = ours.filter(a), peer.filter(b)
        if isinstance(expected, tuple):
            # The number of sentences may differ where abbreviations end in points.
            assert isinstance(result, tuple) or expected[1] == "too_few_sentences"
        elif not isinstance(result, tuple):
            assert a.text == b.text


def test_words_are_found_with_their_places():
    text = (
        "I don't know Mr. Smith's U.S. 3.14, 1,000 -- yes... (x) a@b.org état “q” http://a.b/c?d=e."
    )
    expected = (
        "I don 't know Mr . Smith 's U.S . 3.14 , 1,000 -- yes ... ( x ) a@b.org état “ q ” "
        "http://a.b/c?d=e ."
    )
    assert split_text(text) == expected.split()
    assert split_text("  \n\t ") == []
    assert split_text("\U0001f600 smile") == ["\U0001f600", "smile"]


def test_equal_words_have_equal_hashes_and_different_ones_different():
    text = " ".join(REAL)
    found = words.split(text)
    by_text = {}
    for word, value in zip(split_text(text), found.hashes_W.tolist(), strict=True):
        assert by_text.setdefault(word, value) == value
    assert len(set(by_text.values())) == len(by_text) > 4_000


def test_lower_case_words_ignore_case_and_punctuation():
    first = words.plain_words("The ÉTAT, of things (2024)!").hashes_W
    second = words.plain_words("the état of\n things - 2024").hashes_W
    assert first.tolist() == second.tolist()
    assert len(first) == 5

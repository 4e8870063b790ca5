"""Unicode repair, masking, language, lists, decontamination: single documents."""

import gzip
import json

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.formatters.pii import PIIFormatter

from danube_jax.data.corpus import decontaminate, text_rules
from danube_jax.data.corpus.config import (
    DecontaminationStep,
    LanguageStep,
    ListStep,
    MaskingStep,
    UnicodeStep,
)
from danube_jax.data.corpus.minhash import MinHasher, MinHashStep
from danube_jax.errors import UserError


def apply(rule, text, **metadata):
    """(text afterwards, reason or None)."""
    document = Document(text, "x", metadata=metadata)
    result = rule.filter(document)
    return document.text, None if result is True else result[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text\n", "plain text\n"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("e\u0301tat", "état"),
        ("bell\x07 and\ufeff mark", "bell and mark"),
        ("schÃ¶n und gut", "schön und gut"),
        ("“curly” ﬁne \tx", "“curly” ﬁne \tx"),
        ("a &amp; b", "a &amp; b"),
    ],
)
def test_unicode(text, expected):
    assert apply(text_rules.Unicode(UnicodeStep()), text) == (expected, None)


def test_html_entities_on_demand_and_empty_documents():
    rule = text_rules.Unicode(UnicodeStep(unescape_html=True))
    assert apply(rule, "a &amp; b") == ("a & b", None)
    assert apply(rule, "\x00 \x01")[1] == "empty"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mail me@here.example.org, now", "mail email@example.com, now"),
        ("<a.b+c@x-y.co>;", "<email@example.com>;"),
        ("mailto:a@b.com", "mailto:email@example.com"),
        ("user@localhost and @handle", "user@localhost and @handle"),
        ("git@v1.2", "git@v1.2"),
        ("at 8.8.8.8.", "at 192.0.2.1."),
        ("8.8.8.8:53", "192.0.2.1:53"),
        ("version 1.2.3.4.5 and 10.0.0.1 and 999.1.1.1", None),
        ("at 2606:4700:4700::1111 ok", "at 2001:db8::1 ok"),
        ("std::vector ::1 12:30:45", None),
    ],
)
def test_masking(text, expected):
    rule = text_rules.Masking(MaskingStep())
    assert apply(rule, text) == (text if expected is None else expected, None)


def test_masking_beside_datatroves():
    text = "Ask bob@mail.org or eve@x.io, host 8.8.4.4 (not 127.0.0.1), see a@b.de."
    peer = PIIFormatter(email_replacement="email@example.com", ip_replacement="192.0.2.1")
    assert apply(text_rules.Masking(MaskingStep()), text)[0] == peer.format(text)


def test_language():
    pytest.importorskip("py3langid", reason="the language model is inside py3langid")
    rule = text_rules.Language(LanguageStep())
    english = "The reader will find in this chapter all that there is to say about the language."
    german = "Der Leser wird in diesem Kapitel alles finden, was über die Sprache zu sagen ist."
    assert apply(rule, english)[1] is None
    assert apply(rule, german)[1] == "language de"
    assert apply(text_rules.Language(LanguageStep(languages=("de", "en"))), german)[1] is None


def test_language_by_a_fasttext_file(tmp_path):
    fasttext = pytest.importorskip("fasttext", reason="needs fasttext")
    lines = [("en", "the cat and the dog are here")] * 40 + [("de", "der hund und die katze")] * 40
    data = tmp_path / "train.txt"
    data.write_text("".join(f"__label__{label} {text}\n" for label, text in lines))
    model = fasttext.train_supervised(str(data), epoch=50, lr=0.1, dim=8, bucket=1_000, thread=1)
    model.save_model(str(tmp_path / "lid.bin"))
    rule = text_rules.Language(LanguageStep(model=str(tmp_path / "lid.bin")))
    assert apply(rule, "the dog and the cat")[1] is None
    assert apply(rule, "die katze\nund der hund")[1] == "language de"
    with pytest.raises(UserError, match="no such file"):
        apply(text_rules.Language(LanguageStep(model=str(tmp_path / "no.bin"))), "x")


def test_lists(tmp_path):
    (tmp_path / "words").write_text("# comment\nBad Word\nnaïf\n", encoding="utf-8")
    (tmp_path / "hosts").write_text("evil.com\n")
    (tmp_path / "parts").write_text("casino\n")
    step = ListStep(
        blocked_words=str(tmp_path / "words"),
        blocked_domains=str(tmp_path / "hosts"),
        blocked_url_words=str(tmp_path / "parts"),
    )
    rule = text_rules.Lists(step)
    assert apply(rule, "a bad word, here")[1] == "blocked word"
    assert apply(rule, "NAÏF")[1] == "blocked word"
    assert apply(rule, "a bad wordsmith")[1] is None
    assert apply(rule, "x", url="https://www.evil.com/a")[1] == "blocked domain"
    assert apply(rule, "x", url="https://notevil.com/a")[1] is None
    assert apply(rule, "x", url="http://a.org/best-casino.html")[1] == "blocked word in address"
    with pytest.raises(UserError, match=r"lists\.blocked_words: .*missing cannot be read"):
        text_rules.Lists(ListStep(blocked_words=str(tmp_path / "missing")))


QUESTION = "What is the tallest of all the mountains that stand near the northern sea today"
SHORT = "name the four seas that touch old Norway"


@pytest.fixture
def index(tmp_path):
    sets = tmp_path / "sets"
    sets.mkdir()
    rows = [{"q": QUESTION, "choices": {"text": [SHORT, "yes"]}}, {"q": "too short to count"}]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (sets / "geo.jsonl.gz").write_bytes(gzip.compress(data))
    step = DecontaminationStep(path=str(sets))
    assert decontaminate.build_index(step, tmp_path / "index.npz") == {"geo.jsonl.gz": 2}
    return tmp_path / "index.npz"


def test_decontamination_finds_runs_of_words(index):
    rule = decontaminate.Decontaminate(DecontaminationStep(path="sets"), index)
    copied = f"He asked: {QUESTION.upper()}?\nNobody knew."
    assert apply(rule, copied)[1] == "holds text of geo.jsonl.gz"
    assert apply(rule, f"so {SHORT}, please")[1] == "holds text of geo.jsonl.gz"
    words = QUESTION.split()
    assert apply(rule, " ".join(words[:12]) + " but not more")[1] is None
    assert apply(rule, " ".join(words[2:15]))[1] is not None  # thirteen words of fifteen
    assert apply(rule, "yes, that is too short to count")[1] is None


def test_contaminated_passages_can_be_cut_out(index):
    step = DecontaminationStep(
        path="sets", action="cut", cut_characters=5, min_document_characters=20
    )
    rule = decontaminate.Decontaminate(step, index)
    text = f"A beginning that stays. 1234 {QUESTION} 5678 An end that stays too."
    assert apply(rule, text)[0] == "A beginning that stays.\n\nAn end that stays too."
    assert apply(rule, QUESTION)[1] == "too short after cutting"


def test_sets_that_are_missing_or_broken(tmp_path):
    with pytest.raises(UserError, match="no evaluation sets"):
        decontaminate.build_index(DecontaminationStep(path=str(tmp_path)), tmp_path / "i.npz")
    (tmp_path / "a.jsonl").write_text("{no\n")
    with pytest.raises(UserError, match=r"a\.jsonl: evaluation set cannot be read"):
        decontaminate.build_index(DecontaminationStep(path=str(tmp_path)), tmp_path / "i.npz")


def test_minhash_agreement_is_the_jaccard_similarity():
    step = MinHashStep(buckets=64, hashes_per_bucket=16)
    hasher = MinHasher(step)
    rng = np.random.default_rng(0)
    base = [f"w{i}" for i in rng.integers(0, 50_000, 400)]
    for changed in (0, 10, 40, 120):
        other = list(base)
        for i in rng.choice(400, changed, replace=False):
            other[i] = f"z{i}"
        a, b = (set(hasher.shingles(" ".join(words)).tolist()) for words in (base, other))
        similarity = len(a & b) / len(a | b)
        first, second = (hasher.signature(" ".join(words)) for words in (base, other))
        # 1,024 hash functions: three standard deviations are below 0.047.
        assert np.mean(first == second) == pytest.approx(similarity, abs=0.047)
    assert hasher.signature("...") is None

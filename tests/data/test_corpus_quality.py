"""Quality models: training, the file, classifiers, buckets."""

import json
import random
from pydoc_data.topics import topics

import numpy as np
import pytest
from corpus_config import make, write_jsonl

from danube_jax.data.corpus import quality, quality_trees
from danube_jax.data.corpus.config import QualityStep
from danube_jax.data.corpus.pipeline import prepare
from danube_jax.data.corpus.tokenizer_sample import read_documents
from danube_jax.errors import UserError

pytest.importorskip("lightgbm", reason="quality models need lightgbm")

GOOD = [t[i : i + 600] for t in topics.values() for i in range(0, len(t) - 600, 600)][:240]


def spoilt(text, seed):
    """A text whose words are shuffled and shouted."""
    rng = random.Random(seed)
    words = text.split()
    rng.shuffle(words)
    return " ".join(
        w.upper() if rng.random() < 0.3 else w + rng.choice(["!", "", "?"]) for w in words
    )


BAD = [spoilt(text, i) for i, text in enumerate(GOOD)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "quality.json"
    quality_trees.train(GOOD[:160], BAD[80:], rounds=40).save(path)
    return path


def test_a_model_tells_good_from_bad_and_reports_it(model):
    scorer = quality.load_scorer(QualityStep(model=str(model)))
    good, bad = scorer.score(GOOD[160:]), scorer.score(BAD[:80])
    assert np.mean(good > 0.5) > 0.9
    assert np.mean(bad < 0.5) > 0.9
    report = scorer.report
    assert report["roc_auc"] > 0.95
    assert report["heldout"] == {"good": 32, "bad": 32}
    recalls = [row[2] for row in report["precision_recall"]]
    assert recalls == sorted(recalls, reverse=True)
    assert sum(row[2] for row in report["calibration"]) == 64


def test_the_same_examples_give_the_same_file(model, tmp_path):
    quality_trees.train(GOOD[:160], BAD[80:], rounds=40).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == model.read_bytes()


def test_a_score_does_not_depend_on_its_batch(model):
    scorer = quality.load_scorer(QualityStep(model=str(model)))
    texts = [*GOOD[:5], *BAD[:5], "", "x"]
    alone = np.concatenate([scorer.score([text]) for text in texts])
    np.testing.assert_array_equal(scorer.score(texts), alone)


def test_report_numbers_by_hand():
    labels, scores = np.array([1, 1, 0, 0, 1]), np.array([0.92, 0.41, 0.43, 0.11, 0.77])
    report = quality_trees.evaluate(labels, scores, np.ones(5))
    assert report["roc_auc"] == pytest.approx(5 / 6, abs=1e-5)  # five of six pairs in order
    half = next(row for row in report["precision_recall"] if row[0] == 0.5)
    assert half == [0.5, 1.0, pytest.approx(2 / 3, abs=1e-4)]
    assert report["brier"] == pytest.approx(np.mean((scores - labels) ** 2), abs=1e-4)
    assert [0.42, 0.5, 2] in report["calibration"]


@pytest.mark.parametrize("content", ["{}", "no", '{"format": "danube_jax.quality_trees"}'])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "quality.json"
    path.write_text(content)
    with pytest.raises(UserError, match="not a quality model"):
        quality.load_scorer(QualityStep(model=str(path)))
    with pytest.raises(UserError, match="not a quality model"):
        quality.load_scorer(QualityStep(model=str(tmp_path / "missing.json")))


def test_buckets_become_stores(model, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", GOOD[160:] + BAD[:80])
    corpus = make(
        tmp_path / "out",
        {"a": path},
        heldout_fraction=0.1,
        steps__minhash__enabled=False,
        steps__quality__enabled=True,
        steps__quality__model=str(model),
        steps__quality__buckets=("high", "low"),
        steps__quality__thresholds=(0.5,),
        steps__quality__min_score=0.01,
    )
    statistics = prepare(corpus)
    rows = list(read_documents(tmp_path / "out" / "documents"))
    scores = np.array([row["metadata"]["quality"] for row in rows])
    assert (scores >= 0.01).all()
    stores = statistics.values["stores"]
    for name, count in (("a_high", (scores >= 0.5).sum()), ("a_low", (scores < 0.5).sum())):
        assert sum(row["documents"] for row in stores[name].values()) == count
    good = {row["text"] for row in rows if row["metadata"]["quality"] >= 0.5}
    assert len(good & set(GOOD)) > 0.9 * len(good)
    assert statistics.values["bucket_bounds"] == [0.5]


def test_a_model_is_trained_on_sources_where_the_config_says_so(tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", GOOD[:120])
    bad = write_jsonl(tmp_path / "bad.jsonl", BAD[:60])
    mixed = write_jsonl(tmp_path / "mixed.jsonl", GOOD[160:] + BAD[160:])
    corpus = make(
        tmp_path / "out",
        {"good": good, "bad": bad, "mixed": mixed},
        steps__minhash__enabled=False,
        steps__quality__enabled=True,
        steps__quality__good_sources=("good",),
        steps__quality__bad_sources=("bad",),
        steps__quality__train_documents=100,
    )
    prepare(corpus)
    report = json.loads((tmp_path / "out" / "quality.json").read_text())["report"]
    assert report["training"]["good"] + report["heldout"]["good"] == 100
    assert report["training"]["bad"] + report["heldout"]["bad"] == 60
    rows = [
        row
        for row in read_documents(tmp_path / "out" / "documents")
        if row["metadata"]["source"] == "mixed"
    ]
    right = [(row["metadata"]["quality"] >= 0.5) == (row["text"] in GOOD) for row in rows]
    assert len(right) == 160
    assert np.mean(right) > 0.85


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"quality\.model: '' is not possible; expected a model, or good_sources"),
        ({"good_sources": ("a",)}, r"quality\.model: '' is not possible"),
        ({"model": "m", "good_sources": ("a",), "bad_sources": ("a",)}, r"quality\.model: 'm'"),
        (
            {"good_sources": ("a",), "bad_sources": ("x",)},
            r"bad_sources: 'x' .* expected some of a",
        ),
    ],
)
def test_a_model_is_either_given_or_trained(tmp_path, changes, message):
    changes = {f"steps__quality__{key}": value for key, value in changes.items()}
    with pytest.raises(UserError, match=message):
        make(tmp_path, {"a": "a.jsonl"}, steps__quality__enabled=True, **changes)


def test_shares_divide_the_documents():
    scores = np.random.default_rng(0).permutation(100).astype(np.float32) / 100
    step = QualityStep(buckets=("high", "medium", "low"), shares=(0.2, 0.5))
    bounds = quality.bucket_bounds(step, scores)
    counts = {name: 0 for name in step.buckets}
    for score in scores:
        counts[quality.bucket_of(step, bounds, float(score) + 1e-6)] += 1
    assert abs(counts["high"] - 20) <= 1
    assert abs(counts["medium"] - 50) <= 1


@pytest.mark.parametrize("labels", [1, 3])
def test_a_classifier_scores_as_transformers_does(tmp_path, labels):
    torch = pytest.importorskip("torch", reason="classifiers need torch")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = sorted({word for text in GOOD[:20] for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=labels,
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    scorer = quality.load_scorer(QualityStep(model=str(tmp_path / "bert"), label=-1, max_tokens=64))
    texts = [GOOD[0], GOOD[1][:50], GOOD[2][:200]]
    for text, score in zip(texts, scorer.score(texts), strict=True):
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=64)
        logits = model(**inputs).logits[0].detach().double()
        expected = logits.sigmoid()[0] if labels == 1 else logits.softmax(0)[-1]
        assert score == pytest.approx(float(expected), abs=1e-5)  # float32, padded or not
    if labels == 3:
        path = write_jsonl(tmp_path / "a.jsonl", [GOOD[i][: 60 * (i + 1)] for i in range(7)])
        changes = {"enabled": True, "model": str(tmp_path / "bert"), "batch_size": 3}
        changes |= {"max_tokens": 64, "label": 0}
        changes = {f"steps__quality__{key}": value for key, value in changes.items()}
        prepare(make(tmp_path / "out", {"a": path}, steps__minhash__enabled=False, **changes))
        first = quality.load_scorer(
            QualityStep(model=str(tmp_path / "bert"), label=0, max_tokens=64)
        )
        rows = list(read_documents(tmp_path / "out" / "documents"))
        assert len(rows) == 7
        for row in rows:  # written with four digits
            (expected,) = first.score([row["text"]])
            assert row["metadata"]["quality"] == pytest.approx(float(expected), abs=6e-5)
        with pytest.raises(UserError, match=r"quality\.label: 3 is not possible"):
            quality.load_scorer(QualityStep(model=str(tmp_path / "bert"), label=3))


def test_model_files_hold_no_code(model):
    assert set(json.loads(model.read_text())) == {
        *("format", "version", "statistics", "hash_bits", "report", "trees", "sha256")
    }

"""Gradient-boosted trees over cheap text statistics and hashed word n-grams.

A model is one JSON file: settings, LightGBM's own text form of the trees, and the report of its
training. Nothing in it is executed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from danube_jax import files
from danube_jax.data.corpus import words
from danube_jax.data.corpus.heuristics import LINE_ENDS, STOP_WORDS, covered_characters, repeated
from danube_jax.errors import UserError
from danube_jax.untrusted import parse_json

FORMAT = "danube_jax.quality_trees"
FORMAT_VERSION = 2
HASH_BITS = 12
SAMPLE_CHARACTERS = 20_000  # a document is judged by its beginning
STATISTICS = (
    *("log_characters", "words_per_character", "mean_word_length", "sd_word_length"),
    *("symbol_words", "alphabetic_words", "different_words", "stop_words", "upper_characters"),
    *("digit_characters", "space_characters", "newlines_per_word", "mean_line", "short_lines"),
    *("punctuated_lines", "bullet_lines", "repeated_line_characters", "covered_5_grams"),
    *("commas_per_word", "full_stops_per_word", "questions_per_word", "quotes_per_word"),
    *("brackets_per_word", "ellipses_per_word", "non_ascii_characters", "first_person"),
)


def statistics_of(text: str) -> list[float]:
    """The numbers that `STATISTICS` names, of a text with at least one word."""
    found = words.split(text)
    count, size = max(1, len(found)), max(1, len(text))
    lengths = found.lengths_W[~found.is_symbol_W]
    lines = [line for line in text.split("\n") if line.strip()] or [""]
    hashes = found.hashes_W
    stop = sum(int(np.count_nonzero(hashes == words.hash_of(word))) for word in STOP_WORDS)
    first = sum(int(np.count_nonzero(hashes == words.hash_of(w))) for w in ("I", "me", "my", "we"))
    marks = [text.count(mark) / count for mark in (",", ".", "?")]
    quotes = sum(text.count(mark) for mark in '"“”') / count
    brackets = sum(text.count(mark) for mark in "()[]{}<>") / count
    return [
        float(np.log(size)),
        count / size,
        float(lengths.mean()) if len(lengths) else 0.0,
        float(lengths.std()) if len(lengths) else 0.0,
        float(found.is_symbol_W.mean()) if len(found) else 0.0,
        float(found.has_letter_W.mean()) if len(found) else 0.0,
        len(np.unique(hashes)) / count,
        stop / count,
        sum(map(str.isupper, text)) / size,
        sum(map(str.isdigit, text)) / size,
        sum(map(str.isspace, text)) / size,
        text.count("\n") / count,
        sum(map(len, lines)) / len(lines),
        sum(len(line) <= 30 for line in lines) / len(lines),
        sum(line.rstrip().endswith(LINE_ENDS) for line in lines) / len(lines),
        sum(line.lstrip().startswith(("-", "•", "*")) for line in lines) / len(lines),
        repeated(lines)[1] / size,
        covered_characters(found, 5) / size,
        *marks,
        quotes,
        brackets,
        (text.count("...") + text.count("…")) / count,
        0.0 if text.isascii() else sum(ord(c) > 127 for c in text) / size,
        first / count,
    ]


def features(texts: Sequence[str]) -> sparse.csr_matrix:
    """float32 [texts, len(STATISTICS) + 2^HASH_BITS]: statistics, then shares of hashed n-grams.

    The n-grams are words in lower case and pairs of them.
    """
    width = 2**HASH_BITS
    dense = np.zeros((len(texts), len(STATISTICS)), np.float32)
    columns, values, ends = [], [], [0]
    for i, whole in enumerate(texts):
        text = whole[:SAMPLE_CHARACTERS]
        dense[i] = statistics_of(text)
        hashes_W = words.plain_words(text).hashes_W
        grams = np.concatenate([hashes_W, words.ngrams(hashes_W, 2)])
        column, count = np.unique(grams >> np.uint64(64 - HASH_BITS), return_counts=True)
        columns.append(column.astype(np.int64))
        values.append((count / max(1, len(grams))).astype(np.float32))
        ends.append(ends[-1] + len(column))
    hashed = sparse.csr_matrix(
        (
            np.concatenate([*values, np.zeros(0, np.float32)]),
            np.concatenate([*columns, np.zeros(0, np.int64)]),
            ends,
        ),
        shape=(len(texts), width),
    )
    return sparse.hstack([sparse.csr_matrix(dense), hashed], format="csr", dtype=np.float32)


class TreesScorer:
    """A trained model."""

    def __init__(self, trees: str, report: dict[str, Any]):
        self._trees, self.report = trees, report
        self._booster = _lightgbm().Booster(model_str=trees)

    @classmethod
    def load(cls, path: Path) -> "TreesScorer":
        """Reads a model file.

        Raises:
          UserError: missing, damaged, or something else.
        """
        try:
            saved = parse_json(Path(path).read_bytes())
            if saved["format"] != FORMAT or saved["version"] != FORMAT_VERSION:
                raise ValueError(f"format {saved['format']!r}, version {saved['version']!r}")
            if saved["statistics"] != list(STATISTICS) or saved["hash_bits"] != HASH_BITS:
                raise ValueError("made for other features")
            if saved["sha256"] != files.sha256_json([saved["trees"], saved["report"]]):
                raise ValueError("damaged: its checksum differs")
            return cls(saved["trees"], saved["report"])
        except (OSError, ValueError, KeyError, TypeError, _lightgbm().basic.LightGBMError) as error:
            raise UserError(
                f"{path}: not a quality model ({error}); expected a file of "
                "tools/train_quality_model.py, or a classifier's folder"
            ) from None

    def save(self, path: Path) -> None:
        """Writes the model as one file."""
        files.write_json(
            path,
            {
                "format": FORMAT,
                "version": FORMAT_VERSION,
                "statistics": list(STATISTICS),
                "hash_bits": HASH_BITS,
                "report": self.report,
                "trees": self._trees,
                "sha256": files.sha256_json([self._trees, self.report]),
            },
        )

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """float64 [texts]: the probability that a text is a good one."""
        return np.asarray(self._booster.predict(features(texts), num_threads=1), np.float64)


def train(
    good: Sequence[str],
    bad: Sequence[str],
    *,
    heldout_fraction: float = 0.2,
    rounds: int = 200,
    seed: int = 0,
) -> TreesScorer:
    """Trains on examples; a part of them is held out and only reported on.

    Both kinds weigh the same, whatever their numbers, so a score of 0.5 means "as likely one as
    the other" among equally many. The same examples give the same model.

    Args:
      good, bad: texts.
      heldout_fraction: share of each kind that is only reported on.
      rounds: trees.
      seed: of the split.

    Raises:
      UserError: fewer than ten examples of a kind.
    """
    for name, texts in (("good", good), ("bad", bad)):
        if len(texts) < 10:
            raise UserError(f"{len(texts)} {name} examples; expected ten at least")
    lightgbm = _lightgbm()
    random = np.random.Generator(np.random.PCG64(seed))
    labels = np.concatenate([np.ones(len(good)), np.zeros(len(bad))])
    heldout = np.zeros(len(labels), bool)
    for kind in (0, 1):
        places = random.permutation(np.flatnonzero(labels == kind))
        heldout[places[: max(2, round(heldout_fraction * len(places)))]] = True
    matrix = features([*good, *bad])
    weights = np.where(labels == 1, 0.5 / labels.mean(), 0.5 / (1 - labels.mean()))
    booster = lightgbm.train(
        {
            "objective": "binary",
            "learning_rate": 0.05,
            "num_leaves": 31,
            "min_data_in_leaf": max(2, min(20, int((~heldout).sum() // 50))),
            "feature_fraction": 0.5,
            "lambda_l2": 1.0,
            "seed": seed,
            "deterministic": True,
            "force_row_wise": True,
            "num_threads": 1,
            "verbosity": -1,
        },
        lightgbm.Dataset(matrix[~heldout], labels[~heldout], weight=weights[~heldout]),
        num_boost_round=rounds,
    )
    scores = booster.predict(matrix[heldout], num_threads=1)
    report = evaluate(labels[heldout], scores, weights[heldout])
    report["training"] = {"good": int(labels[~heldout].sum()), "trees": rounds, "seed": seed}
    report["training"]["bad"] = int((~heldout).sum()) - report["training"]["good"]
    gains = booster.feature_importance("gain")
    best = [i for i in np.argsort(-gains)[:12].tolist() if gains[i] > 0]
    report["most_used"] = [
        [STATISTICS[i] if i < len(STATISTICS) else "hashed words", round(float(gains[i]), 2)]
        for i in best
    ]
    return TreesScorer(booster.model_to_string(), report)


def evaluate(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """How well scores tell good from bad, and whether they are probabilities.

    Args:
      labels: [N] 1 for good, 0 for bad.
      scores: [N] from 0 to 1.
      weights: [N].

    Returns:
      "roc_auc"; "precision_recall", a row a threshold: threshold, precision, recall;
      "calibration", a row a tenth of the scores: mean score, share of good ones, number;
      "calibration_error", the mean of their distances; "brier"; counts.
    """
    from scipy.stats import mannwhitneyu

    rows = []
    for threshold in np.arange(0.05, 1.0, 0.05):
        chosen = scores >= threshold
        good = weights[chosen & (labels == 1)].sum()
        precision = good / weights[chosen].sum() if chosen.any() else 1.0
        recall = good / weights[labels == 1].sum()
        rows.append([round(float(x), 4) for x in (threshold, precision, recall)])
    bins, calibration, error = np.minimum(9, (scores * 10).astype(int)), [], 0.0
    for i in range(10):
        inside = bins == i
        if inside.any():
            mean = float(np.average(scores[inside], weights=weights[inside]))
            share = float(np.average(labels[inside], weights=weights[inside]))
            calibration.append([round(mean, 4), round(share, 4), int(inside.sum())])
            error += abs(mean - share) * weights[inside].sum() / weights.sum()
    # Weights of a kind are alike, so the area is the chance that a good one scores above a bad one.
    good, bad = scores[labels == 1], scores[labels == 0]
    area = mannwhitneyu(good, bad).statistic / (len(good) * len(bad))
    return {
        "roc_auc": round(float(area), 5),
        "precision_recall": rows,
        "calibration": calibration,
        "calibration_error": round(float(error), 4),
        "brier": round(float(np.average((scores - labels) ** 2, weights=weights)), 4),
        "heldout": {"good": int(labels.sum()), "bad": int(len(labels) - labels.sum())},
    }


def _lightgbm() -> Any:
    try:
        import lightgbm
    except ImportError:
        raise UserError("quality models need the package lightgbm: pip install lightgbm") from None
    except OSError as error:  # its library needs the system's OpenMP
        raise UserError(
            f"quality models need LightGBM, which cannot be loaded ({error}); install the system's "
            "OpenMP (libgomp1 on Debian, libomp on macOS)"
        ) from None
    return lightgbm

"""Quality scores: applying a model to documents, and dividing documents by score."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.batching import batched

from danube_jax.data.corpus.config import QualityStep
from danube_jax.data.corpus.rule import SOURCE
from danube_jax.data.corpus.tally import Tally, utf8_size
from danube_jax.errors import UserError

SCORE = "quality"  # key of a document's metadata


class Scorer(Protocol):
    """Rates texts."""

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """float64 [texts], from 0 (bad) to 1 (good)."""


class ClassifierScorer:
    """A transformers sequence classifier: the probability of one of its classes.

    A model with a single output is a regression; its sigmoid is the score.
    """

    def __init__(self, folder: str, label: int = -1, max_tokens: int = 512):
        """Loads the model and its tokenizer, on a GPU where there is one.

        Raises:
          UserError: PyTorch is missing, or the folder holds no sequence classifier.
        """
        try:
            import torch
            from transformers import AutoModelForSequenceClassification, AutoTokenizer
        except ImportError:
            raise UserError(
                f"{folder}: a classifier needs PyTorch: pip install 'danube-jax[hf]'"
            ) from None
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            self._model = AutoModelForSequenceClassification.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            ).eval()
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{folder}: not a sequence classifier ({reason})") from None
        self._torch, self._max_tokens = torch, max_tokens
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model.to(self._device)
        labels = self._model.config.num_labels
        if not -labels <= label < labels:
            raise UserError(
                f"config.steps.quality.label: {label} is not possible; the classifier has {labels}"
            )
        self._label = label

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """float64 [texts]: probabilities of the class."""
        with self._torch.inference_mode():
            batch = self._tokenizer(
                list(texts),
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=self._max_tokens,
            ).to(self._device)
            logits = self._model(**batch).logits.double()
            if logits.shape[1] == 1:
                out = logits[:, 0].sigmoid()
            else:
                out = logits.softmax(dim=1)[:, self._label]
            return out.cpu().numpy()


def load_scorer(step: QualityStep) -> Scorer:
    """The scorer of a folder (a classifier) or of a file (gradient-boosted trees).

    Raises:
      UserError: there is nothing, or something else.
    """
    path = Path(step.model)
    if path.is_dir():
        return ClassifierScorer(step.model, step.label, step.max_tokens)
    from danube_jax.data.corpus.quality_trees import TreesScorer

    return TreesScorer.load(path)


class Score(PipelineStep):
    """Writes a score into every document, and removes the low ones.

    Texts are scored in batches; a score does not depend on what else is in the batch beyond
    rounding, and is written with four digits.
    """

    type, name, key = "⚖ - SCORE", "quality", "quality"

    def __init__(self, step: QualityStep, tally: Tally, exclusion_writer=None):
        super().__init__()
        self.step, self.tally = step, tally
        self.exclusion_writer = exclusion_writer

    def run(self, data, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        scorer = load_scorer(self.step)
        for batch in batched(data, self.step.batch_size):
            begin = time.process_time()
            scores = scorer.score([document.text for document in batch])
            seconds = (time.process_time() - begin) / len(batch)
            for document, value in zip(batch, scores, strict=True):
                score = round(float(value), 4)
                source, size = document.metadata[SOURCE], utf8_size(document.text)
                document.metadata[SCORE] = score
                self.tally.score(source, "quality", score)
                keep = score >= self.step.min_score
                after = size if keep else None
                self.tally.add(source, self.key, size, after, seconds, "low score")
                if keep:
                    self.tally.sample(
                        source,
                        self.key,
                        f"score {int(score * 5) / 5:.1f} and up",
                        document.id,
                        document.text,
                    )
                    yield document
                    continue
                self.tally.sample(source, self.key, "low score", document.id, document.text)
                if self.exclusion_writer:
                    document.metadata["filter_reason"] = "quality: low score"
                    self.exclusion_writer.write(document, rank)


def bucket_bounds(step: QualityStep, scores: np.ndarray) -> tuple[float, ...]:
    """Falling lower bounds of the buckets but the last, from thresholds or from all scores.

    Args:
      step: the settings.
      scores: float32 [documents], of all that were kept.
    """
    if step.thresholds or not step.buckets:
        return step.thresholds
    if not len(scores):
        return (0.0,) * len(step.shares)
    points = 1 - np.cumsum(step.shares)
    bounds = np.quantile(scores, points, method="inverted_cdf")
    return tuple(round(float(bound), 4) for bound in bounds)


def bucket_of(step: QualityStep, bounds: Sequence[float], score: float) -> str:
    """The name of a score's bucket."""
    for name, bound in zip(step.buckets, bounds, strict=False):
        if score >= bound:
            return name
    return step.buckets[-1]

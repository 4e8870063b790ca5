"""What generation gives back, and how drawn tokens become it."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from danube_jax.inference.programs import NO_TOKEN, Drawn
from danube_jax.inference.sampling import SamplingConfig
from danube_jax.inference.text import Decodes, Detokenizer, StopStrings

TopLogprobs = tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Completion:
    """A continuation of a prompt.

    Attributes:
      tokens: the new tokens, without the stop token; where a stop string ended it, up to the token
        that completed the string.
      text: what they add to the text of the prompt, up to the stop string; None without tokenizer.
      finish_reason: 'stop' (a stop token or string) or 'length' (max_tokens).
      token_logprobs: log-probability of each token under the model itself, before penalty,
        temperature and filters; None where not asked for.
      top_logprobs: for each token the likeliest ones, as (id, log-probability), best first.
    """

    tokens: tuple[int, ...]
    text: str | None
    finish_reason: str
    token_logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[TopLogprobs, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of a stream; the pieces of all chunks joined make a `Completion`.

    Attributes:
      text: whole characters that belong to no stop string; may be empty.
      tokens: the tokens of this piece, whose text may come later.
      finish_reason: None until the last chunk.
      token_logprobs, top_logprobs: of `tokens`; None where not asked for.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str | None
    token_logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[TopLogprobs, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Score:
    """How a model rates a sequence of T tokens.

    Attributes:
      logprobs: float32 [T - 1], log-probability of each token but the first, given those before.
      likeliest: bool [T - 1], whether the token was the model's first choice.
    """

    logprobs: np.ndarray
    likeliest: np.ndarray


class Writer:
    """Takes the tokens of one row as they are drawn; knows when it ends, and why."""

    def __init__(self, tokenizer: Decodes | None, prompt: Sequence[int], sampling: SamplingConfig):
        self._sampling = sampling
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, prompt)
        self._stops = StopStrings(sampling.stop_strings)
        self._chunks: list[Chunk] = []
        self._count = 0
        self._reason: str | None = None

    @property
    def finished(self) -> bool:
        return self._reason is not None

    def push(self, block: Drawn, row: int) -> Chunk:
        """Takes the row's part of a block."""
        tokens, text = [], ""
        for token in block.tokens[row].tolist():
            if self.finished or token == NO_TOKEN:
                break
            if token in self._sampling.stop_tokens:
                self._reason = "stop"
                break
            tokens.append(token)
            self._count += 1
            if self._sampling.stop_strings:  # which token completes it, must be known
                text += self._stops.push(self._detokenizer.push([token]))
                if self._stops.stopped:
                    self._reason = "stop"
            if self._count == self._sampling.max_tokens and not self.finished:
                self._reason = "length"
        if self._detokenizer is not None:
            if not self._sampling.stop_strings and tokens:
                text = self._detokenizer.push(tokens)
            if self.finished and not self._stops.stopped:
                text += self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        logprobs = top = None
        if block.logprobs is not None:
            count = len(tokens)
            logprobs = tuple(block.logprobs[row, :count].tolist())
            top = tuple(
                tuple(zip(ids, values, strict=True))
                for ids, values in zip(
                    block.top_tokens[row, :count].tolist(),
                    block.top_logprobs[row, :count].tolist(),
                    strict=True,
                )
            )
        chunk = Chunk(text, tuple(tokens), self._reason, logprobs, top)
        self._chunks.append(chunk)
        return chunk

    def completion(self) -> Completion:
        """Everything the row has taken."""
        has_logprobs = self._sampling.logprobs > 0
        return Completion(
            tokens=sum((c.tokens for c in self._chunks), ()),
            text=None if self._detokenizer is None else "".join(c.text for c in self._chunks),
            finish_reason=self._reason,
            token_logprobs=sum((c.token_logprobs for c in self._chunks), ())
            if has_logprobs
            else None,
            top_logprobs=sum((c.top_logprobs for c in self._chunks), ()) if has_logprobs else None,
        )

"""Text generation: `Generator` takes token ids and gives completions, streams, and scores.

Prompts are fed in chunks (prefill), then a compiled loop draws token after token (`programs.py`);
`buckets.py` says which shapes exist, `sampling.py` how a token is drawn, and `text.py` how tokens
become text.

Shape suffixes: B rows, T tokens of a row, V vocabulary.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from danube_jax.config import ModelConfig
from danube_jax.errors import UserError
from danube_jax.inference import programs
from danube_jax.inference.buckets import (
    CHUNK_TOKENS,
    CPU_DISPATCH_TOKENS,
    DISPATCH_TOKENS,
    PrefillPlan,
    plan_prefill,
    prefill_bucket,
    ring_slots,
    rows_bucket,
    slots_bucket,
)
from danube_jax.inference.completion import Chunk, Completion, Score, Writer
from danube_jax.inference.programs import NO_TOKEN, Drawn, Rows
from danube_jax.inference.sampling import SamplingConfig, SamplingPlan, SamplingValues
from danube_jax.inference.text import Decodes
from danube_jax.models.decoder import Decoder, Params
from danube_jax.models.kv_cache import KVCache, init_cache

STREAM_TOKENS = 8  # drawn by a dispatch while text is watched
MAX_BATCH = 32


@dataclasses.dataclass
class _Session:
    """A batch between dispatches.

    Attributes:
      rows, cache: its state.
      first: its first tokens.
      end: time after the last chunk of its prefill.
      time: the latest time that its token drawn last can have.
    """

    rows: Rows
    cache: KVCache
    first: Drawn
    end: int
    time: int


@dataclasses.dataclass
class _Kept:
    """The cache of the last stream: `tokens` have entered it, and slots are written up to `end`."""

    tokens: list[int]
    end: int
    cache: KVCache


class Generator:
    """Continues and scores token sequences with one model.

    Nothing runs in reduced precision unless asked for by `dtype`: linear layers compute in it,
    too, whatever the model was trained with.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        tokenizer: Decodes | None = None,
        dtype: jnp.dtype = jnp.float32,
        cache_dtype: jnp.dtype | None = None,
        max_batch: int = MAX_BATCH,
        chunk_tokens: int = CHUNK_TOKENS,
    ):
        """Prepares the weights.

        Args:
          config: the model; how it was trained (remat, attention backend) does not matter.
          params: its parameters, in any float dtype.
          tokenizer: gives completions their text; needed for streams and stop strings.
          dtype: of weights and activations.
          cache_dtype: of keys and values; None means `dtype`.
          max_batch: most rows that are decoded at once; more prompts are taken in turns.
          chunk_tokens: most tokens of a prompt that are fed at once.
        """
        if max_batch < 1 or chunk_tokens < 1:
            raise UserError(
                f"max_batch={max_batch}, chunk_tokens={chunk_tokens}: expected positive numbers"
            )
        self.config, self.tokenizer, self.max_batch = config, tokenizer, max_batch
        self._on_cpu = jax.default_backend() == "cpu"
        self._chunk_tokens = chunk_tokens
        self._cache_dtype = jnp.dtype(dtype if cache_dtype is None else cache_dtype)
        run_config = dataclasses.replace(config, remat="none", attention_backend="auto")
        if config.tie_word_embeddings and self._on_cpu:
            # XLA:CPU multiplies by the transpose of the embedding at half its speed.
            run_config = dataclasses.replace(run_config, tie_word_embeddings=False)
            params = {**params, "lm_head": {"kernel": params["embed_tokens"]["embedding"].T}}
        self._decoder = Decoder(run_config, jnp.dtype(dtype))
        # Norm scales, the only vectors, cost nothing and enter in float32.
        self._params = jax.tree.map(
            lambda x: jnp.asarray(x, dtype if x.ndim > 1 else x.dtype), params
        )
        self._kept: _Kept | None = None

    @property
    def decoder(self) -> Decoder:
        """The decoder that takes `params`."""
        return self._decoder

    @property
    def params(self) -> Params:
        """The weights as they are computed with."""
        return self._params

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig | None = None
    ) -> list[list[Completion]]:
        """Continues each prompt.

        What a prompt is continued with does not depend on the other prompts, but for rounding.
        Random draws depend on the seed, the prompt's place in the list, and the sample's number.

        Args:
          prompts: one non-empty list of token ids each.
          sampling: how; None means `SamplingConfig()`.

        Returns:
          Completions, [prompt][sample].

        Raises:
          UserError: a prompt is empty or holds an impossible token, a prompt and `max_tokens` do
            not fit into the model's context, or stop strings are given without a tokenizer.
        """
        sampling = SamplingConfig() if sampling is None else sampling
        self._check(prompts, sampling)
        completions: list[list[Completion]] = [[] for _ in prompts]
        if sampling.max_tokens == 0:
            empty = () if sampling.logprobs else None
            text = None if self.tokenizer is None else ""
            done = Completion((), text, "length", empty, empty)
            return [[done] * sampling.num_samples for _ in prompts]
        # Prompts of like length share a batch.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        group = max(1, self.max_batch // sampling.num_samples)
        for first in range(0, len(order), group):
            indices = order[first : first + group]
            for index, found in zip(
                indices,
                self._complete([prompts[i] for i in indices], indices, sampling),
                strict=True,
            ):
                completions[index] = found
        return completions

    def stream(
        self, prompt: Sequence[int], sampling: SamplingConfig | None = None
    ) -> Iterator[Chunk]:
        """Continues one prompt, piece by piece, as `generate` would.

        The keys and values of the last stream are kept: a prompt that begins with the tokens of
        the one before, as a chat's does, is fed from where they differ.

        Raises:
          UserError: as `generate`; also without a tokenizer, or for several samples.
        """
        sampling = SamplingConfig() if sampling is None else sampling
        self._check([prompt], sampling)
        if self.tokenizer is None:
            raise UserError("a stream of text needs a tokenizer")
        if sampling.num_samples != 1:
            raise UserError(f"num_samples: a stream has one, not {sampling.num_samples}")
        return self._stream(list(prompt), sampling)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Score]:
        """Log-probabilities of the tokens of each sequence, given those before.

        Raises:
          UserError: a sequence is empty, holds an impossible token, or exceeds the context.
        """
        self._check(sequences, SamplingConfig(max_tokens=0))
        scores: list[Score | None] = [None] * len(sequences)
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        while order:
            length = prefill_bucket(len(sequences[order[-1]]))
            rows = min(self.max_batch, max(1, 2 * DISPATCH_TOKENS // length), len(order))
            indices, order = order[-rows:], order[:-rows]
            tokens_BT = np.zeros((rows_bucket(rows), length), np.int32)
            for row, index in enumerate(indices):
                tokens_BT[row, : len(sequences[index])] = sequences[index]
            logprobs_BT, likeliest_BT = jax.device_get(
                programs.score_rows(self._decoder, self._params, tokens_BT)
            )
            for row, index in enumerate(indices):
                end = len(sequences[index]) - 1
                scores[index] = Score(logprobs_BT[row, :end], likeliest_BT[row, :end])
        return scores

    def _complete(
        self, prompts: list[Sequence[int]], indices: list[int], sampling: SamplingConfig
    ) -> list[list[Completion]]:
        """Completions of one batch; `indices` are the prompts' places in the user's list."""
        session = self._start(prompts, indices, sampling)
        writers = [
            Writer(self.tokenizer, prompt, sampling)
            for prompt in prompts
            for _ in range(sampling.num_samples)
        ]
        for block in self._blocks(session, sampling, writers):
            for row, writer in enumerate(writers):
                if not writer.finished:
                    writer.push(block, row)
        found = [writer.completion() for writer in writers]
        return [
            found[i : i + sampling.num_samples] for i in range(0, len(found), sampling.num_samples)
        ]

    def _stream(self, prompt: list[int], sampling: SamplingConfig) -> Iterator[Chunk]:
        if sampling.max_tokens == 0:
            yield Chunk("", (), "length", *(((), ()) if sampling.logprobs else (None, None)))
            return
        kept, self._kept = self._kept, None
        session = self._start([prompt], [0], sampling, kept)
        writer = Writer(self.tokenizer, prompt, sampling)
        drawn: list[int] = []
        blocks = self._blocks(session, sampling, [writer], drawn)
        try:
            for block in blocks:
                yield writer.push(block, 0)
                if writer.finished:
                    break
        finally:
            blocks.close()
            entered = (prompt + drawn)[:-1]
            self._kept = _Kept(entered, max(session.end, len(entered)), session.cache)

    def _start(
        self,
        prompts: list[Sequence[int]],
        indices: list[int],
        sampling: SamplingConfig,
        kept: _Kept | None = None,
    ) -> _Session:
        """Feeds the prompts and draws the first tokens."""
        copies, length = sampling.num_samples, max(map(len, prompts))
        start, cache = 0, None
        if kept is not None:
            start, cache = self._reuse(kept, prompts[0], sampling.max_tokens)
        batch = rows_bucket(len(prompts))
        plan = self._plan(start, length, sampling.max_tokens, batch)
        if cache is not None and cache.slots < plan.slots:
            cache = programs.grow_cache(cache, plan.slots)

        padding_B = np.zeros(batch, np.int32)
        tokens_BT = np.zeros((batch, plan.end), np.int32)
        for row, prompt in enumerate(prompts):
            padding_B[row] = length - len(prompt)
            tokens_BT[row, padding_B[row] : length] = prompt
        parts = [
            self._prefill(tokens_BT[rows], padding_B[rows], length, plan, cache)
            for rows in (slice(row, row + plan.rows) for row in range(0, batch, plan.rows))
        ]
        h_BD, cache = parts[0] if len(parts) == 1 else programs.join_rows(parts)
        if copies > 1:
            h_BD, cache = programs.repeat_rows(h_BD, cache, copies)
        real = [
            (prompt, index, copy)
            for prompt, index in zip(prompts, indices, strict=True)
            for copy in range(copies)
        ]
        rows = self._first_rows(real, np.repeat(padding_B, copies), length, sampling)
        rows, first_drawn = programs.draw_first(
            self._decoder,
            SamplingPlan.of(sampling),
            self._params,
            SamplingValues.of(sampling),
            h_BD,
            rows,
        )
        return _Session(rows, cache, first_drawn, plan.end, length)

    def _plan(self, start: int, length: int, max_tokens: int, rows: int) -> PrefillPlan:
        return plan_prefill(
            start,
            length,
            max_tokens,
            rows=rows,
            sliding_window=self.config.sliding_window,
            chunk_tokens=self._chunk_tokens,
            dispatch_tokens=CPU_DISPATCH_TOKENS if self._on_cpu else DISPATCH_TOKENS,
        )

    def _prefill(
        self,
        tokens_BT: np.ndarray,
        padding_B: np.ndarray,
        length: int,
        plan: PrefillPlan,
        cache: KVCache | None,
    ) -> tuple[jax.Array, KVCache]:
        """States [B, D] of the last of `length` tokens of each row, and the cache."""
        if cache is None:
            cache = init_cache(self.config, len(tokens_BT), plan.slots, self._cache_dtype)
        for first, size in plan.chunks:
            h_BD, cache = programs.prefill(
                self._decoder,
                self._params,
                tokens_BT[:, first : first + size],
                cache,
                np.int32(first),
                padding_B if padding_B.any() else None,
                np.int32(min(length - first, size) - 1),
                fresh=first == 0,
            )
        return h_BD, cache

    def _first_rows(
        self,
        real: list[tuple[Sequence[int], int, int]],
        padding_B: np.ndarray,
        length: int,
        sampling: SamplingConfig,
    ) -> Rows:
        """The rows before their first draw; those beyond `real` fill up the batch."""
        batch = len(padding_B)
        key = jax.random.key(sampling.seed)
        places = np.zeros((batch, 2), np.uint32)
        places[: len(real)] = [(index, copy) for _, index, copy in real]
        keys_B = jax.vmap(lambda p: jax.random.fold_in(jax.random.fold_in(key, p[0]), p[1]))(places)
        seen_BV = None
        if sampling.repetition_penalty != 1:
            seen_BV = np.zeros((batch, self.config.vocab_size), bool)
            for row, (prompt, _, _) in enumerate(real):
                seen_BV[row, np.asarray(prompt)] = True
        stop_tokens = np.full(rows_bucket(max(4, len(sampling.stop_tokens))), NO_TOKEN, np.int32)
        stop_tokens[: len(sampling.stop_tokens)] = sampling.stop_tokens
        rows = Rows(
            token_B=np.zeros(batch, np.int32),
            time=np.int32(length),
            padding_B=padding_B,
            done_B=np.arange(batch) >= len(real),
            keys_B=keys_B,
            seen_BV=seen_BV,
            stop_tokens=stop_tokens,
        )
        return jax.tree.map(jnp.asarray, rows)

    def _blocks(
        self,
        session: _Session,
        sampling: SamplingConfig,
        writers: list[Writer],
        drawn: list[int] | None = None,
    ) -> Iterator[Drawn]:
        """Blocks of drawn tokens as NumPy arrays, the next being computed meanwhile.

        `writers` may stop rows between blocks. `drawn` gathers the tokens of the first row,
        also those that were computed in vain.
        """
        plan, values = SamplingPlan.of(sampling), SamplingValues.of(sampling)
        watched = drawn is not None or bool(sampling.stop_strings)
        most = STREAM_TOKENS if watched else programs.BLOCK_TOKENS
        remaining, pending = sampling.max_tokens - 1, session.first

        def fetch() -> Drawn:
            block = jax.device_get(pending)
            if drawn is not None:
                drawn.extend(int(token) for token in block.tokens[0] if token != NO_TOKEN)
            return block

        try:
            while pending is not None:
                ahead = None
                if remaining > 0 and not all(writer.finished for writer in writers):
                    limit = min(most, remaining)
                    remaining -= limit
                    self._make_room(session, limit)
                    session.rows, session.cache, ahead = programs.advance(
                        self._decoder,
                        plan,
                        self._params,
                        values,
                        session.rows,
                        session.cache,
                        np.int32(limit),
                    )
                block, pending = fetch(), ahead
                yield block
                if sampling.stop_strings:
                    finished = [writer.finished for writer in writers]
                    finished += [True] * (len(session.rows.done_B) - len(writers))
                    done_B = session.rows.done_B | np.array(finished)
                    session.rows = session.rows.replace(done_B=done_B)
        finally:
            if pending is not None:
                fetch()

    def _make_room(self, session: _Session, new_tokens: int) -> None:
        """Grows the cache where the next tokens would come round to its first slot too early."""
        session.time += new_tokens
        slots = slots_bucket(session.time)
        ring = ring_slots(self.config.sliding_window, self._chunk_tokens)
        if ring is not None:
            slots = min(slots, ring)
        if session.cache.slots < slots:
            session.cache = programs.grow_cache(session.cache, slots)

    def _reuse(
        self, kept: _Kept, prompt: Sequence[int], max_tokens: int
    ) -> tuple[int, KVCache | None]:
        """How many of the prompt's tokens the kept cache can stand for, and that cache."""
        # The last token must be fed in any case, for its state.
        longest = min(len(kept.tokens), len(prompt) - 1)
        same = next((i for i in range(longest) if kept.tokens[i] != prompt[i]), longest)
        slots, window = kept.cache.slots, self.config.sliding_window
        if same == 0:
            return 0, None
        if window is None:
            return same, kept.cache
        overwritten = kept.end - slots  # times before this one
        wanted = self._plan(same, len(prompt), max_tokens, 1).slots
        if overwritten > 0 and (slots < wanted or overwritten > same - window):
            return 0, None
        return same, kept.cache

    def _check(self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig) -> None:
        context, vocabulary = self.config.max_position_embeddings, self.config.vocab_size
        if sampling.stop_strings and self.tokenizer is None:
            raise UserError("stop_strings: they need a tokenizer")
        if sampling.logprobs > vocabulary:
            raise UserError(f"logprobs: expected at most {vocabulary}, got {sampling.logprobs}")
        for place, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise UserError(f"prompt {place} is empty; it needs at least one token")
            if len(prompt) + sampling.max_tokens > context:
                raise UserError(
                    f"prompt {place} of {len(prompt)} tokens and {sampling.max_tokens} new ones "
                    f"exceed the model's context of {context}; shorten the prompt or lower "
                    "max_tokens"
                )
            strange = [token for token in prompt if not 0 <= token < vocabulary]
            if strange:
                raise UserError(
                    f"prompt {place} holds token {strange[0]}, outside the vocabulary of "
                    f"{vocabulary}"
                )

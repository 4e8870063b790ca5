"""How the next token is drawn from logits.

The meaning of every setting, and the order in which they act, are those of Hugging Face's
`generate`: repetition penalty, temperature, top-k, top-p, min-p. Greedy choice (temperature 0)
knows the repetition penalty only.

Shape suffixes: B rows, V vocabulary.
"""

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from danube_jax.errors import UserError

MAX_LOGPROBS = 100


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """What a user asks of a continuation.

    Attributes:
      max_tokens: most new tokens.
      temperature: logits are divided by it; 0 takes the likeliest token (greedy).
      top_k: draw among the k likeliest tokens, and those equal to the k-th; 0 among all.
      top_p: draw among the likeliest tokens that together hold this probability.
      min_p: draw among tokens at least this fraction as likely as the likeliest.
      repetition_penalty: divides positive and multiplies negative logits of every token that
        stands in the prompt or was drawn before; 1 changes nothing.
      stop_tokens: ids that end a continuation; they are not part of it.
      stop_strings: strings that end a continuation; its text ends before them.
      seed: of the random draws.
      num_samples: continuations of each prompt.
      logprobs: report the log-probability of each token and of this many likeliest ones.

    Raises:
      UserError: a value is not possible; names the field.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int = 0
    num_samples: int = 1
    logprobs: int = 0

    def __post_init__(self):
        _require_int(self, "max_tokens", 0)
        _require_int(self, "top_k", 0)
        _require_int(self, "seed", 0, 2**63 - 1)
        _require_int(self, "num_samples", 1)
        _require_int(self, "logprobs", 0, MAX_LOGPROBS)
        _require_number(self, "temperature", 0.0, math.inf, "a number of at least 0")
        _require_number(self, "min_p", 0.0, 1.0, "a number from 0 to 1")
        _require_number(self, "top_p", 0.0, 1.0, "a number above 0 and at most 1", open_low=True)
        _require_number(
            self, "repetition_penalty", 0.0, math.inf, "a positive number", open_low=True
        )
        for name, kind in (("stop_tokens", int), ("stop_strings", str)):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(item, kind) for item in value):
                raise UserError(f"{name}: expected several of type {kind.__name__}, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        if "" in self.stop_strings:
            raise UserError("stop_strings: an empty string would stop everything; leave it out")


def _require_int(config: Any, name: str, low: int, high: int | None = None) -> None:
    value = getattr(config, name)
    fine = isinstance(value, int) and not isinstance(value, bool) and value >= low
    if not fine or (high is not None and value > high):
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise UserError(f"{name}: expected a whole number {bounds}, got {value!r}")


def _require_number(
    config: Any, name: str, low: float, high: float, expected: str, open_low: bool = False
) -> None:
    value = getattr(config, name)
    fine = isinstance(value, int | float) and math.isfinite(value) and low <= value <= high
    if not fine or (open_low and value == low):
        raise UserError(f"{name}: expected {expected}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """Which parts of sampling a program contains: what is static for compilation."""

    greedy: bool
    repetition_penalty: bool
    top_k: bool
    top_p: bool
    min_p: bool
    logprobs: int

    @classmethod
    def of(cls, config: SamplingConfig) -> "SamplingPlan":
        """The parts that `config` needs."""
        greedy = config.temperature == 0
        return cls(
            greedy=greedy,
            repetition_penalty=config.repetition_penalty != 1,
            top_k=not greedy and config.top_k > 0,
            top_p=not greedy and config.top_p < 1,
            min_p=not greedy and config.min_p > 0,
            logprobs=config.logprobs,
        )


@flax.struct.dataclass
class SamplingValues:
    """The numbers of a `SamplingConfig`, as scalars that need no new compilation."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array

    @classmethod
    def of(cls, config: SamplingConfig) -> "SamplingValues":
        """The numbers of `config`."""
        return cls(
            temperature=jnp.float32(config.temperature or 1.0),
            top_k=jnp.float32(config.top_k),
            top_p=jnp.float32(config.top_p),
            min_p=jnp.float32(config.min_p),
            repetition_penalty=jnp.float32(config.repetition_penalty),
        )


def process_logits(
    plan: SamplingPlan, values: SamplingValues, logits_BV: jax.Array, seen_BV: jax.Array | None
) -> jax.Array:
    """Logits of the distribution to draw from; -inf for tokens that are ruled out.

    Tokens equal to the least likely one that stays, stay too.

    Args:
      plan: the parts to apply.
      values: their numbers.
      logits_BV: float32 logits of the model.
      seen_BV: tokens of the prompt and drawn before; needed for a repetition penalty.
    """
    if plan.repetition_penalty:
        penalty = values.repetition_penalty
        penalised_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
        logits_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
    if plan.greedy:
        return logits_BV
    logits_BV = logits_BV / values.temperature
    if plan.top_k:
        ones_BV = jnp.ones_like(logits_BV)
        logits_BV = _keep_likeliest(logits_BV, ones_BV, jnp.minimum(values.top_k, ones_BV.shape[1]))
    if plan.top_p:
        logits_BV = _keep_likeliest(logits_BV, jax.nn.softmax(logits_BV, axis=-1), values.top_p)
    if plan.min_p:
        best_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < best_B1 + jnp.log(values.min_p), -jnp.inf, logits_BV)
    return logits_BV


def _keep_likeliest(logits_BV: jax.Array, weights_BV: jax.Array, total: jax.Array) -> jax.Array:
    """Rules out all but the likeliest tokens whose weights together reach `total`.

    The threshold is found bit by bit, 32 sums a row instead of a sort.
    """
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    rank_BV = jnp.where(bits_BV & sign, ~bits_BV, bits_BV | sign)  # integers in the floats' order

    def next_bit(i, threshold_B1):
        higher_B1 = threshold_B1 | (sign >> i)
        kept_BV = jnp.where(rank_BV >= higher_B1, weights_BV, 0.0)
        enough_B1 = jnp.sum(kept_BV, axis=-1, keepdims=True) >= total
        return jnp.where(enough_B1, higher_B1, threshold_B1)

    none_B1 = jnp.zeros_like(rank_BV[:, :1])
    threshold_B1 = jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(32), next_bit, none_B1)
    return jnp.where(rank_BV >= threshold_B1, logits_BV, -jnp.inf)


def draw_tokens(plan: SamplingPlan, logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """One token a row of processed logits, each with the row's own random key; int32 [B]."""
    if plan.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)

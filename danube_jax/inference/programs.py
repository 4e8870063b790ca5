"""The compiled parts of generation: prefill, drawing tokens, the decoding loop, scoring.

Each is a pure function of arrays, compiled once for each set of static shapes (`buckets.py`).

Shape suffixes: B rows, T tokens of a row, D model, V vocabulary, N tokens of one dispatch, n
alternatives.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from danube_jax.inference.sampling import (
    SamplingPlan,
    SamplingValues,
    draw_tokens,
    process_logits,
)
from danube_jax.models.decoder import Decoder, Params
from danube_jax.models.kv_cache import KVCache

NO_TOKEN = -1  # what a finished row draws; also a stop token that is never drawn
BLOCK_TOKENS = 128  # most tokens of a row that one dispatch of the decoding loop draws
SCORE_TOKENS = 1_024  # tokens whose logits are held at once while scoring


@flax.struct.dataclass
class Rows:
    """What goes on from token to token, beside the cache.

    Attributes:
      token_B: the token drawn last, which has not entered the model yet.
      time: when it will.
      padding_B: padding tokens before each row's prompt.
      done_B: rows that have drawn a stop token.
      keys_B: each row's random key.
      seen_BV: tokens of the prompt and drawn so far; None without a repetition penalty.
      stop_tokens: ids that end a row.
    """

    token_B: jax.Array
    time: jax.Array
    padding_B: jax.Array
    done_B: jax.Array
    keys_B: jax.Array
    seen_BV: jax.Array | None
    stop_tokens: jax.Array


@flax.struct.dataclass
class Drawn:
    """Tokens drawn: [B] for one step, [B, N] for a dispatch; `NO_TOKEN` where a row was done.

    Log-probabilities are the model's own, before penalty, temperature and filters; None where
    not asked for.
    """

    tokens: jax.Array
    logprobs: jax.Array | None
    top_tokens: jax.Array | None
    top_logprobs: jax.Array | None


@functools.partial(jax.jit, static_argnames=("decoder", "fresh"), donate_argnames="cache")
def prefill(
    decoder: Decoder,
    params: Params,
    tokens_BT: jax.Array,
    cache: KVCache,
    time: jax.Array,
    padding_B: jax.Array | None,
    last: jax.Array,
    *,
    fresh: bool,
) -> tuple[jax.Array, KVCache]:
    """Feeds a chunk of the prompts; returns the states [B, D] at index `last`, and the cache."""
    variables = {"params": params}
    h_BTD, cache = decoder.apply(
        variables, tokens_BT, cache, time, padding_B, fresh=fresh, method="decode_states"
    )
    return jax.lax.dynamic_index_in_dim(h_BTD, last, axis=1, keepdims=False), cache


@functools.partial(jax.jit, static_argnames=("decoder", "plan"), donate_argnames="rows")
def draw_first(
    decoder: Decoder,
    plan: SamplingPlan,
    params: Params,
    values: SamplingValues,
    h_BD: jax.Array,
    rows: Rows,
) -> tuple[Rows, Drawn]:
    """Draws each row's first token from the states that prefill left; [B, 1]."""
    rows, drawn = _draw(decoder, plan, params, values, h_BD, rows)
    return rows, jax.tree.map(lambda x: x[:, None], drawn)


@functools.partial(jax.jit, static_argnames=("decoder", "plan"), donate_argnames=("rows", "cache"))
def advance(
    decoder: Decoder,
    plan: SamplingPlan,
    params: Params,
    values: SamplingValues,
    rows: Rows,
    cache: KVCache,
    limit: jax.Array,
) -> tuple[Rows, KVCache, Drawn]:
    """Draws up to `limit` (at most `BLOCK_TOKENS`) tokens a row; stops when all rows are done."""

    def unfinished(carry):
        step, rows, _, _ = carry
        return (step < limit) & ~jnp.all(rows.done_B)

    def step_once(carry):
        step, rows, cache, block = carry
        h_B1D, cache = decoder.apply(
            {"params": params},
            rows.token_B[:, None],
            cache,
            rows.time,
            rows.padding_B,
            method="decode_states",
        )
        rows = rows.replace(time=rows.time + 1)
        rows, drawn = _draw(decoder, plan, params, values, h_B1D[:, 0], rows)
        block = jax.tree.map(
            lambda whole, one: jax.lax.dynamic_update_index_in_dim(whole, one, step, axis=1),
            block,
            drawn,
        )
        return step + 1, rows, cache, block

    block = _empty_block(plan, rows.token_B.shape[0])
    _, rows, cache, block = jax.lax.while_loop(
        unfinished, step_once, (jnp.int32(0), rows, cache, block)
    )
    return rows, cache, block


def _empty_block(plan: SamplingPlan, batch: int) -> Drawn:
    shape = (batch, BLOCK_TOKENS)
    none = Drawn(jnp.full(shape, NO_TOKEN, jnp.int32), None, None, None)
    if not plan.logprobs:
        return none
    top = (*shape, plan.logprobs)
    return none.replace(
        logprobs=jnp.zeros(shape, jnp.float32),
        top_tokens=jnp.zeros(top, jnp.int32),
        top_logprobs=jnp.zeros(top, jnp.float32),
    )


def _draw(decoder, plan, params, values, h_BD, rows):
    logits_BV = decoder.apply({"params": params}, h_BD, method="logits")
    processed_BV = process_logits(plan, values, logits_BV, rows.seen_BV)
    # A draw depends on the row's key and on its position, not on the other rows' prompts.
    keys_B = jax.vmap(jax.random.fold_in)(rows.keys_B, rows.time - rows.padding_B)
    token_B = jnp.where(rows.done_B, rows.token_B, draw_tokens(plan, processed_BV, keys_B))
    drawn = Drawn(jnp.where(rows.done_B, NO_TOKEN, token_B), None, None, None)
    if plan.logprobs:
        logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
        top_logprobs_Bn, top_tokens_Bn = jax.lax.top_k(logprobs_BV, plan.logprobs)
        drawn = drawn.replace(
            logprobs=jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=1)[:, 0],
            top_tokens=top_tokens_Bn.astype(jnp.int32),
            top_logprobs=top_logprobs_Bn,
        )
    if plan.repetition_penalty:
        seen_BV = rows.seen_BV.at[jnp.arange(token_B.shape[0]), token_B].set(True)
        rows = rows.replace(seen_BV=seen_BV)
    stopped_B = jnp.any(token_B[:, None] == rows.stop_tokens, axis=1)
    return rows.replace(token_B=token_B, done_B=rows.done_B | stopped_B), drawn


@functools.partial(jax.jit, static_argnames="copies")
def repeat_rows(h_BD: jax.Array, cache: KVCache, copies: int) -> tuple[jax.Array, KVCache]:
    """Each row `copies` times over."""
    return jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), (h_BD, cache))


@functools.partial(jax.jit, static_argnames="slots")
def grow_cache(cache: KVCache, slots: int) -> KVCache:
    """A cache with more slots, for one that has not come round to slot 0 yet."""

    more = (0, slots - cache.slots)
    return KVCache(
        keys=tuple(jnp.pad(k, ((0, 0), (0, 0), (0, 0), more)) for k in cache.keys),
        values=tuple(jnp.pad(v, ((0, 0), (0, 0), more, (0, 0))) for v in cache.values),
    )


@jax.jit
def join_rows(parts: list[tuple[jax.Array, KVCache]]) -> tuple[jax.Array, KVCache]:
    """States and caches of several batches as those of one."""
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


@functools.partial(jax.jit, static_argnames="decoder")
def score_rows(
    decoder: Decoder, params: Params, tokens_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What each token but the first had for log-probability, and whether it was the likeliest.

    Returns:
      float32 and bool [B, T - 1]. Logits are made for `SCORE_TOKENS` tokens at a time.
    """
    variables = {"params": params}
    h_BTD = decoder.apply(variables, tokens_BT, method="hidden_states")[:, :-1]
    targets_BT = tokens_BT[:, 1:]
    count = targets_BT.size
    chunks = -(-count // SCORE_TOKENS)
    spare = chunks * -(-count // chunks) - count
    h_CTD = jnp.pad(h_BTD.reshape(count, -1), ((0, spare), (0, 0))).reshape(
        chunks, -1, h_BTD.shape[-1]
    )
    targets_CT = jnp.pad(targets_BT.reshape(count), (0, spare)).reshape(chunks, -1)

    def score_chunk(chunk):
        h_TD, targets_T = chunk
        logits_TV = decoder.apply(variables, h_TD, method="logits")
        target_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=1)[:, 0]
        likeliest_T = jnp.argmax(logits_TV, axis=-1) == targets_T
        return target_T - jax.nn.logsumexp(logits_TV, axis=-1), likeliest_T

    scores_CT, likeliest_CT = jax.lax.map(score_chunk, (h_CTD, targets_CT))
    unpad = functools.partial(jnp.reshape, shape=targets_BT.shape)
    return unpad(scores_CT.reshape(-1)[:count]), unpad(likeliest_CT.reshape(-1)[:count])

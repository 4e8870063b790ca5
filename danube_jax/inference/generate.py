"""Text generation from token ids: padded prefill, then one jitted loop of single-token steps.

Shape suffixes: B rows (prompts), P padded prompt length, S cache slots, V vocabulary.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from danube_jax.errors import UserError
from danube_jax.models.decoder import Params, init_cache

_NO_TOKEN = -1  # pads the output; also an eos_id that is never drawn


def generate(
    decoder: nn.Module,
    params: Params,
    prompt_tokens: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_id: int | None = None,
    key: jax.Array | None = None,
) -> list[list[int]]:
    """Continues each prompt; a row's output does not depend on the other rows.

    Args:
      decoder: a `Decoder`.
      params: its parameters.
      prompt_tokens: one non-empty list of token ids a row.
      max_tokens: most new tokens a row.
      temperature: 0 takes the likeliest token; otherwise logits are divided by it.
      top_k: draw among the k likeliest tokens; 0 among all.
      top_p: draw among the likeliest tokens that together hold this probability.
      eos_id: ends a row; it is not part of the output.
      key: random key, needed for temperature > 0; row and position are folded into it.

    Returns:
      The new tokens of each row, without the prompt.

    Raises:
      UserError: an argument is out of range, or a prompt and its continuation do not fit into
        the model's context.
    """
    lengths = [len(prompt) for prompt in prompt_tokens]
    _check(decoder.config, prompt_tokens, lengths, max_tokens, temperature, top_k, top_p, key)
    if not lengths or max_tokens == 0:
        return [[] for _ in lengths]
    padded_length = 1 << (max(lengths) - 1).bit_length()  # few shapes, few compilations
    tokens_BP = np.zeros((len(lengths), padded_length), np.int32)
    for row, prompt in enumerate(prompt_tokens):
        tokens_BP[row, : len(prompt)] = prompt
    output = _generate(
        decoder,
        max_tokens,
        temperature == 0,
        top_k > 0 or top_p < 1,
        params,
        jnp.asarray(tokens_BP),
        jnp.asarray(lengths, jnp.int32),
        jnp.float32(temperature),
        jnp.int32(top_k or decoder.config.vocab_size),
        jnp.float32(top_p),
        jnp.int32(_NO_TOKEN if eos_id is None else eos_id),
        jax.random.key(0) if key is None else key,
    )
    return [[int(token) for token in row if token != _NO_TOKEN] for row in np.asarray(output)]


def sample(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    *,
    filtered: bool,
) -> jax.Array:
    """Draws one token a row, int32 [B]; `top_k` and `top_p` count only where `filtered`.

    The nucleus is taken of what top_k leaves, and always holds the likeliest token.
    """
    logits_BV = logits_BV.astype(jnp.float32) / temperature
    if filtered:
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        kept_BV = jnp.arange(logits_BV.shape[-1]) < top_k
        p_BV = jax.nn.softmax(jnp.where(kept_BV, sorted_BV, -jnp.inf), axis=-1)
        kept_BV &= jnp.cumsum(p_BV, axis=-1) - p_BV < top_p
        least_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
    decoder,
    max_tokens,
    greedy,
    filtered,
    params,
    tokens_BP,
    lengths_B,
    temperature,
    top_k,
    top_p,
    eos_id,
    key,
):
    """New tokens, int32 [B, max_tokens], `_NO_TOKEN` from a row's end on."""
    batch, padded_length = tokens_BP.shape
    rows_B = jnp.arange(batch)
    keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows_B)

    def next_token(h_BD, positions_B):
        logits_BV = decoder.apply({"params": params}, h_BD, method="logits")
        if greedy:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        step_keys_B = jax.vmap(jax.random.fold_in)(keys_B, positions_B)
        return sample(logits_BV, step_keys_B, temperature, top_k, top_p, filtered=filtered)

    def states(tokens_BT, positions_BT, cache):
        variables = {"params": params}
        return decoder.apply(variables, tokens_BT, positions_BT, cache, method="decode_states")

    cache = init_cache(decoder.config, batch, padded_length + max_tokens, decoder.dtype)
    positions_BP = jnp.broadcast_to(jnp.arange(padded_length), tokens_BP.shape)
    h_BPD, cache = states(tokens_BP, positions_BP, cache)
    token_B = next_token(h_BPD[rows_B, lengths_B - 1], lengths_B)

    def unfinished(carry):
        step, _, done_B, *_ = carry
        return (step < max_tokens) & ~jnp.all(done_B)

    def advance(carry):
        step, token_B, done_B, output_BN, cache = carry
        output_BN = output_BN.at[:, step].set(jnp.where(done_B, _NO_TOKEN, token_B))
        positions_B = lengths_B + step
        h_B1D, cache = states(token_B[:, None], positions_B[:, None], cache)
        token_B = next_token(h_B1D[:, 0], positions_B + 1)
        return step + 1, token_B, done_B | (token_B == eos_id), output_BN, cache

    output_BN = jnp.full((batch, max_tokens), _NO_TOKEN, jnp.int32)
    carry = (jnp.int32(0), token_B, token_B == eos_id, output_BN, cache)
    return jax.lax.while_loop(unfinished, advance, carry)[3]


def _check(config, prompts, lengths, max_tokens, temperature, top_k, top_p, key) -> None:
    if max_tokens < 0 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise UserError(
            f"generate: max_tokens={max_tokens}, temperature={temperature}, top_k={top_k} must "
            f"not be negative, and top_p={top_p} must be in (0, 1]"
        )
    if temperature > 0 and key is None:
        raise UserError(f"generate: temperature={temperature} needs a random key")
    for row, length in enumerate(lengths):
        if length == 0:
            raise UserError(f"generate: prompt {row} is empty; it needs at least one token")
        if length + max_tokens > config.max_position_embeddings:
            raise UserError(
                f"generate: prompt {row} of {length} tokens and {max_tokens} new ones exceed the "
                f"model's context of {config.max_position_embeddings}"
            )
        for token in prompts[row]:
            if not 0 <= token < config.vocab_size:
                raise UserError(
                    f"generate: prompt {row} holds token {token}, outside the vocabulary of "
                    f"{config.vocab_size}"
                )

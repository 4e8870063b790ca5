"""Cross-entropy over a large vocabulary, without ever holding all logits in float32.

Shape suffixes: M tokens (batch times length), C tokens of one chunk, D model, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Aux = dict[str, jax.Array]


def cross_entropy(
    logits_MV: jax.Array, targets_M: jax.Array, weights_M: jax.Array, z_loss: float = 0.0
) -> tuple[jax.Array, Aux]:
    """The plain form of `chunked_cross_entropy`, from logits that are already there.

    Returns the same sums; differentiable by plain autodiff.
    """
    logits_MV = logits_MV.astype(jnp.float32)
    weights_M = weights_M.astype(jnp.float32)
    lse_M = jax.nn.logsumexp(logits_MV, axis=-1)
    target_M = jnp.take_along_axis(logits_MV, targets_M[:, None], axis=-1)[:, 0]
    nll_sum = jnp.sum(weights_M * (lse_M - target_M))
    z_sum = jnp.sum(weights_M * z_loss * jnp.square(lse_M))
    aux = {"nll_sum": nll_sum, "z_loss_sum": z_sum, "weight_sum": jnp.sum(weights_M)}
    return nll_sum + z_sum, aux


def chunked_cross_entropy(
    h_MD: jax.Array,
    head_DV: jax.Array,
    targets_M: jax.Array,
    weights_M: jax.Array,
    *,
    chunk_tokens: int,
    z_loss: float = 0.0,
) -> tuple[jax.Array, Aux]:
    """Weighted sums of the negative log-likelihood and of the z-loss over tokens.

    The z-loss of a token is ``z_loss * logsumexp(logits)**2`` (PaLM, arXiv 2204.02311, section
    5). Logits exist for one chunk of tokens at a time, in the dtype of `h_MD`; the softmax is in
    float32. When differentiated, the forward pass computes the gradients too, so that logits are
    made once; the head's gradient is accumulated in float32.

    Args:
      h_MD: hidden states after the final norm.
      head_DV: the head; cast to the dtype of `h_MD`.
      targets_M: the tokens to predict, int32 in [0, V).
      weights_M: weight of each token's loss; 0 leaves it out. Not differentiated.
      chunk_tokens: tokens in a chunk, 0 for all; M need not be a multiple of it.
      z_loss: coefficient of the z-loss.

    Returns:
      loss_sum, the float32 sum of both; and the float32 scalars nll_sum, z_loss_sum and
      weight_sum, through which no gradient flows. The caller divides by the total weight.
    """
    (loss_sum, aux) = _chunked(h_MD, head_DV, targets_M, weights_M, chunk_tokens, z_loss)
    return loss_sum, jax.tree.map(lax.stop_gradient, aux)


def token_nll(
    h_MD: jax.Array, head_DV: jax.Array, targets_M: jax.Array, *, chunk_tokens: int
) -> jax.Array:
    """Negative log-likelihood of each token, float32 [M], chunk by chunk.

    Differentiable: the backward pass makes the logits of a chunk again, and sums the head's
    gradient in float32.
    """
    head_DV = head_DV.astype(jnp.float32)

    @jax.checkpoint
    def chunk_nll(_, chunk):
        h_CD, targets_C = chunk
        logits_CV = jnp.dot(h_CD, head_DV.astype(h_CD.dtype))
        return None, _logsumexp(logits_CV) - _target_logits(logits_CV, targets_C)

    _, nll_M = _scan_chunks(chunk_nll, None, (h_MD, targets_M), chunk_tokens)
    return nll_M


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked(h_MD, head_DV, targets_M, weights_M, chunk_tokens, z_loss):
    head_DV = head_DV.astype(h_MD.dtype)

    def add_chunk(sums, chunk):
        h_CD, targets_C, weights_C = chunk
        logits_CV = jnp.dot(h_CD, head_DV)
        return _add_losses(sums, logits_CV, targets_C, weights_C, z_loss)[0], None

    chunks = (h_MD, targets_M, weights_M.astype(jnp.float32))
    sums, _ = _scan_chunks(add_chunk, _zero_sums(), chunks, chunk_tokens)
    return sums["nll_sum"] + sums["z_loss_sum"], sums


def _chunked_forward(h_MD, head_DV, targets_M, weights_M, chunk_tokens, z_loss):
    head_dtype = head_DV.dtype
    head_DV = head_DV.astype(h_MD.dtype)

    def add_chunk(carry, chunk):
        sums, dhead_DV = carry
        h_CD, targets_C, weights_C = chunk
        logits_CV = jnp.dot(h_CD, head_DV)
        sums, lse_C = _add_losses(sums, logits_CV, targets_C, weights_C, z_loss)
        dlogits_CV = _logit_gradient(logits_CV, lse_C, targets_C, weights_C, z_loss)
        dh_CD = jnp.dot(dlogits_CV, head_DV.T)
        dhead_DV += jnp.dot(h_CD.T, dlogits_CV, preferred_element_type=jnp.float32)
        return (sums, dhead_DV), dh_CD

    chunks = (h_MD, targets_M, weights_M.astype(jnp.float32))
    carry = (_zero_sums(), jnp.zeros(head_DV.shape, jnp.float32))
    (sums, dhead_DV), dh_MD = _scan_chunks(add_chunk, carry, chunks, chunk_tokens)
    loss_sum = sums["nll_sum"] + sums["z_loss_sum"]
    # An empty array carries the head's dtype, which a residual may not hold as such.
    return (loss_sum, sums), (dh_MD, dhead_DV, jnp.zeros((0,), head_dtype))


def _chunked_backward(chunk_tokens, z_loss, residuals, cotangents):
    dh_MD, dhead_DV, head_like = residuals
    dloss, _ = cotangents
    dh_MD = (dh_MD * dloss).astype(dh_MD.dtype)
    return dh_MD, (dhead_DV * dloss).astype(head_like.dtype), None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _zero_sums() -> Aux:
    return {name: jnp.zeros((), jnp.float32) for name in ("nll_sum", "z_loss_sum", "weight_sum")}


def _add_losses(sums, logits_CV, targets_C, weights_C, z_loss):
    """`sums` with a chunk added, and the chunk's log-denominators."""
    lse_C = _logsumexp(logits_CV)
    nll_C = lse_C - _target_logits(logits_CV, targets_C)
    sums = {
        "nll_sum": sums["nll_sum"] + jnp.sum(weights_C * nll_C),
        "z_loss_sum": sums["z_loss_sum"] + z_loss * jnp.sum(weights_C * jnp.square(lse_C)),
        "weight_sum": sums["weight_sum"] + jnp.sum(weights_C),
    }
    return sums, lse_C


def _logsumexp(logits_CV: jax.Array) -> jax.Array:
    max_C1 = jnp.max(logits_CV, axis=-1, keepdims=True).astype(jnp.float32)
    sum_C = jnp.sum(jnp.exp(logits_CV.astype(jnp.float32) - max_C1), axis=-1)
    return max_C1[:, 0] + jnp.log(sum_C)


def _target_logits(logits_CV: jax.Array, targets_C: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0].astype(jnp.float32)


def _logit_gradient(logits_CV, lse_C, targets_C, weights_C, z_loss):
    """Gradient of the weighted loss with respect to the logits, in their dtype."""
    p_CV = jnp.exp(logits_CV.astype(jnp.float32) - lse_C[:, None])
    factor_C1 = (weights_C * (1.0 + 2.0 * z_loss * lse_C))[:, None]
    is_target_CV = targets_C[:, None] == jnp.arange(logits_CV.shape[-1])
    dlogits_CV = p_CV * factor_C1 - jnp.where(is_target_CV, weights_C[:, None], 0.0)
    return dlogits_CV.astype(logits_CV.dtype)


def _scan_chunks(function: Any, carry: Any, arrays: tuple, chunk_tokens: int) -> tuple[Any, Any]:
    """`lax.scan` over chunks of the leading axis, padded with zeros; outputs are cut to size."""
    tokens = arrays[0].shape[0]
    if chunk_tokens <= 0 or chunk_tokens >= tokens:
        return function(carry, arrays)
    count = -(-tokens // chunk_tokens)
    padding = count * chunk_tokens - tokens

    def to_chunks(x):
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)) if padding else x
        return x.reshape(count, chunk_tokens, *x.shape[1:])

    carry, outputs = lax.scan(function, carry, jax.tree.map(to_chunks, arrays))
    merge = lambda y: y.reshape(count * chunk_tokens, *y.shape[2:])[:tokens]  # noqa: E731
    return carry, jax.tree.map(merge, outputs)

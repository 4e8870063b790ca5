"""Causal attention for training on CPUs, block by block.

Shape suffixes: B batch, T length, N query heads, K KV heads, G = N / K query heads a KV head,
H head size, R = B * K rows (one KV head of one sequence, with its G query heads),
Q = G * block queries of one block, S the keys that such a block may see.

The forward pass is FlashAttention's (arXiv 2205.14135) without its loop over keys: a block of
queries meets all of its keys at once, found statically, so the upper triangle and whatever lies
before the sliding window are never computed. The backward pass keeps only the output and the
log of the softmax denominator, and rebuilds the probabilities.

Two choices make it fast on XLA:CPU: rows are taken a few at a time (`lax.map`), so that the scores
of a block stay in the cache; and masks are constants, since computing them from iotas costs as
much as the softmax.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

OUTPUT_NAME = "attention_output"  # checkpoint names, for remat policies
DENOMINATOR_NAME = "attention_denominator"

_MIN_BLOCK = 128
_MAX_BLOCKS = 16  # every block is unrolled into the program
_CACHED_SCORES = 2**18  # float32 scores held at once: a core's share of L2 and L3
_MASKED = -1e30  # finite, so that no inf - inf can arise


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blocked_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    sliding_window: int | None,
) -> jax.Array:
    """Causal grouped-query attention in float32, O(T * block) memory; see `attention`.

    Returns out_BTNH in the dtype of `q_BTNH`.
    """
    return _forward(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, sliding_window)[0]


def _forward(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, sliding_window):
    rows = _to_rows(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    forward_rows = functools.partial(_forward_rows, sliding_window=sliding_window)
    out_RGTH, lse_RGT = _map_rows(forward_rows, rows)
    return _from_rows(out_RGTH, q_BTNH), lse_RGT


def _forward_with_residuals(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, sliding_window):
    out_BTNH, lse_RGT = _forward(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, sliding_window)
    out_BTNH = checkpoint_name(out_BTNH, OUTPUT_NAME)
    lse_RGT = checkpoint_name(lse_RGT, DENOMINATOR_NAME)
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, out_BTNH, lse_RGT)


def _backward(sliding_window, residuals, dout_BTNH):
    q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, out_BTNH, lse_RGT = residuals
    kv_heads = k_BTKH.shape[2]
    rows = _to_rows(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    dout_BTNH = dout_BTNH.astype(jnp.float32)
    delta_BTN1 = jnp.sum(dout_BTNH * out_BTNH, axis=-1, keepdims=True)
    rows += (_split_heads(dout_BTNH, kv_heads), lse_RGT, _split_heads(delta_BTN1, kv_heads)[..., 0])
    backward_rows = functools.partial(_backward_rows, sliding_window=sliding_window)
    dq_RGTH, dk_RTH, dv_RTH = _map_rows(backward_rows, rows)
    scale = q_BTNH.shape[-1] ** -0.5
    return (
        _from_rows(dq_RGTH * scale, q_BTNH),
        _from_rows(dk_RTH[:, None], k_BTKH),
        _from_rows(dv_RTH[:, None], v_BTKH),
        None,
    )


blocked_attention.defvjp(_forward_with_residuals, _backward)


def _forward_rows(q_RGTH, k_RTH, v_RTH, segments_RT, *, sliding_window):
    """Output and log-denominator of a few rows; `q_RGTH` is already scaled."""
    out_blocks, lse_blocks = [], []
    for queries, keys in _blocks(q_RGTH.shape[2], sliding_window):
        q_RQH = _merge_group(q_RGTH[:, :, queries])
        s_RQS = jnp.einsum("rqh,rsh->rqs", q_RQH, k_RTH[:, keys])
        s_RQS = s_RQS + _mask_bias(queries, keys, q_RGTH.shape[1], sliding_window)
        if segments_RT is not None:
            s_RQS = jnp.where(_same_segment(segments_RT, queries, keys, q_RGTH), s_RQS, _MASKED)
        max_RQ1 = jnp.max(s_RQS, axis=-1, keepdims=True)
        p_RQS = jnp.exp(s_RQS - max_RQ1)
        sum_RQ1 = jnp.sum(p_RQS, axis=-1, keepdims=True)
        out_RQH = jnp.einsum("rqs,rsh->rqh", p_RQS, v_RTH[:, keys]) / sum_RQ1
        out_blocks.append(_split_group(out_RQH, q_RGTH))
        lse_blocks.append(_split_group(max_RQ1 + jnp.log(sum_RQ1), q_RGTH)[..., 0])
    return jnp.concatenate(out_blocks, axis=2), jnp.concatenate(lse_blocks, axis=2)


def _backward_rows(
    q_RGTH, k_RTH, v_RTH, segments_RT, dout_RGTH, lse_RGT, delta_RGT, *, sliding_window
):
    """Gradients of a few rows with respect to the scaled queries, the keys and the values."""
    dq_blocks, dk_RTH, dv_RTH = [], jnp.zeros_like(k_RTH), jnp.zeros_like(v_RTH)
    for queries, keys in _blocks(q_RGTH.shape[2], sliding_window):
        q_RQH, dout_RQH = (
            _merge_group(q_RGTH[:, :, queries]),
            _merge_group(dout_RGTH[:, :, queries]),
        )
        lse_R1Q = _merge_group(lse_RGT[:, :, queries])[:, None]
        delta_R1Q = _merge_group(delta_RGT[:, :, queries])[:, None]
        s_RSQ = jnp.einsum("rsh,rqh->rsq", k_RTH[:, keys], q_RQH)
        s_RSQ = s_RSQ + _mask_bias(queries, keys, q_RGTH.shape[1], sliding_window).T
        if segments_RT is not None:
            same_RQS = _same_segment(segments_RT, queries, keys, q_RGTH)
            s_RSQ = jnp.where(jnp.swapaxes(same_RQS, 1, 2), s_RSQ, _MASKED)
        p_RSQ = jnp.exp(s_RSQ - lse_R1Q)
        dp_RSQ = jnp.einsum("rsh,rqh->rsq", v_RTH[:, keys], dout_RQH)
        ds_RSQ = p_RSQ * (dp_RSQ - delta_R1Q)
        dv_RTH = _add_at(dv_RTH, keys, jnp.einsum("rsq,rqh->rsh", p_RSQ, dout_RQH))
        dk_RTH = _add_at(dk_RTH, keys, jnp.einsum("rsq,rqh->rsh", ds_RSQ, q_RQH))
        dq_RHQ = jnp.einsum("rsq,rsh->rhq", ds_RSQ, k_RTH[:, keys])
        dq_blocks.append(_split_group(jnp.swapaxes(dq_RHQ, 1, 2), q_RGTH))
    return jnp.concatenate(dq_blocks, axis=2), dk_RTH, dv_RTH


def _add_at(sum_RTH: jax.Array, keys: slice, part_RSH: jax.Array) -> jax.Array:
    """Adds a block's part in place; `.at[].add` is a scatter, which jaxlib 0.11 fails to compile
    for several CPU devices."""
    total_RSH = sum_RTH[:, keys] + part_RSH
    return lax.dynamic_update_slice_in_dim(sum_RTH, total_RSH, keys.start, axis=1)


def _blocks(length: int, sliding_window: int | None) -> list[tuple[slice, slice]]:
    """Blocks of queries, each with the keys that any of its queries may see."""
    block = max(_MIN_BLOCK, math.ceil(length / _MAX_BLOCKS))
    window = sliding_window or length
    return [
        (slice(low, min(low + block, length)), slice(max(0, low - window + 1), low + block))
        for low in range(0, length, block)
    ]


def _mask_bias(queries: slice, keys: slice, group: int, sliding_window: int | None) -> np.ndarray:
    """0 where a query may see a key, `_MASKED` elsewhere; float32 [Q, S]."""
    query = np.tile(np.arange(queries.start, queries.stop), group)[:, None]
    key = np.arange(keys.start, min(keys.stop, queries.stop))[None]
    visible = key <= query
    if sliding_window is not None:
        visible &= key > query - sliding_window
    return np.where(visible, 0.0, _MASKED).astype(np.float32)


def _same_segment(segments_RT, queries, keys, q_RGTH):
    group = q_RGTH.shape[1]
    segments_RQ = jnp.tile(segments_RT[:, queries], (1, group))
    return segments_RQ[:, :, None] == segments_RT[:, None, keys]


def _to_rows(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    kv_heads, head_size = k_BTKH.shape[2:]
    q_RGTH = _split_heads(q_BTNH.astype(jnp.float32) * head_size**-0.5, kv_heads)
    k_RTH = _split_heads(k_BTKH.astype(jnp.float32), kv_heads)[:, 0]
    v_RTH = _split_heads(v_BTKH.astype(jnp.float32), kv_heads)[:, 0]
    segments_RT = None
    if segment_ids_BT is not None:
        segments_RT = jnp.repeat(segment_ids_BT, kv_heads, axis=0)
    return q_RGTH, k_RTH, v_RTH, segments_RT


def _split_heads(x_BTNH, kv_heads):
    """[B, T, N, H] -> [B * K, G, T, H]."""
    batch, length, heads, size = x_BTNH.shape
    x_BTKGH = x_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, size)
    return x_BTKGH.transpose(0, 2, 3, 1, 4).reshape(batch * kv_heads, -1, length, size)


def _from_rows(x_RGTH, like_BTNH):
    """[B * K, G, T, H] -> the shape and dtype of `like_BTNH`."""
    batch, length, _, size = like_BTNH.shape
    x_BKGTH = x_RGTH.reshape(batch, -1, x_RGTH.shape[1], length, size)
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(like_BTNH.shape).astype(like_BTNH.dtype)


def _merge_group(x):
    """[R, G, block, ...] -> [R, G * block, ...]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _split_group(x_RQH, q_RGTH):
    """[R, G * block, H] -> [R, G, block, H]."""
    return x_RQH.reshape(x_RQH.shape[0], q_RGTH.shape[1], -1, x_RQH.shape[-1])


def _map_rows(function, rows):
    """`function` over the rows, as many at a time as keep their scores in the cache."""
    count, group, length, _ = rows[0].shape
    block = max(_MIN_BLOCK, math.ceil(length / _MAX_BLOCKS))
    most = max(1, _CACHED_SCORES // (group * min(block, length) * length))
    chunk = max(size for size in range(1, min(most, count) + 1) if count % size == 0)
    if chunk == count:
        return function(*rows)
    chunked = jax.tree.map(lambda x: x.reshape(count // chunk, chunk, *x.shape[1:]), rows)
    outputs = lax.map(lambda row: function(*row), chunked)
    return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), outputs)

"""Causal grouped-query attention behind one function, with an explicit choice of backend.

Shape suffixes: B batch, T query length, S key length, N query heads, K KV heads, H head size.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from danube_jax.config import ATTENTION_BACKENDS
from danube_jax.errors import UserError
from danube_jax.models.blocked_attention import OUTPUT_NAME, blocked_attention

_CUDNN_DTYPES = (jnp.bfloat16, jnp.float16)
_CUDNN_MAX_HEAD_SIZE = 256


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    sliding_window: int | None = None,
    segment_ids_BT: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Softmax attention in which query i sees the keys j with i - sliding_window < j <= i.

    Scores are scaled by 1 / sqrt(H) and the softmax is computed in float32. A window of W keys
    includes the query's own (the meaning of Mistral's `sliding_window`); None, or a window no
    shorter than the sequence, is full causal attention.

    Args:
      q_BTNH: queries.
      k_BSKH: keys, unexpanded: query head n uses KV head n // (N / K).
      v_BSKH: values.
      sliding_window: number of keys a query sees, itself included.
      segment_ids_BT: a query sees only keys of its own segment; padding (0) is one like any other.
      backend: 'xla' (dense, everywhere), 'blocked' (training on CPUs), 'cudnn' (NVIDIA GPUs), or
        'auto': the fastest of them on this platform that honours everything asked for.

    Returns:
      out_BTNH in the dtype of the queries.

    Raises:
      UserError: the backend cannot honour an argument; the message says which, and why.
    """
    if backend not in ATTENTION_BACKENDS:
        raise UserError(f"attention backend {backend!r}: expected one of {ATTENTION_BACKENDS}")
    _check_shapes(q_BTNH, k_BSKH, v_BSKH)
    length = k_BSKH.shape[1]
    if sliding_window is not None and sliding_window >= length:
        sliding_window = None

    platform = _platform()
    cudnn_refusal = _cudnn_refusal(q_BTNH, segment_ids_BT, platform)
    if backend == "auto":
        dense_or_blocked = "blocked" if platform == "cpu" else "xla"
        backend = "cudnn" if cudnn_refusal is None else dense_or_blocked

    if backend == "cudnn":
        if cudnn_refusal is not None:
            raise UserError(f"attention backend 'cudnn' {cudnn_refusal}")
        window = None if sliding_window is None else (sliding_window - 1, 0)
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            is_causal=True,
            local_window_size=window,
            implementation="cudnn",
        )
    if backend == "blocked":
        return blocked_attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, sliding_window)
    mask = _dense_mask(q_BTNH, length, sliding_window, segment_ids_BT)
    out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask, implementation="xla")
    return checkpoint_name(out_BTNH, OUTPUT_NAME)


def cached_attention(
    q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, bias_BTS: jax.Array
) -> jax.Array:
    """Softmax attention of a few queries over the slots of a cache; softmax in float32.

    Args:
      q_BTNH: queries.
      k_BKHS: cached keys, unexpanded: query head n uses KV head n // (N / K).
      v_BKSH: cached values.
      bias_BTS: added to the scores of every head: 0 where a query sees a slot, hugely negative
        elsewhere.

    Returns:
      out_BTNH in the dtype of the queries.
    """
    batch, length, heads, size = q_BTNH.shape
    kv_heads, slots = v_BKSH.shape[1:3]
    group = heads // kv_heads
    # M = G * T: the queries that meet the same keys are the rows of one matrix.
    q_BKMH = q_BTNH.reshape(batch, length, kv_heads, group, size).transpose(0, 2, 3, 1, 4)
    q_BKMH = q_BKMH.reshape(batch, kv_heads, group * length, size)
    float32 = {"preferred_element_type": jnp.float32}
    s_BKMS = jnp.einsum("bkmh,bkhs->bkms", q_BKMH, k_BKHS, **float32) * size**-0.5
    s_BKGTS = s_BKMS.reshape(batch, kv_heads, group, length, slots) + bias_BTS[:, None, None]
    p_BKMS = jax.nn.softmax(s_BKGTS, axis=-1).reshape(s_BKMS.shape).astype(v_BKSH.dtype)
    out_BKMH = jnp.einsum("bkms,bksh->bkmh", p_BKMS, v_BKSH, **float32)
    out_BKGTH = out_BKMH.reshape(batch, kv_heads, group, length, size)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape).astype(q_BTNH.dtype)


def _dense_mask(q_BTNH, key_length, sliding_window, segment_ids_BT):
    """True where a query may see a key; bool [1 or B, 1, T, S]."""
    query = np.arange(q_BTNH.shape[1])[None, :, None]
    key = np.arange(key_length)[None, None, :]
    visible = key <= query
    if sliding_window is not None:
        visible &= key > query - sliding_window
    if segment_ids_BT is not None:
        visible &= segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return jnp.asarray(visible)[:, None]


def _platform() -> str:
    """The platform that the surrounding computation is traced for: 'cpu', 'gpu' or 'tpu'.

    An abstract device on the current mesh (compiling without the device) goes before the default.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    platform = jax.default_backend() if device is None else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def _cudnn_refusal(q_BTNH, segment_ids_BT, platform) -> str | None:
    """Why cuDNN's fused attention cannot honour this call, or None where it can."""
    head_size = q_BTNH.shape[-1]
    if platform != "gpu":
        return f"needs an NVIDIA GPU, and this computation is for {platform}"
    if q_BTNH.dtype not in _CUDNN_DTYPES:
        return f"computes in bfloat16 or float16, not {q_BTNH.dtype}"
    if head_size % 8 or head_size > _CUDNN_MAX_HEAD_SIZE:
        limit = f"multiples of 8 up to {_CUDNN_MAX_HEAD_SIZE}"
        return f"supports head sizes that are {limit}, not {head_size}"
    if segment_ids_BT is not None:
        return "cannot mask documents (segment ids)"
    return None


def _check_shapes(q_BTNH, k_BSKH, v_BSKH) -> None:
    batch, length, heads, head_size = q_BTNH.shape
    _, key_length, kv_heads, _ = k_BSKH.shape
    shapes = f"queries {q_BTNH.shape}, keys {k_BSKH.shape}, values {v_BSKH.shape}"
    if k_BSKH.shape != v_BSKH.shape or k_BSKH.shape[0] != batch or k_BSKH.shape[3] != head_size:
        raise UserError(f"attention: shapes do not fit together: {shapes}")
    if heads % kv_heads:
        raise UserError(f"attention: {heads} query heads cannot share {kv_heads} KV heads evenly")
    if key_length != length:
        raise UserError(f"attention: there must be as many keys as queries: {shapes}")

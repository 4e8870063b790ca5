"""The keys and values that a decoder keeps while it generates: a ring of slots a layer.

Shape suffixes: B batch, T new tokens, S slots, K KV heads, H head size.
"""

import flax.struct
import jax
import jax.numpy as jnp

from danube_jax.config import ModelConfig


@flax.struct.dataclass
class KVCache:
    """Keys [B, K, H, S] and values [B, K, S, H] of every layer.

    A ring: the token that enters at time t is written to slot t % S, over the one of time t - S.
    Each array lies as its matmul reads it.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    @property
    def slots(self) -> int:
        """Size S of the ring."""
        return self.values[0].shape[2]


def init_cache(config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype) -> KVCache:
    """An empty cache of `slots` slots for `batch` sequences."""
    rows, size = (batch, config.num_key_value_heads), config.head_size
    layers = range(config.num_hidden_layers)
    return KVCache(
        keys=tuple(jnp.zeros((*rows, size, slots), dtype) for _ in layers),
        values=tuple(jnp.zeros((*rows, slots, size), dtype) for _ in layers),
    )


@flax.struct.dataclass
class LayerCache:
    """What one layer needs to decode: its part of the cache, and what the new tokens see of it.

    `bias_BTS` is 0 for the slots that a new token sees and hugely negative for the others; None
    means that the cache was empty, so that new tokens see one another only.
    """

    keys_BKHS: jax.Array
    values_BKSH: jax.Array
    time: jax.Array
    bias_BTS: jax.Array | None

    def write(self, k_BTKH: jax.Array, v_BTKH: jax.Array) -> "LayerCache":
        """The cache with the keys and values of new tokens in their slots."""
        return self.replace(
            keys_BKHS=_write(self.keys_BKHS, k_BTKH.transpose(0, 2, 3, 1), self.time, axis=3),
            values_BKSH=_write(self.values_BKSH, v_BTKH.swapaxes(1, 2), self.time, axis=2),
        )


def _write(cache: jax.Array, new: jax.Array, time: jax.Array, axis: int) -> jax.Array:
    """The cache with T new tokens in their slots, which lie along `axis`."""
    length, slots = new.shape[axis], cache.shape[axis]
    new = new.astype(cache.dtype)
    if length == 1:  # in place
        return jax.lax.dynamic_update_slice_in_dim(cache, new, time % slots, axis)
    index_S = (jnp.arange(slots) - time) % slots  # of the new token that each slot gets, if any
    written_S = jnp.expand_dims(index_S < length, [i for i in range(4) if i != axis])
    return jnp.where(written_S, jnp.take(new, jnp.minimum(index_S, length - 1), axis), cache)


def cache_bias(
    time: jax.Array, length: int, slots: int, padding_B: jax.Array, sliding_window: int | None
) -> jax.Array:
    """What `length` tokens from `time` on see of a cache that holds them; float32 [B, T, S].

    They see no padding, nothing later than themselves, and nothing before the window.
    """
    times_T1 = (time + jnp.arange(length))[:, None]
    last = time + length - 1
    slot_times_S = last - (last - jnp.arange(slots)) % slots
    visible_TS = slot_times_S <= times_T1
    if sliding_window is not None:
        visible_TS &= slot_times_S > times_T1 - sliding_window
    visible_BTS = visible_TS & (slot_times_S >= padding_B[:, None])[:, None]
    return jnp.where(visible_BTS, 0.0, -1e30)  # finite: a row of padding sees nothing at all

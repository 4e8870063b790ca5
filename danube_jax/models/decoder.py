"""The H2O-Danube decoder: a Llama-style transformer with grouped queries and a sliding window.

Danube (arXiv 2401.16818, section 3), Danube3 (arXiv 2407.09276, section 2). Names of modules and
conventions are those of Hugging Face's Mistral and Llama, except that Q, K, V are one matmul and
gate, up are one.

Shape suffixes: B batch, T query length, S key length (cache slots), D model, N query heads,
K KV heads, H head size, F feed-forward, V vocabulary.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_policies

from danube_jax.config import ModelConfig
from danube_jax.models.attention import attention, cached_attention
from danube_jax.models.blocked_attention import DENOMINATOR_NAME, OUTPUT_NAME
from danube_jax.models.gradient_sum import SummedWeight, summed_rows
from danube_jax.models.kv_cache import KVCache, LayerCache, cache_bias
from danube_jax.models.linear import Linear
from danube_jax.models.projections import fused_parts

Params = dict[str, Any]


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in float32 (arXiv 1910.07467)."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        scale_D = self.param("scale", nn.initializers.ones, (x_BTD.shape[-1],), jnp.float32)
        x_BTD = x_BTD.astype(jnp.float32)
        mean_square_BT1 = jnp.mean(jnp.square(x_BTD), axis=-1, keepdims=True)
        normed_BTD = x_BTD * jax.lax.rsqrt(mean_square_BT1 + self.epsilon)
        return (normed_BTD * scale_D.astype(jnp.float32)).astype(self.dtype)


def rotary_tables(
    positions_BT: jax.Array, head_size: int, theta: float
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of RoPE (arXiv 2104.09864), float32 [B, T, 1, H / 2] each."""
    exponents = jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size
    angles_BTH = positions_BT.astype(jnp.float32)[..., None] * theta**-exponents
    return jnp.cos(angles_BTH)[:, :, None], jnp.sin(angles_BTH)[:, :, None]


def apply_rotary(x_BTNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (x[i], x[i + H / 2]) of each head: Hugging Face's `rotate_half`."""
    cos_BT1H, sin_BT1H = tables
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos_BT1H - second * sin_BT1H, second * cos_BT1H + first * sin_BT1H]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)


class SelfAttention(nn.Module):
    """Causal grouped-query self-attention with RoPE."""

    config: ModelConfig
    dtype: jnp.dtype
    linear_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD, rotary, segment_ids_BT=None, layer_cache=None):
        """Returns y_BTD and, where a `LayerCache` is given, its next value."""
        config = self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_size = config.head_size
        std, dtypes = config.initializer_range, (self.dtype, self.linear_dtype)

        parts = functools.partial(fused_parts, config, "self_attn")
        qkv_BTO = Linear(parts("qkv_proj"), std, *dtypes, name="qkv_proj")(x_BTD)
        qkv_BTNH = qkv_BTO.reshape(*x_BTD.shape[:2], heads + 2 * kv_heads, head_size)
        q_BTNH, k_BTKH, v_BTKH = jnp.split(qkv_BTNH, [heads, heads + kv_heads], axis=2)
        q_BTNH, k_BTKH = apply_rotary(q_BTNH, rotary), apply_rotary(k_BTKH, rotary)

        if layer_cache is not None:
            layer_cache = layer_cache.write(k_BTKH, v_BTKH)
        if layer_cache is not None and layer_cache.bias_BTS is not None:
            cached = layer_cache.keys_BKHS, layer_cache.values_BKSH, layer_cache.bias_BTS
            out_BTNH = cached_attention(q_BTNH, *cached)
        else:
            out_BTNH = attention(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                segment_ids_BT=segment_ids_BT,
                sliding_window=config.sliding_window,
                backend=config.attention_backend,
            )

        out_BTO = out_BTNH.reshape(*x_BTD.shape[:2], heads * head_size)
        return Linear(parts("o_proj"), std, *dtypes, name="o_proj")(out_BTO), layer_cache


@jax.custom_vjp
def swiglu(gate_up_BTF: jax.Array) -> jax.Array:
    """silu(gate) * up of the two halves of [B, T, 2 F], computed in float32, in the given dtype.

    The backward pass keeps nothing but its input; plain autodiff keeps several arrays of F.
    """
    gate_BTF, up_BTF = jnp.split(gate_up_BTF.astype(jnp.float32), 2, axis=-1)
    return (gate_BTF * jax.nn.sigmoid(gate_BTF) * up_BTF).astype(gate_up_BTF.dtype)


def _swiglu_forward(gate_up_BTF):
    return swiglu(gate_up_BTF), gate_up_BTF


def _swiglu_backward(gate_up_BTF, dy_BTF):
    gate_BTF, up_BTF = jnp.split(gate_up_BTF.astype(jnp.float32), 2, axis=-1)
    dy_BTF = dy_BTF.astype(jnp.float32)
    sigmoid_BTF = jax.nn.sigmoid(gate_BTF)
    silu_BTF = gate_BTF * sigmoid_BTF
    dgate_BTF = dy_BTF * up_BTF * (sigmoid_BTF + silu_BTF * (1.0 - sigmoid_BTF))
    dgate_up_BTF = jnp.concatenate([dgate_BTF, dy_BTF * silu_BTF], axis=-1)
    return (dgate_up_BTF.astype(gate_up_BTF.dtype),)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate) * up)."""

    config: ModelConfig
    dtype: jnp.dtype
    linear_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config, dtypes = self.config, (self.dtype, self.linear_dtype)
        parts, std = functools.partial(fused_parts, config, "mlp"), config.initializer_range
        gate_up_BTF = Linear(parts("gate_up_proj"), std, *dtypes, name="gate_up_proj")(x_BTD)
        return Linear(parts("down_proj"), std, *dtypes, name="down_proj")(swiglu(gate_up_BTF))


class Block(nn.Module):
    """One pre-norm layer: attention and MLP, each added to the residual stream."""

    config: ModelConfig
    dtype: jnp.dtype
    linear_dtype: jnp.dtype

    def setup(self):
        options = (self.config, self.dtype, self.linear_dtype)
        self.input_layernorm = RMSNorm(self.config.rms_norm_eps, self.dtype)
        self.self_attn = SelfAttention(*options)
        self.post_attention_layernorm = RMSNorm(self.config.rms_norm_eps, self.dtype)
        self.mlp = MLP(*options)

    def __call__(self, x_BTD, rotary, segment_ids_BT=None, layer_cache=None):
        """Returns y_BTD and, where a `LayerCache` is given, its next value."""
        attended_BTD, layer_cache = self.self_attn(
            self.input_layernorm(x_BTD), rotary, segment_ids_BT, layer_cache
        )
        x_BTD = add_residual(x_BTD, attended_BTD)
        mlp_BTD = self.mlp(self.post_attention_layernorm(x_BTD))
        return add_residual(x_BTD, mlp_BTD), layer_cache


def add_residual(x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
    """x + y, as matrices: XLA then adds x inside the matmul that makes y, without copying x."""
    return (jax.lax.collapse(x_BTD, 0, 2) + jax.lax.collapse(y_BTD, 0, 2)).reshape(x_BTD.shape)


def _is_fused_attention(primitive, *_, **__) -> bool:
    # cuDNN's log-denominator has no checkpoint name; its forward kernel is known by its primitive.
    return "dot_product_attention_fwd" in primitive.name


_LINEAR_OUTPUTS = checkpoint_policies.dots_with_no_batch_dims_saveable
_ATTENTION_OUTPUTS = checkpoint_policies.save_only_these_names(OUTPUT_NAME, DENOMINATOR_NAME)


def _saves_linear_and_attention(primitive, *args, **params) -> bool:
    return bool(
        _LINEAR_OUTPUTS(primitive, *args, **params)
        or _ATTENTION_OUTPUTS(primitive, *args, **params)
        or _is_fused_attention(primitive)
    )


REMAT_SAVES = {
    "full": checkpoint_policies.nothing_saveable,
    "dots": _LINEAR_OUTPUTS,
    "attention": _saves_linear_and_attention,
}
"""What the backward pass finds saved inside a block, by `ModelConfig.remat`.

'full': nothing but the block's input. 'dots': the results of the linear layers; attention runs
again. 'attention': these and the attention's output and log-denominator, so that only norms,
RoPE, SwiGLU and residual additions run again (the dense 'xla' backend rebuilds its scores too).
"""


class Embedding(nn.Module):
    """Token embeddings."""

    config: ModelConfig
    dtype: jnp.dtype

    def setup(self):
        config = self.config
        shape = (config.vocab_size, config.hidden_size)
        init = nn.initializers.normal(config.initializer_range)
        given = self.get_variable("params", "embedding")
        summed = isinstance(given, SummedWeight)
        self.embedding = given if summed else self.param("embedding", init, shape, jnp.float32)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        embedding = self.embedding
        if isinstance(embedding, SummedWeight):
            x_BTD = summed_rows(embedding.weight, embedding.sum.total, tokens_BT)
        else:
            x_BTD = embed(embedding, tokens_BT)
        return x_BTD.astype(self.dtype)


@jax.custom_vjp
def embed(embedding_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Rows of the embedding, whose gradients are summed in float32.

    A frequent token's thousands of bfloat16 gradients would stop growing their own sum.
    """
    return jnp.take(embedding_VD, tokens_BT, axis=0)


def _embed_forward(embedding_VD, tokens_BT):
    # An empty array carries the embedding's shape and dtype, which residuals may not hold as such.
    empty_0VD = jnp.zeros((0, *embedding_VD.shape), embedding_VD.dtype)
    return embed(embedding_VD, tokens_BT), (tokens_BT, empty_0VD)


def _embed_backward(residuals, dx_BTD):
    tokens_BT, empty_0VD = residuals
    sum_VD = jnp.zeros(empty_0VD.shape[1:], jnp.float32)
    return sum_VD.at[tokens_BT].add(dx_BTD.astype(jnp.float32)).astype(empty_0VD.dtype), None


embed.defvjp(_embed_forward, _embed_backward)


class Head(nn.Module):
    """The matrix from the last hidden state to the logits."""

    config: ModelConfig

    def setup(self):
        config = self.config
        shape = (config.hidden_size, config.vocab_size)
        init = nn.initializers.normal(config.initializer_range)
        self.kernel = self.param("kernel", init, shape, jnp.float32)


class Decoder(nn.Module):
    """The language model.

    Attributes:
      config: architecture, attention backend and remat policy.
      dtype: dtype of activations, embeddings and head.
      linear_dtype: dtype of the matmuls of the blocks; None means `dtype`.

    Parameters are created in float32 and may be given in any float dtype: they are cast to the
    dtype of the computation they enter.
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32
    linear_dtype: jnp.dtype | None = None

    def setup(self):
        config = self.config
        block_class = Block
        if config.remat != "none":
            block_class = nn.remat(Block, policy=REMAT_SAVES[config.remat], prevent_cse=True)
        linear_dtype = self.dtype if self.linear_dtype is None else self.linear_dtype
        self.embed_tokens = Embedding(config, self.dtype)
        self.layers = [
            block_class(config, self.dtype, linear_dtype) for _ in range(config.num_hidden_layers)
        ]
        self.norm = RMSNorm(config.rms_norm_eps, self.dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Head(config)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the next token, float32 [B, T, V]; arguments as for `hidden_states`."""
        return self.logits(self.hidden_states(tokens_BT, positions_BT, segment_ids_BT))

    def hidden_states(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
    ) -> jax.Array:
        """States after the final norm, [B, T, D] in `dtype`.

        Args:
          tokens_BT: token ids, int32.
          positions_BT: RoPE positions; None counts from 0 in each row. They do not change which
            tokens are visible.
          segment_ids_BT: tokens attend only within their segment; None means one segment a row.
        """
        if positions_BT is None:
            positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        rotary = rotary_tables(positions_BT, self.config.head_size, self.config.rope_theta)
        x_BTD = self.embed_tokens(tokens_BT)
        if self.config.scan_layers and not self.is_initializing():
            return self.norm(self._scan_layers(x_BTD, rotary, segment_ids_BT))
        for layer in self.layers:
            x_BTD, _ = layer(x_BTD, rotary, segment_ids_BT)
        return self.norm(x_BTD)

    def _scan_layers(self, x_BTD, rotary, segment_ids_BT):
        """The layers one after another as a loop, whose body is compiled once.

        What it saves for the backward pass, and each layer's weights, are copied into stacks of all
        layers and out of them, which costs time and memory.
        """
        variables = jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *(dict(layer.variables) for layer in self.layers)
        )
        layer = self.layers[0].clone(parent=None)

        def run(x_BTD, variables):
            return layer.apply(variables, x_BTD, rotary, segment_ids_BT)[0], None

        return jax.lax.scan(run, x_BTD, variables)[0]

    def logits(self, h_BTD: jax.Array) -> jax.Array:
        """Logits of hidden states, accumulated and returned in float32, [B, T, V]."""
        if self.config.tie_word_embeddings:
            kernel_DV = self.embed_tokens.embedding.T
        else:
            kernel_DV = self.lm_head.kernel
        return jnp.dot(h_BTD, kernel_DV.astype(self.dtype), preferred_element_type=jnp.float32)

    def decode_states(
        self,
        tokens_BT: jax.Array,
        cache: KVCache,
        time: jax.Array,
        padding_B: jax.Array | None = None,
        *,
        fresh: bool = False,
    ) -> tuple[jax.Array, KVCache]:
        """Final states of new tokens that attend to the cache and to one another.

        Serves prefill (T tokens of the prompts) and decoding (T = 1). All rows share one clock:
        prompts of different lengths are padded on the left, so that a row's position is the time
        less its padding. Tokens may also be padded on the right, with tokens that are overwritten
        when their time comes again. With a sliding window the cache must have at least
        sliding_window + T - 1 slots; without one, as many as the time after the new tokens.

        Args:
          tokens_BT: new tokens, int32.
          cache: keys and values of all times before `time` (the last S of them).
          time: when the first of the new tokens enters; int32 scalar.
          padding_B: number of padding tokens before each row's first token, counted from time 0;
            None where no row has any.
          fresh: the cache is empty and `time` is 0.

        Returns:
          States after the final norm [B, T, D], and the next cache.
        """
        config, length = self.config, tokens_BT.shape[1]
        times_1T = (time + jnp.arange(length))[None]
        offset_B = jnp.zeros(tokens_BT.shape[:1], jnp.int32) if padding_B is None else padding_B
        positions_BT = jnp.maximum(times_1T - offset_B[:, None], 0)
        rotary = rotary_tables(positions_BT, config.head_size, config.rope_theta)
        segment_ids_BT = bias_BTS = None
        if not fresh:
            bias_BTS = cache_bias(time, length, cache.slots, offset_B, config.sliding_window)
        elif padding_B is not None:
            segment_ids_BT = (times_1T >= padding_B[:, None]).astype(jnp.int32)
        x_BTD = self.embed_tokens(tokens_BT)
        keys, values = [], []
        for i, layer in enumerate(self.layers):
            layer_cache = LayerCache(cache.keys[i], cache.values[i], time, bias_BTS)
            x_BTD, layer_cache = layer(x_BTD, rotary, segment_ids_BT, layer_cache)
            keys.append(layer_cache.keys_BKHS)
            values.append(layer_cache.values_BKSH)
        return self.norm(x_BTD), KVCache(tuple(keys), tuple(values))


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Random float32 parameters: normal(initializer_range) matrices, norm scales of one."""
    # Parameters do not depend on attention, and a backend that trains in bfloat16 on a GPU refuses
    # this float32 trace.
    config = dataclasses.replace(config, attention_backend="xla")
    return Decoder(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters, with nothing allocated."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def param_count(config: ModelConfig) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


def head_kernel(params: Params) -> jax.Array:
    """The matrix [D, V] from hidden states to logits, of a tied or an untied model."""
    if "lm_head" in params:
        return params["lm_head"]["kernel"]
    return params["embed_tokens"]["embedding"].T


def flops_per_token(config: ModelConfig, context_length: int, causal: bool = True) -> float:
    """Model FLOPs of a training step (forward and backward) for one token.

    6 for each parameter of a matmul (the head is one, the embedding lookup is not) plus
    12 * L * N * H * keys for attention, where `keys` is the mean number of keys of a query:
    T / 2 for causal attention, W - W^2 / (2 T) with a window of W < T; all T where `causal` is
    False. Recomputation is not counted.
    """
    width = config.num_attention_heads * config.head_size
    kv_width = config.num_key_value_heads * config.head_size
    layer = config.hidden_size * (2 * width + 2 * kv_width + 3 * config.intermediate_size)
    matmul_params = config.num_hidden_layers * layer + config.hidden_size * config.vocab_size
    keys = float(context_length)
    if causal:
        window = min(config.sliding_window or context_length, context_length)
        keys = window - window**2 / (2 * context_length)
    return 6.0 * matmul_params + 12.0 * config.num_hidden_layers * width * keys

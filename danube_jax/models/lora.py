"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the decoder's kernels.

The adapter of a projection W [in, out] is A [in, r] and B [r, out]; it adds scale * (x A) B to x W.
Adapters belong to Hugging Face's projections, not to the fused kernels, so that a target means what
it means in PEFT. Their tree is ``layers_i / self_attn / {q,k,v,o}_proj / {a, b}`` and
``layers_i / mlp / {gate,up,down}_proj / {a, b}``, float32.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from danube_jax.config import ModelConfig
from danube_jax.errors import UserError
from danube_jax.models.projections import FUSED, PROJECTIONS, projection_shapes

Params = dict[str, Any]

COLLECTION = "lora"  # of Flax variables, from which the decoder's linear modules take adapters


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What PEFT's `LoraConfig` calls r, lora_alpha, lora_dropout, target_modules, use_rslora."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0  # of the adapter's input, in training
    targets: tuple[str, ...] = tuple(PROJECTIONS)
    rslora: bool = False  # scale by the root of the rank (arXiv 2312.03732)

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
          UserError: an impossible value; names the field.
        """
        unknown = sorted(set(self.targets) - set(PROJECTIONS))
        if unknown or not self.targets:
            found = unknown[0] if unknown else "nothing"
            raise UserError(f"lora.targets: {found!r}; expected some of {', '.join(PROJECTIONS)}")
        if len(set(self.targets)) != len(self.targets):
            raise UserError(f"lora.targets: {self.targets} names a projection twice")
        if self.rank < 1:
            raise UserError(f"lora.rank: {self.rank} is not possible; expected a positive number")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"lora.alpha: {self.alpha} is not possible; expected a positive number")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout: {self.dropout}; expected a number in [0, 1)")

    @property
    def scale(self) -> float:
        """Factor of the product A B."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def abstract_adapters(lora: LoraConfig, config: ModelConfig) -> Params:
    """Shapes and dtypes of the adapters, with nothing allocated."""
    shapes = projection_shapes(config)
    tree: Params = {}
    for i in range(config.num_hidden_layers):
        layer: Params = {}
        for name, block in PROJECTIONS.items():
            if name in lora.targets:
                in_size, out_size = shapes[name]
                layer.setdefault(block, {})[name] = {
                    "a": jax.ShapeDtypeStruct((in_size, lora.rank), jnp.float32),
                    "b": jax.ShapeDtypeStruct((lora.rank, out_size), jnp.float32),
                }
        tree[f"layers_{i}"] = layer
    return tree


@functools.partial(jax.jit, static_argnums=(0, 1))
def init_adapters(lora: LoraConfig, config: ModelConfig, key: jax.Array) -> Params:
    """Fresh adapters, which change nothing: A uniform within 1 / sqrt(in), as in PEFT, B zero."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract_adapters(lora, config))
    keys = jax.random.split(key, len(leaves))

    def init(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        if path[-1].key == "b":
            return jnp.zeros(leaf.shape, leaf.dtype)
        bound = 1.0 / math.sqrt(leaf.shape[0])
        return jax.random.uniform(key, leaf.shape, leaf.dtype, -bound, bound)

    arrays = [init(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, arrays)


def merge_kernel(
    kernel_IO: jax.Array,
    adapters: Mapping[str, Any],
    lora: LoraConfig,
    names: tuple[str, ...],
    sizes: tuple[int, ...],
) -> jax.Array:
    """A fused kernel with the adapters of its projections added, in the kernel's dtype.

    Args:
      kernel_IO: [in, out] of `names` side by side.
      adapters: {projection: {"a", "b"}} of the layer's block; some may be absent.
      lora: gives the scale.
      names: the projections in the kernel.
      sizes: out of each.
    """
    column = 0
    kernel_dtype = kernel_IO.dtype
    kernel_IO = kernel_IO.astype(jnp.float32)
    for name, size in zip(names, sizes, strict=True):
        if name in adapters:
            a_IR, b_RO = (jnp.asarray(adapters[name][k], jnp.float32) for k in ("a", "b"))
            delta_IO = lora.scale * jnp.dot(a_IR, b_RO, precision=jax.lax.Precision.HIGHEST)
            kernel_IO = kernel_IO.at[:, column : column + size].add(delta_IO)
        column += size
    return kernel_IO.astype(kernel_dtype)


def merge(params: Params, adapters: Params, lora: LoraConfig, config: ModelConfig) -> Params:
    """The parameters of a plain decoder that computes what base and adapters compute together.

    Args:
      params: the base's, in any float dtype, which the result keeps; the sum is made in float32.
      adapters: as `abstract_adapters` describes them.
      lora: rank, scale and targets.
      config: the model.
    """
    shapes = projection_shapes(config)
    merged = dict(params)
    for layer, blocks in adapters.items():
        merged[layer] = dict(params[layer])
        for (block, module), names in FUSED.items():
            if block not in blocks or not set(names) & set(blocks[block]):
                continue
            sizes = tuple(shapes[name][1] for name in names)
            kernel = merge_kernel(
                params[layer][block][module]["kernel"], blocks[block], lora, names, sizes
            )
            merged[layer][block] = merged[layer][block] | {module: {"kernel": kernel}}
    return merged


def adapter_collection(
    adapters: Params, lora: LoraConfig, dtype: jnp.dtype, row_keys_B: jax.Array | None = None
) -> Params:
    """Adapters as the decoder's variables: ``Decoder.apply({"params": base, COLLECTION: ...})``.

    Args:
      adapters: as `abstract_adapters` describes them.
      lora: gives scale and dropout.
      dtype: to compute in.
      row_keys_B: a random key for each row of the batch, for dropout; None drops nothing. A row's
        mask is a function of its key alone, wherever the row is computed.
    """
    modules = {(block, name): module for (block, module), names in FUSED.items() for name in names}
    collection: Params = {}
    count = 0
    for layer, blocks in adapters.items():
        for block, names in blocks.items():
            for name, sides in names.items():
                count += 1
                entry = {
                    "a": sides["a"].astype(dtype),
                    "b": (lora.scale * sides["b"].astype(jnp.float32)).astype(dtype),
                }
                if row_keys_B is not None and lora.dropout:
                    entry["keys"] = jax.vmap(jax.random.fold_in, (0, None))(row_keys_B, count)
                    entry["keep"] = jnp.float32(1.0 - lora.dropout)
                module = collection.setdefault(layer, {}).setdefault(block, {})
                module.setdefault(modules[block, name], {})[name] = entry
    return collection


def adapter_output(
    x_BTI: jax.Array,
    adapters: Mapping[str, Any],
    parts: tuple[tuple[str, int], ...],
    dtype: jnp.dtype,
) -> jax.Array:
    """What adapters add to a fused linear module, [B, T, O] in `dtype`.

    Args:
      x_BTI: the module's input.
      adapters: {projection: entry of `adapter_collection`}; projections without one add nothing.
      parts: the module's projections and their sizes, in order.
      dtype: to compute in.
    """
    x_BTI = x_BTI.astype(dtype)
    outputs = []
    for name, size in parts:
        if name not in adapters:
            outputs.append(jnp.zeros((*x_BTI.shape[:-1], size), dtype))
            continue
        entry = adapters[name]
        dropped_BTI = _dropout(x_BTI, entry["keys"], entry["keep"]) if "keys" in entry else x_BTI
        outputs.append(jnp.dot(jnp.dot(dropped_BTI, entry["a"]), entry["b"]))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=-1)


def _dropout(x_BTI: jax.Array, keys_B: jax.Array, keep: jax.Array) -> jax.Array:
    """Inverted dropout with a mask of its own for each row."""
    mask_BTI = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x_BTI.shape[1:]))(keys_B)
    return jnp.where(mask_BTI, x_BTI / keep.astype(x_BTI.dtype), 0)

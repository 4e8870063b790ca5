"""FP8 in the training step: which scales a step takes, and what it learns for the next ones.

Inputs and output gradients of the linear layers are scaled by the largest magnitudes of the steps
before (delayed scaling), weights by their own, once a step. Magnitudes are taken in the first
micro-batch of a step only, which lets XLA fuse quantisation with what comes before it in all the
others; over devices they combine by maximum. A run's first step takes its scales from a backward
pass of its own batch under current scaling.

Legend: N linear layers, H steps of history; 2: input, output gradient.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import lax

from danube_jax.config import Fp8Config
from danube_jax.models import fp8
from danube_jax.training.mesh import DATA_AXIS, sharded_dim
from danube_jax.training.weight_sums import KERNEL, Path, linear_layers

PyTree = Any

_FORMATS = (fp8.E4M3, fp8.E5M2)  # of input and output gradient


@flax.struct.dataclass
class Fp8State:
    """What delayed scaling carries from step to step; never clipped, decayed or exported.

    Attributes:
      amax_N2H: float32, largest magnitudes of the last steps, the latest first; 0 where none.
      scale_N2: float32 powers of two; 0 before the first step.
    """

    amax_N2H: jax.Array
    scale_N2: jax.Array


def init_fp8_state(params: PyTree, config: Fp8Config) -> Fp8State:
    """No history, and no scales yet."""
    layers = len(linear_layers(params))
    return Fp8State(
        jnp.zeros((layers, 2, config.amax_history), jnp.float32),
        jnp.zeros((layers, 2), jnp.float32),
    )


def next_state(state: Fp8State, amax_N2: jax.Array, config: Fp8Config) -> Fp8State:
    """The state after a step that saw these magnitudes.

    A magnitude that is zero or not finite says nothing: the tensor keeps history and scale.
    """
    known_N2 = jnp.isfinite(amax_N2) & (amax_N2 > 0)
    rolled_N2H = jnp.concatenate([amax_N2[..., None], state.amax_N2H[..., :-1]], axis=-1)
    amax_N2H = jnp.where(known_N2[..., None], rolled_N2H, state.amax_N2H)
    largest_N2 = jnp.max(amax_N2H, axis=-1)
    scale_N2 = jnp.stack(
        [
            fp8.power_of_two_scale(largest_N2[:, i], dtype, config.margin)
            for i, dtype in enumerate(_FORMATS)
        ],
        axis=-1,
    )
    return Fp8State(amax_N2H, jnp.where(known_N2, scale_N2, state.scale_N2))


def first_state(state: Fp8State, amax_N2: jax.Array, config: Fp8Config) -> Fp8State:
    """The scales of a run's first step; 1 where its magnitudes say nothing."""
    scale_N2 = next_state(state, amax_N2, config).scale_N2
    return state.replace(scale_N2=jnp.where(scale_N2 == 0, 1.0, scale_N2))


def prepare_fp8_weights(
    params: PyTree, specs: PyTree, state: Fp8State
) -> tuple[PyTree, dict[Path, fp8.Fp8Weight]]:
    """Takes the linear layers out of the parameters and quantises them.

    Args:
      params: this device's shards of the float32 parameters; call inside shard_map.
      specs: how they are sharded.
      state: scales of inputs and output gradients.

    Returns:
      The other parameters, as they are; and the layers' whole weights by path.
    """
    flat, flat_specs = (traverse_util.flatten_dict(tree) for tree in (params, specs))
    kernels = {path: flat.pop((*path, KERNEL)) for path in linear_layers(params)}
    largest_N = jnp.stack([fp8.amax(kernel_IO) for kernel_IO in kernels.values()])
    # Of a weight that is not sharded, the maximum over devices is its own.
    scale_N = fp8.power_of_two_scale(lax.pmax(largest_N, DATA_AXIS), fp8.E4M3)
    inverse_N = 1 / scale_N
    scales_N = fp8.Scales.of(scale_N, state.scale_N2[:, 0], state.scale_N2[:, 1])
    weights = {}
    for row, (path, kernel_IO) in enumerate(kernels.items()):
        dim = sharded_dim(flat_specs[*path, KERNEL])
        quantized_IO = fp8.quantize(kernel_IO, inverse_N[row], fp8.E4M3)
        if dim is not None:  # as bytes, which every collective takes
            bytes_IO = lax.bitcast_convert_type(quantized_IO, jnp.uint8)
            bytes_IO = lax.all_gather(bytes_IO, DATA_AXIS, axis=dim, tiled=True)
            quantized_IO = lax.bitcast_convert_type(bytes_IO, fp8.E4M3)
        weights[path] = fp8.Fp8Weight(
            kernel_OI=quantized_IO.T,
            kernel_IO=quantized_IO,
            scale=scale_N[row],
            delayed=jax.tree.map(lambda x_N, row=row: x_N[row], scales_N),
        )
    return traverse_util.unflatten_dict(flat), weights


def select(tree: PyTree, like: PyTree) -> PyTree:
    """The leaves of `tree` that `like` has, too."""
    flat, wanted = traverse_util.flatten_dict(tree), traverse_util.flatten_dict(like)
    return traverse_util.unflatten_dict({path: flat[path] for path in wanted})


def with_zero_sums(others: PyTree, weights: dict[Path, fp8.Fp8Weight]) -> PyTree:
    """Parameters with `Fp8Sums` in place of the linear layers' kernels: what is differentiated."""
    sums = {(*k, KERNEL): fp8.Fp8Sums.zeros(*w.kernel_IO.shape) for k, w in weights.items()}
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(others) | sums)


def joiner(
    weights: dict[Path, fp8.Fp8Weight], config: Fp8Config, *, measure: bool, current: bool = False
) -> Callable[[PyTree], PyTree]:
    """A function from what is differentiated to the parameters that a decoder computes with.

    Its backward pass takes magnitudes where `measure`; with `current`, or where the config asks for
    it throughout, they are the scales, too.
    """
    mode = {"measure": measure, "current": current or config.scaling == "current"}
    mode["fast"] = config.fast_accumulation

    def join(tree: PyTree) -> PyTree:
        flat = traverse_util.flatten_dict(tree)
        for path, weight in weights.items():
            key = (*path, KERNEL)
            flat[key] = fp8.Fp8Kernel(weight.replace(**mode), flat[key])
        return traverse_util.unflatten_dict(flat)

    return join


def split_sums(grads: PyTree) -> tuple[PyTree, jax.Array]:
    """Gradients with plain arrays in place of `Fp8Sums`, and magnitudes float32 [N, 2]."""
    flat = traverse_util.flatten_dict(grads)
    sums = {path: leaf for path, leaf in flat.items() if isinstance(leaf, fp8.Fp8Sums)}
    amax_N2 = jnp.stack(
        [jnp.stack([sums[path].input_amax, sums[path].gradient_amax]) for path in sorted(sums)]
    )
    flat |= {path: leaf.gradient_IO for path, leaf in sums.items()}
    return traverse_util.unflatten_dict(flat), lax.pmax(amax_N2, DATA_AXIS)

"""The training step: three small pure functions under one jit.

`prepare_weights` makes the arrays that the model computes with, once a step; `accumulate` runs
the micro-batches and sums their gradients; `update` clips, steps the optimizer and counts.
Master parameters and optimizer state are float32 and, with ZeRO-1 (Rajbhandari et al., section
5.1), sharded over the mesh's `data` axis: the step gathers weights in the compute dtype and
scatters gradient sums in float32, once each.

Legend: A micro-batches a step, B rows of a micro-batch (all devices), T context.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from danube_jax.training.mesh import DATA_AXIS, shard_spec, sharded_dim
from danube_jax.training.objectives import Objective, counted

PyTree = Any
Batch = Mapping[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """All that a run carries from step to step.

    step: int32 scalar, optimizer steps done, skipped ones included; it is the loader's position.
    skipped: int32 scalar, updates skipped for a non-finite loss or gradient, in all.
    skipped_in_a_row: int32 scalar, of these the latest consecutive ones.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def init_state(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state around float32 `params`."""
    step, skipped, skipped_in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    return TrainState(step, params, optimizer.init(params), skipped, skipped_in_a_row)


def state_specs(state: TrainState, num_devices: int, zero1: bool) -> TrainState:
    """The PartitionSpec of every leaf of a (possibly abstract) state."""
    return jax.tree.map(lambda leaf: shard_spec(leaf.shape, num_devices if zero1 else 1), state)


def state_shardings(mesh: Mesh, specs: TrainState) -> TrainState:
    """`specs` as shardings on `mesh`."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda node: isinstance(node, P)
    )


def prepare_weights(params: PyTree, specs: PyTree, dtype: jnp.dtype) -> PyTree:
    """Whole weights to compute with, from this device's shards; call inside shard_map.

    Matrices are cast to `dtype` before they are gathered; vectors (norm scales) stay float32.
    """

    def prepare(leaf: jax.Array, spec: P) -> jax.Array:
        leaf = leaf.astype(dtype) if leaf.ndim >= 2 else leaf
        dim = sharded_dim(spec)
        return leaf if dim is None else lax.all_gather(leaf, DATA_AXIS, axis=dim, tiled=True)

    return jax.tree.map(prepare, params, specs)


def reduce_gradients(grads: PyTree, specs: PyTree) -> PyTree:
    """Sums local gradients over devices, each device keeping its shard; inside shard_map."""

    def reduce(grad: jax.Array, spec: P) -> jax.Array:
        dim = sharded_dim(spec)
        if dim is None:
            return lax.psum(grad, DATA_AXIS)
        return lax.psum_scatter(grad, DATA_AXIS, scatter_dimension=dim, tiled=True)

    return jax.tree.map(reduce, grads, specs)


def accumulate(
    objective: Objective, weights: PyTree, batch: Batch, frozen: PyTree = None
) -> tuple[PyTree, dict[str, jax.Array]]:
    """Gradients and metric sums of this device's rows of all micro-batches; inside shard_map.

    Args:
      objective: sums of loss and metrics over a micro-batch.
      weights: whole weights in the compute dtype.
      batch: arrays [A, B_local, ...].
      frozen: weights that are not trained, for objectives that have some.

    Returns:
      float32 gradients of (sum of losses) / (valid tokens, or pairs, of the whole step, all
      devices), not yet summed over devices; and metric sums over this device's rows, with
      `weights` the number of valid tokens, or pairs, among them.
    """
    more = () if frozen is None else (frozen,)
    valid = lax.psum(jnp.sum(counted(batch), dtype=jnp.float32), DATA_AXIS)
    scale = 1.0 / jnp.maximum(valid, 1.0)

    def scaled_loss(weights: PyTree, microbatch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss_sum, sums = objective(weights, microbatch, *more)
        sums = sums | {
            "loss": loss_sum,
            "weights": jnp.sum(counted(microbatch), dtype=jnp.float32),
        }
        return loss_sum * scale, sums

    def micro_step(carry: PyTree | None, microbatch: Batch) -> tuple[PyTree, dict[str, jax.Array]]:
        grads, sums = jax.grad(scaled_loss, has_aux=True)(weights, microbatch)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return grads if carry is None else jax.tree.map(jnp.add, carry, grads), sums

    first = jax.tree.map(lambda x: x[0], batch)
    if batch["tokens"].shape[0] == 1:
        return micro_step(None, first)
    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    grads, sums = lax.scan(micro_step, zeros, batch)
    return grads, jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)


def update(
    state: TrainState,
    grads: PyTree,
    loss: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[jax.Array], jax.Array],
    clip_norm: float,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step; a non-finite loss or gradient norm leaves parameters as they are."""
    grad_norm = optax.global_norm(grads)
    if clip_norm:
        scale = jnp.minimum(1.0, clip_norm / jnp.maximum(grad_norm, 1e-12))
        grads = jax.tree.map(lambda g: g * scale, grads)
    direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
    rate = learning_rate(state.step)
    params = jax.tree.map(lambda p, d: p - rate * d, state.params, direction)

    finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)

    def keep(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    skip = 1 - finite.astype(jnp.int32)
    new_state = TrainState(
        step=state.step + 1,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        skipped=state.skipped + skip,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * skip,
    )
    metrics = {
        "grad_norm": grad_norm,
        "learning_rate": rate,
        "skipped": new_state.skipped,
        "skipped_in_a_row": new_state.skipped_in_a_row,
    }
    return new_state, metrics


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[jax.Array], jax.Array],
    *,
    mesh: Mesh,
    specs: TrainState,
    compute_dtype: jnp.dtype,
    clip_norm: float,
    has_frozen: bool = False,
    count_name: str = "valid_tokens",
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step ``(state, batch, stop_D) -> (state, metrics)``; `state` is donated.

    With `has_frozen`, a fourth argument holds weights that are not trained, whole on each device
    and already in the dtype to compute in. `count_name` is the metric of what losses are means of.

    `batch` holds global arrays [A, B, T]; jit compiles once a shape, that is once a phase shape.
    `stop_D` int32 [devices] is 1 where a process wants the run to stop; its sum comes back in
    the metrics, so that all processes stop after the same step without a collective of their own.
    Metrics are means over valid tokens or pairs, on the device.
    """
    shardings = state_shardings(mesh, specs)
    replicated = NamedSharding(mesh, P())

    def gradients(
        params: PyTree, batch: Batch, stop_D: jax.Array, *frozen: PyTree
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        weights = prepare_weights(params, specs.params, compute_dtype)
        grads, sums = accumulate(objective, weights, batch, *frozen)
        sums = lax.psum(sums | {"stop": jnp.sum(stop_D)}, DATA_AXIS)
        return reduce_gradients(grads, specs.params), sums

    sharded_gradients = jax.shard_map(
        gradients,
        mesh=mesh,
        in_specs=(specs.params, P(None, DATA_AXIS), P(DATA_AXIS), *([P()] if has_frozen else [])),
        out_specs=(specs.params, P()),
        check_vma=False,
    )

    def train_step(
        state: TrainState, batch: Batch, stop_D: jax.Array, *frozen: PyTree
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, sums = sharded_gradients(state.params, batch, stop_D, *frozen)
        stop, valid = sums.pop("stop"), sums.pop("weights")
        means = {key: value / jnp.maximum(valid, 1.0) for key, value in sums.items()}
        state, metrics = update(
            state,
            grads,
            means["loss"],
            optimizer=optimizer,
            learning_rate=learning_rate,
            clip_norm=clip_norm,
        )
        return state, means | metrics | {count_name: valid, "stop": stop}

    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(
            shardings,
            NamedSharding(mesh, P(None, DATA_AXIS)),
            None,
            *([replicated] if has_frozen else []),
        ),
        out_shardings=(shardings, replicated),
    )

"""The training step: three small pure functions under one jit.

`prepare_weights` makes the arrays that the model computes with, once a step; `accumulate` runs
the micro-batches and sums their gradients; `update` clips, steps the optimizer and counts.
Master parameters and optimizer state are float32 and, with ZeRO-1 (Rajbhandari et al., section
5.1), sharded over the mesh's `data` axis: the step gathers weights in the compute dtype and
scatters gradient sums in float32, once each. With FP8 (`fp8_scaling.py`) the linear layers' weights
are quantised and gathered as bytes, and their gradients accumulate inside the matmuls.

Legend: A micro-batches a step, B rows of a micro-batch (all devices), T context.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from danube_jax.config import Fp8Config
from danube_jax.models import fp8
from danube_jax.training import fp8_scaling
from danube_jax.training.mesh import DATA_AXIS, shard_spec, sharded_dim
from danube_jax.training.objectives import Objective

PyTree = Any
Batch = Mapping[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """All that a run carries from step to step.

    step: int32 scalar, optimizer steps done, skipped ones included; it is the loader's position.
    skipped: int32 scalar, updates skipped for a non-finite loss or gradient, in all.
    skipped_in_a_row: int32 scalar, of these the latest consecutive ones.
    fp8: `fp8_scaling.Fp8State`; {} where nothing is in FP8.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    fp8: PyTree = flax.struct.field(default_factory=dict)


def init_state(
    params: PyTree, optimizer: optax.GradientTransformation, fp8_config: Fp8Config | None = None
) -> TrainState:
    """A fresh state around float32 `params`; `fp8_config` is None where nothing is in FP8."""
    step, skipped, skipped_in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    scales = {} if fp8_config is None else fp8_scaling.init_fp8_state(params, fp8_config)
    return TrainState(step, params, optimizer.init(params), skipped, skipped_in_a_row, scales)


def state_specs(state: TrainState, num_devices: int, zero1: bool) -> TrainState:
    """The PartitionSpec of every leaf of a (possibly abstract) state."""
    specs = jax.tree.map(lambda leaf: shard_spec(leaf.shape, num_devices if zero1 else 1), state)
    return specs.replace(fp8=jax.tree.map(lambda _: P(), state.fp8))


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
    objective: Objective,
    variables: PyTree,
    batch: Batch,
    *,
    first: PyTree | None = None,
    others: PyTree | None = None,
) -> tuple[PyTree, dict[str, jax.Array]]:
    """Gradients and metric sums of this device's rows of all micro-batches; inside shard_map.

    Args:
      objective: sums of loss and metrics over a micro-batch.
      variables: what is differentiated: `params`, whole weights in the compute dtype; and, with
        FP8, the collection whose gradient is its next value.
      batch: arrays [A, B_local, T].
      first, others: variables beside these for the first micro-batch and for the others; None
        where there are none.

    Returns:
      `variables` in float32 with the gradients of (sum of losses) / (valid tokens of the whole
      step, all devices), not yet summed over devices, in place of `params`, and the other
      collection's last value; and metric sums over this device's rows, with `weights` the valid
      tokens among them.
    """
    valid = lax.psum(jnp.sum(batch["weights"], dtype=jnp.float32), DATA_AXIS)
    scale = 1.0 / jnp.maximum(valid, 1.0)

    def scaled_loss(variables: PyTree, constants: PyTree, microbatch: Batch) -> tuple:
        loss_sum, sums = objective({**variables, **constants}, microbatch)
        sums = sums | {
            "loss": loss_sum,
            "weights": jnp.sum(microbatch["weights"], dtype=jnp.float32),
        }
        return loss_sum * scale, sums

    def micro_step(
        carry: PyTree, microbatch: Batch, constants: PyTree
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        inputs = {**carry, "params": variables["params"]}
        new, sums = jax.grad(scaled_loss, has_aux=True)(inputs, constants, microbatch)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), new["params"])
        if carry["params"] is not None:
            grads = jax.tree.map(jnp.add, carry["params"], grads)
        return {**new, "params": grads}, sums

    rows = batch["weights"].shape[0]
    if rows == 1 or first is not None:
        carry = {**variables, "params": None}
        carry, sums = micro_step(carry, jax.tree.map(lambda x: x[0], batch), first or {})
        if rows == 1:
            return carry, sums
        batch = jax.tree.map(lambda x: x[1:], batch)
    else:
        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), variables["params"])
        carry, sums = {**variables, "params": zeros}, None
    carry, more = lax.scan(lambda c, x: micro_step(c, x, others or {}), carry, batch)
    more = jax.tree.map(lambda x: jnp.sum(x, axis=0), more)
    return carry, more if sums is None else jax.tree.map(jnp.add, sums, more)


def update(
    state: TrainState,
    grads: PyTree,
    loss: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[jax.Array], jax.Array],
    clip_norm: float,
    fp8_state: PyTree | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step; a non-finite loss or gradient norm leaves the state as it is.

    `fp8_state` is what comes after `state.fp8`; None where that stays.
    """
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
        fp8=state.fp8 if fp8_state is None else keep(fp8_state, state.fp8),
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
    fp8_config: Fp8Config | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step ``(state, batch, stop_D) -> (state, metrics)``; `state` is donated.

    `batch` holds global arrays [A, B, T]; jit compiles once a shape, that is once a phase shape.
    `stop_D` int32 [devices] is 1 where a process wants the run to stop; its sum comes back in
    the metrics, so that all processes stop after the same step without a collective of their own.
    Metrics are means over valid tokens, on the device. With `fp8_config`, a run's first call
    measures the scales of its FP8 tensors first.
    """
    shardings = state_shardings(mesh, specs)
    replicated = NamedSharding(mesh, P())
    parts = _gradient_parts(objective, specs, compute_dtype, fp8_config)
    batch_spec = P(None, DATA_AXIS)
    gradients, measure = (
        jax.shard_map(
            part,
            mesh=mesh,
            in_specs=(specs.params, P(), batch_spec, *more),
            out_specs=results,
            check_vma=False,
        )
        for part, more, results in zip(
            parts, [(P(DATA_AXIS),), ()], [(specs.params, P(), P()), P()], strict=True
        )
    )

    def train_step(
        state: TrainState, batch: Batch, stop_D: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, fp8_state, sums = gradients(state.params, state.fp8, batch, stop_D)
        stop, valid = sums.pop("stop"), sums.pop("weights")
        means = {key: value / jnp.maximum(valid, 1.0) for key, value in sums.items()}
        state, metrics = update(
            state,
            grads,
            means["loss"],
            optimizer=optimizer,
            learning_rate=learning_rate,
            clip_norm=clip_norm,
            fp8_state=fp8_state,
        )
        return state, means | metrics | {"valid_tokens": valid, "stop": stop}

    step = jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, NamedSharding(mesh, batch_spec), None),
        out_shardings=(shardings, replicated),
    )
    if fp8_config is None:
        return step
    return _CalibratedStep(step, jax.jit(measure, out_shardings=replicated))


def _gradient_parts(
    objective: Objective, specs: TrainState, compute_dtype: jnp.dtype, config: Fp8Config | None
) -> tuple[Callable, Callable]:
    """The parts of a step that run on every device: gradients, and a first look at magnitudes."""

    def fp8_variables(params: PyTree, fp8_state: PyTree) -> tuple[PyTree, PyTree]:
        quantized = fp8_scaling.prepare_fp8_weights(params, specs.params, fp8_state)
        rest = fp8_scaling.without_linear_layers(params)
        rest_specs = fp8_scaling.without_linear_layers(specs.params)
        weights = prepare_weights(rest, rest_specs, compute_dtype)
        return {"params": weights, fp8.SUMS: fp8_scaling.zero_sums(quantized)}, quantized

    def gradients(
        params: PyTree, fp8_state: PyTree, batch: Batch, stop_D: jax.Array
    ) -> tuple[PyTree, PyTree, dict[str, jax.Array]]:
        if config is None:
            weights = prepare_weights(params, specs.params, compute_dtype)
            results, sums = accumulate(objective, {"params": weights}, batch)
            grads = results["params"]
        else:
            variables, quantized = fp8_variables(params, fp8_state)
            first, others = (
                {fp8.WEIGHTS: fp8_scaling.with_mode(quantized, config, measure=measure)}
                for measure in (True, False)
            )
            results, sums = accumulate(objective, variables, batch, first=first, others=others)
            linear_grads, amax_N2 = fp8_scaling.split_sums(results[fp8.SUMS])
            grads = fp8_scaling.merge(results["params"], linear_grads)
            fp8_state = fp8_scaling.next_state(fp8_state, amax_N2, config)
        sums = lax.psum(sums | {"stop": jnp.sum(stop_D)}, DATA_AXIS)
        return reduce_gradients(grads, specs.params), fp8_state, sums

    def measure(params: PyTree, fp8_state: PyTree, batch: Batch) -> PyTree:
        variables, quantized = fp8_variables(params, fp8_state)
        mode = fp8_scaling.with_mode(quantized, config, measure=True, current=True)
        first = jax.tree.map(lambda x: x[:1], batch)
        results, _ = accumulate(objective, variables, first, first={fp8.WEIGHTS: mode})
        _, amax_N2 = fp8_scaling.split_sums(results[fp8.SUMS])
        return fp8_scaling.first_state(fp8_state, amax_N2, config)

    return gradients, measure


class _CalibratedStep:
    """A step in FP8 that measures the scales of a state that has none yet."""

    def __init__(self, step: Callable, measure: Callable):
        self._step, self._measure, self._calibrated = step, measure, False

    def __call__(
        self, state: TrainState, batch: Batch, stop_D: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        if not self._calibrated:
            if not np.all(jax.device_get(state.fp8.scale_N2)):
                state = state.replace(fp8=self._measure(state.params, state.fp8, batch))
            self._calibrated = True
        return self._step(state, batch, stop_D)

    def lower(self, *arguments: Any) -> Any:
        """As `jax.jit`'s, of the step itself."""
        return self._step.lower(*arguments)

"""The training step: three small pure functions under one jit.

`prepare_weights` makes the arrays that the model computes with, once a step; `accumulate` runs
the micro-batches and sums their gradients; `update` clips, steps the optimizer and counts.
Master parameters and optimizer state are float32 and, with ZeRO-1 (Rajbhandari et al., section
5.1), sharded over the mesh's `data` axis: the step gathers weights in the compute dtype and
scatters gradient sums in float32, once each. The gradients of the linear layers' weights are
summed inside the matmuls (`weight_sums.py`). In FP8 (`fp8_scaling.py`) these weights are quantised
and gathered as bytes.

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
from danube_jax.training import fp8_scaling, weight_sums
from danube_jax.training.mesh import DATA_AXIS, shard_spec, sharded_dim
from danube_jax.training.objectives import Objective, counted
from danube_jax.training.spike_guard import SpikeGuard, init_history, judge
from danube_jax.training.weight_sums import is_sum

PyTree = Any
Batch = Mapping[str, jax.Array]
Join = Callable[[PyTree], PyTree]

# On a GPU. Triton's matmuls can neither add to an accumulator in place nor, in FP8, take scales.
COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
# Marks a field that checkpoints hold only where it is not empty; a fresh one is all zeros.
OPTIONAL = {"optional": True}


@flax.struct.dataclass
class TrainState:
    """All that a run carries from step to step.

    step: int32 scalar, optimizer steps done, skipped ones included; it is the loader's position.
    skipped: int32 scalar, updates skipped in all: for a loss or gradient that is not finite, or
      that the spike guard refuses.
    skipped_in_a_row: int32 scalar, of these the latest consecutive ones.
    fp8: `fp8_scaling.Fp8State`; {} where nothing is in FP8.
    spikes: `spike_guard.SpikeHistory`; {} without a spike guard, and then not in a checkpoint.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    fp8: PyTree = flax.struct.field(default_factory=dict)
    spikes: PyTree = flax.struct.field(default_factory=dict, metadata=OPTIONAL)


def init_state(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    fp8_config: Fp8Config | None = None,
    spike_guard: SpikeGuard | None = None,
) -> TrainState:
    """A fresh state around float32 `params`.

    `fp8_config` is None where nothing is in FP8, `spike_guard` where there is none.
    """
    step, skipped, skipped_in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    scales = {} if fp8_config is None else fp8_scaling.init_fp8_state(params, fp8_config)
    spikes = {} if spike_guard is None else init_history(spike_guard)
    opt_state = optimizer.init(params)
    return TrainState(step, params, opt_state, skipped, skipped_in_a_row, scales, spikes)


def state_specs(state: TrainState, num_devices: int, zero1: bool) -> TrainState:
    """The PartitionSpec of every leaf of a (possibly abstract) state."""
    specs = jax.tree.map(lambda leaf: shard_spec(leaf.shape, num_devices if zero1 else 1), state)
    fp8, spikes = (jax.tree.map(lambda _: P(), part) for part in (state.fp8, state.spikes))
    return specs.replace(fp8=fp8, spikes=spikes)


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
    weights: PyTree,
    batch: Batch,
    frozen: PyTree = None,
    *,
    join_first: Join | None = None,
    join: Join = lambda tree: tree,
) -> tuple[PyTree, dict[str, jax.Array]]:
    """Gradients and metric sums of this device's rows of all micro-batches; inside shard_map.

    Args:
      objective: sums of loss and metrics over a micro-batch.
      weights: what is differentiated: whole weights in the compute dtype, or in place of some of
        them sums, whose gradient is their next value.
      batch: arrays [A, B_local, ...].
      frozen: weights that are not trained, for objectives that have some.
      join_first, join: from such weights to those that the objective takes, for the first
        micro-batch and for the others; None: the first one is like the others.

    Returns:
      float32 gradients of (sum of losses) / (valid tokens, or pairs, of the whole step, all
      devices), not yet summed over devices; and metric sums over this device's rows, with
      `weights` the number of valid tokens, or pairs, among them.
    """
    more = () if frozen is None else (frozen,)
    valid = lax.psum(jnp.sum(counted(batch), dtype=jnp.float32), DATA_AXIS)
    scale = 1.0 / jnp.maximum(valid, 1.0)

    def micro_step(
        carry: PyTree | None, microbatch: Batch, join: Join
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        def scaled_loss(weights: PyTree) -> tuple[jax.Array, dict[str, jax.Array]]:
            loss_sum, sums = objective(join(weights), microbatch, *more)
            count = jnp.sum(counted(microbatch), dtype=jnp.float32)
            return loss_sum * scale, sums | {"loss": loss_sum, "weights": count}

        def add(total: PyTree, grad: PyTree) -> PyTree:
            return grad if is_sum(grad) else total + grad.astype(jnp.float32)

        if carry is None:
            grads, sums = jax.grad(scaled_loss, has_aux=True)(weights)
            return jax.tree.map(lambda g: g.astype(jnp.float32), grads), sums
        inputs = jax.tree.map(lambda w, c: c if is_sum(c) else w, weights, carry, is_leaf=is_sum)
        grads, sums = jax.grad(scaled_loss, has_aux=True)(inputs)
        return jax.tree.map(add, carry, grads, is_leaf=is_sum), sums

    first = jax.tree.map(lambda x: x[0], batch)
    if batch["tokens"].shape[0] == 1:
        return micro_step(None, first, join_first or join)
    if join_first is None:
        totals = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights), None
    else:
        totals = micro_step(None, first, join_first)
        batch = jax.tree.map(lambda x: x[1:], batch)
    grads, sums = lax.scan(lambda carry, x: micro_step(carry, x, join), totals[0], batch)
    sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
    return grads, sums if totals[1] is None else jax.tree.map(jnp.add, totals[1], sums)


def update(
    state: TrainState,
    grads: PyTree,
    loss: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[jax.Array], jax.Array],
    clip_norm: float,
    fp8_state: PyTree | None = None,
    spike_guard: SpikeGuard | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step; what is not finite, or a spike, leaves weights and moments as they are.

    `fp8_state` is what comes after `state.fp8`; None where that stays. With `spike_guard` the
    metrics hold its bounds, `loss_bound` and `grad_norm_bound`.
    """
    grad_norm = optax.global_norm(grads)
    if clip_norm:
        scale = jnp.minimum(1.0, clip_norm / jnp.maximum(grad_norm, 1e-12))
        grads = jax.tree.map(lambda g: g * scale, grads)
    direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
    rate = learning_rate(state.step)
    params = jax.tree.map(lambda p, d: p - rate * d, state.params, direction)

    accepted, spikes = jnp.isfinite(grad_norm) & jnp.isfinite(loss), state.spikes
    bounds: dict[str, jax.Array] = {}
    if spike_guard is not None:
        accepted, bound_2, spikes = judge(spike_guard, state.spikes, loss, grad_norm)
        bounds = {"loss_bound": bound_2[0], "grad_norm_bound": bound_2[1]}

    def keep(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda n, o: jnp.where(accepted, n, o), new, old)

    skip = 1 - accepted.astype(jnp.int32)
    new_state = TrainState(
        step=state.step + 1,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        skipped=state.skipped + skip,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * skip,
        fp8=state.fp8 if fp8_state is None else keep(fp8_state, state.fp8),
        spikes=spikes,
    )
    metrics = {
        "grad_norm": grad_norm,
        "learning_rate": rate,
        "skipped": new_state.skipped,
        "skipped_in_a_row": new_state.skipped_in_a_row,
    }
    return new_state, metrics | bounds


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
    fp8_config: Fp8Config | None = None,
    sum_in_place: bool = True,
    spike_guard: SpikeGuard | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step ``(state, batch, stop_D) -> (state, metrics)``; `state` is donated.

    With `has_frozen`, a fourth argument holds weights that are not trained, whole on each device
    and already in the dtype to compute in. `count_name` is the metric of what losses are means of.

    `batch` holds global arrays [A, B, T]; jit compiles once a shape, that is once a phase shape.
    `stop_D` int32 [devices] is 1 where a process wants the run to stop; its sum comes back in
    the metrics, so that all processes stop after the same step without a collective of their own.
    Metrics are means over valid tokens or pairs, on the device. With `fp8_config`, the first call
    measures the scales of a state that has none yet. `sum_in_place` False leaves the gradients of
    all weights to autodiff and adds them up afterwards (not in FP8).
    `spike_guard` skips spikes as `update` does.
    """
    shardings = state_shardings(mesh, specs)
    replicated = NamedSharding(mesh, P())
    on_gpu = mesh.devices.flat[0].platform in ("cuda", "gpu")
    options = {"compiler_options": COMPILER_OPTIONS} if on_gpu else {}

    batch_spec, more = P(None, DATA_AXIS), [P()] if has_frozen else []
    gradients, measure = (
        jax.shard_map(
            part,
            mesh=mesh,
            in_specs=(specs.params, P(), batch_spec, *inputs),
            out_specs=outputs,
            check_vma=False,
        )
        for part, inputs, outputs in zip(
            _device_parts(objective, specs, compute_dtype, fp8_config, sum_in_place),
            ([P(DATA_AXIS), *more], []),
            ((specs.params, P(), P()), P()),
            strict=True,
        )
    )

    def train_step(
        state: TrainState, batch: Batch, stop_D: jax.Array, *frozen: PyTree
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, fp8_state, sums = gradients(state.params, state.fp8, batch, stop_D, *frozen)
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
            spike_guard=spike_guard,
        )
        return state, means | metrics | {count_name: valid, "stop": stop}

    step = jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(
            shardings,
            NamedSharding(mesh, batch_spec),
            None,
            *([replicated] if has_frozen else []),
        ),
        out_shardings=(shardings, replicated),
        **options,
    )
    if fp8_config is None:
        return step
    return _CalibratedStep(step, jax.jit(measure, out_shardings=replicated, **options))


def _device_parts(
    objective: Objective,
    specs: TrainState,
    compute_dtype: jnp.dtype,
    config: Fp8Config | None,
    sum_in_place: bool,
) -> tuple[Callable, Callable]:
    """The parts of a step that run on every device: gradients, and a first look at magnitudes."""

    def plain_gradients(
        params: PyTree, fp8_state: PyTree, batch: Batch, *frozen: PyTree
    ) -> tuple[PyTree, PyTree, dict[str, jax.Array]]:
        weights = prepare_weights(params, specs.params, compute_dtype)
        weights, summed = weight_sums.split(weights) if sum_in_place else (weights, {})
        grads, sums = accumulate(
            objective, weights, batch, *frozen, join=lambda tree: weight_sums.join(tree, summed)
        )
        return fp8_state, weight_sums.totals(grads), sums

    def prepare_fp8(params: PyTree, fp8_state: PyTree) -> tuple[PyTree, Callable[..., Join]]:
        others, quantized = fp8_scaling.prepare_fp8_weights(params, specs.params, fp8_state)
        others = prepare_weights(others, fp8_scaling.select(specs.params, others), compute_dtype)
        others, summed = weight_sums.split(others)

        def joiner(**mode: bool) -> Join:
            join = fp8_scaling.joiner(quantized, config, **mode)
            return lambda tree: join(weight_sums.join(tree, summed))

        return fp8_scaling.with_zero_sums(others, quantized), joiner

    def fp8_gradients(
        params: PyTree, fp8_state: PyTree, batch: Batch
    ) -> tuple[PyTree, PyTree, dict[str, jax.Array]]:
        weights, joiner = prepare_fp8(params, fp8_state)
        grads, sums = accumulate(
            objective, weights, batch, join_first=joiner(measure=True), join=joiner(measure=False)
        )
        grads, amax_N2 = fp8_scaling.split_sums(weight_sums.totals(grads))
        return fp8_scaling.next_state(fp8_state, amax_N2, config), grads, sums

    def gradients(
        params: PyTree, fp8_state: PyTree, batch: Batch, stop_D: jax.Array, *frozen: PyTree
    ) -> tuple[PyTree, PyTree, dict[str, jax.Array]]:
        compute = plain_gradients if config is None else fp8_gradients
        fp8_state, grads, sums = compute(params, fp8_state, batch, *frozen)
        sums = lax.psum(sums | {"stop": jnp.sum(stop_D)}, DATA_AXIS)
        return reduce_gradients(grads, specs.params), fp8_state, sums

    def measure(params: PyTree, fp8_state: PyTree, batch: Batch) -> PyTree:
        weights, joiner = prepare_fp8(params, fp8_state)
        first = jax.tree.map(lambda x: x[:1], batch)
        grads, _ = accumulate(objective, weights, first, join=joiner(measure=True, current=True))
        return fp8_scaling.first_state(fp8_state, fp8_scaling.split_sums(grads)[1], config)

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

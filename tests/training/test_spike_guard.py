"""The spike guard against its definition in NumPy, in the step, and across a stop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from danube_jax.config import CheckpointConfig, OptimizerConfig
from danube_jax.training.checkpoint import Checkpointer
from danube_jax.training.mesh import DATA_AXIS
from danube_jax.training.optimizer import make_optimizer
from danube_jax.training.spike_guard import SpikeGuard, init_history, judge
from danube_jax.training.step import init_state, state_shardings, state_specs, update

GUARD = SpikeGuard(deviations=6.0, window=16)


def expected_verdicts(guard, losses, norms):
    """The definition, in float64, one step after another."""
    window, verdicts = [], []
    for value in zip(losses, norms, strict=True):
        bound = np.full(2, np.inf)
        if len(window) >= guard.window // 2:
            known = np.array(window)
            bound = known.mean(axis=0) + guard.deviations * known.std(axis=0, ddof=1)
        finite = np.isfinite(value).all()
        verdicts.append(bool(finite and (value <= bound).all()))
        if finite:
            window = [*window, np.minimum(value, bound)][-guard.window :]
    return verdicts


@pytest.mark.parametrize("seed", range(5))
def test_verdicts_are_those_of_the_definition(seed):
    rng = np.random.default_rng(seed)
    losses, norms = rng.normal(3, 0.1, 120), rng.normal(1, 0.05, 120)
    for place in rng.choice(120, 14, replace=False):
        values = losses if rng.integers(2) else norms
        values[place] = rng.choice([np.nan, np.inf, 4.5, 60.0, 1e30, -5.0])
    history, found = init_history(GUARD), []
    step = jax.jit(lambda history, loss, norm: judge(GUARD, history, loss, norm))
    for loss, norm in zip(losses, norms, strict=True):
        fine, _, history = step(history, jnp.float32(loss), jnp.float32(norm))
        found.append(bool(fine))
    # float32 moves a bound by 1e-6 of itself, and no drawn value lies that near to one
    assert found == expected_verdicts(GUARD, losses, norms)
    assert not all(found)


def test_a_lasting_rise_is_let_through_and_a_row_of_spikes_is_not():
    rng = np.random.default_rng(0)
    calm = list(rng.normal(3, 0.1, 64))
    rise = list(rng.normal(5, 0.1, 64))  # twenty deviations, as at a change of phase
    ones = [1.0 + 1e-3 * rng.normal() for _ in range(128)]
    guard = SpikeGuard(6.0, 128)
    verdicts = run(guard, calm + rise, ones)
    skipped = [i for i, fine in enumerate(verdicts) if not fine]
    assert skipped == list(range(64, 64 + len(skipped)))
    assert 1 <= len(skipped) < 20  # max_skipped_steps of the default config
    verdicts = run(guard, calm + [1e4] * 10 + calm, ones + ones)
    assert [i for i, fine in enumerate(verdicts) if not fine] == list(range(64, 74))


def run(guard, losses, norms):
    """Verdicts of a sequence."""
    history, out = init_history(guard), []
    step = jax.jit(lambda history, loss, norm: judge(guard, history, loss, norm))
    for loss, norm in zip(losses, norms, strict=False):
        fine, _, history = step(history, jnp.float32(loss), jnp.float32(norm))
        out.append(bool(fine))
    return out


def test_a_refused_update_leaves_weights_and_moments_and_is_counted():
    params = {"w": jnp.ones((2, 2))}
    optimizer = make_optimizer(OptimizerConfig())
    state = init_state(params, optimizer, spike_guard=GUARD)
    options = {
        "optimizer": optimizer,
        "learning_rate": lambda _: jnp.float32(1e-2),
        "clip_norm": 1.0,
        "spike_guard": GUARD,
    }
    rng = np.random.default_rng(0)
    for _ in range(10):
        grads = {"w": jnp.asarray(rng.normal(1, 0.01, (2, 2)), jnp.float32)}
        state, metrics = update(state, grads, jnp.float32(rng.normal(3, 0.1)), **options)
    assert int(state.skipped) == 0
    assert 2 < metrics["grad_norm_bound"] < 3
    after, metrics = update(state, {"w": jnp.full((2, 2), 50.0)}, jnp.float32(3), **options)
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, state.opt_state)
    assert (int(after.skipped), int(after.skipped_in_a_row), int(after.step)) == (1, 1, 11)
    after, _ = update(after, {"w": jnp.ones((2, 2))}, jnp.float32(3), **options)
    assert (int(after.skipped), int(after.skipped_in_a_row)) == (1, 0)


def sharded_state(guard):
    """A state on eight devices, and what restoring asks for."""
    mesh = Mesh(np.array(jax.devices()), (DATA_AXIS,))
    optimizer = make_optimizer(OptimizerConfig())
    state = init_state({"w": jnp.ones((8, 8))}, optimizer, spike_guard=guard)
    shardings = state_shardings(mesh, state_specs(state, 8, zero1=True))
    state = jax.device_put(state, shardings)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )
    return state, abstract


def test_checkpoints_hold_the_history_and_the_guard_may_be_switched(tmp_path):
    """With and without, with another window, and what was written before there was a guard."""
    state, with_guard = sharded_state(GUARD)
    assert state.spikes.values_2W.sharding.is_fully_replicated
    _, without = sharded_state(None)
    _, wider = sharded_state(dataclasses.replace(GUARD, window=32))
    spikes = state.spikes.replace(
        values_2W=state.spikes.values_2W + 2.5, count=state.spikes.count + 5
    )
    checkpointer = Checkpointer(tmp_path / "c", CheckpointConfig())
    checkpointer.save(1, state.replace(spikes=spikes), {})
    checkpointer.wait()
    restored, _ = checkpointer.restore_latest(with_guard)
    jax.tree.map(np.testing.assert_array_equal, restored.spikes, spikes)
    assert checkpointer.restore_latest(without)[0].spikes == {}
    fresh = checkpointer.restore_latest(wider)[0].spikes
    assert fresh.values_2W.shape == (2, 32)
    assert int(fresh.count) == 0
    checkpointer.save(2, sharded_state(None)[0], {})
    checkpointer.wait()
    tree = ocp.PyTreeCheckpointHandler().metadata(tmp_path / "c" / "2" / "state").tree
    assert set(tree) == {"step", "params", "opt_state", "skipped", "skipped_in_a_row", "fp8"}
    restored, _ = checkpointer.restore_latest(with_guard)
    assert int(restored.spikes.count) == 0
    assert restored.spikes.values_2W.sharding == NamedSharding(restored.step.sharding.mesh, P())
    checkpointer.close()

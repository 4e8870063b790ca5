"""The training step against NumPy, and against itself under accumulation, sharding and ZeRO-1."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from danube_jax.config import ModelConfig, OptimizerConfig
from danube_jax.models.decoder import Decoder, init_params
from danube_jax.training.mesh import DATA_AXIS, put_batch, shard_spec, sharded_dim
from danube_jax.training.objectives import language_modeling
from danube_jax.training.optimizer import make_optimizer
from danube_jax.training.step import (
    init_state,
    make_train_step,
    state_shardings,
    state_specs,
    update,
)

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)
ROWS, CONTEXT = 16, 16
CLIP = 0.5


def constant_rate(_):
    """A schedule that does not change."""
    return jnp.float32(1e-2)


def make_batch(accumulation: int, seed: int = 0) -> dict[str, np.ndarray]:
    """[A, B, T] arrays of one step's sequences, some tokens without weight, unevenly spread."""
    rng = np.random.default_rng(seed)
    window = rng.integers(0, MODEL.vocab_size, (ROWS, CONTEXT + 1), dtype=np.int32)
    weights = (rng.random((ROWS, CONTEXT)) < np.linspace(0.1, 1.0, ROWS)[:, None]).astype(
        np.float32
    )
    arrays = {"tokens": window[:, :-1], "targets": window[:, 1:], "weights": weights}
    shape = (accumulation, ROWS // accumulation, CONTEXT)
    return {key: np.ascontiguousarray(value).reshape(shape) for key, value in arrays.items()}


def run_steps(devices: int, accumulation: int, zero1: bool, steps: int = 2, objective=None):
    """Parameters and the last metrics after some steps from the same initial state."""
    mesh = Mesh(np.array(jax.devices()[:devices]), (DATA_AXIS,))
    if objective is None:
        objective = language_modeling(
            Decoder(MODEL, dtype=jnp.float32), z_loss=1e-4, chunk_tokens=64
        )
    optimizer = make_optimizer(OptimizerConfig())
    state = init_state(jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0)), optimizer)
    specs = state_specs(state, devices, zero1)
    state = jax.device_put(state, state_shardings(mesh, specs))
    step = make_train_step(
        objective,
        optimizer,
        constant_rate,
        mesh=mesh,
        specs=specs,
        compute_dtype=jnp.float32,
        clip_norm=CLIP,
    )
    for i in range(steps):
        batch = put_batch(mesh, make_batch(accumulation, seed=i))
        state, metrics = step(state, batch, np.zeros(devices, np.int32))
    return jax.device_get(state), jax.device_get(metrics)


@pytest.fixture(scope="module")
def reference():
    """One device, no accumulation."""
    return run_steps(devices=1, accumulation=1, zero1=False)


@pytest.mark.parametrize(
    ("devices", "accumulation", "zero1"),
    [(1, 2, True), (1, 4, True), (8, 1, True), (8, 1, False), (8, 2, True), (2, 4, False)],
)
def test_accumulation_and_sharding_change_nothing(reference, devices, accumulation, zero1):
    state, metrics = run_steps(devices, accumulation, zero1)
    expected_state, expected = reference
    for key in ("loss", "grad_norm", "valid_tokens"):
        # float32 sums of ~150 tokens in another order
        np.testing.assert_allclose(metrics[key], expected[key], rtol=2e-6, err_msg=key)
    # Adam's first steps move every weight by about the rate (1e-2), whatever the gradient's
    # size, so rounding of tiny gradients shows; the mean difference is far below it.
    pairs = jax.tree.leaves(
        jax.tree.map(lambda a, b: np.abs(a - b), state.params, expected_state.params)
    )
    assert max(pair.max() for pair in pairs) < 2e-4
    assert np.mean(np.concatenate([pair.ravel() for pair in pairs])) < 2e-7


def test_master_parameters_and_moments_are_sharded():
    params = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
    state = init_state(params, make_optimizer(OptimizerConfig()))
    specs = state_specs(state, 8, zero1=True)
    for tree in (specs.params, specs.opt_state[0].mu, specs.opt_state[0].nu):
        for (path, leaf), spec in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(tree), strict=True
        ):
            assert (sharded_dim(spec) is not None) == (leaf.ndim == 2), path


def test_shard_spec_takes_the_first_dimension_that_divides():
    assert sharded_dim(shard_spec((7, 16), 8)) == 1
    assert sharded_dim(shard_spec((16, 7), 8)) == 0
    assert sharded_dim(shard_spec((7, 7), 8)) is None
    assert sharded_dim(shard_spec((16,), 8)) is None
    assert sharded_dim(shard_spec((16, 16), 1)) is None


def test_gradients_are_scattered_and_weights_gathered_once_a_matrix():
    devices = 8
    mesh = Mesh(np.array(jax.devices()[:devices]), (DATA_AXIS,))
    optimizer = make_optimizer(OptimizerConfig())
    state = jax.eval_shape(lambda: init_state(init_params(MODEL, jax.random.key(0)), optimizer))
    specs = state_specs(state, devices, zero1=True)
    step = make_train_step(
        language_modeling(Decoder(MODEL, dtype=jnp.float32), z_loss=0.0, chunk_tokens=0),
        optimizer,
        constant_rate,
        mesh=mesh,
        specs=specs,
        compute_dtype=jnp.float32,
        clip_norm=CLIP,
    )
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, make_batch(2)))
    text = step.lower(state, batch, jax.ShapeDtypeStruct((devices,), jnp.int32)).as_text()
    matrices = sum(leaf.ndim == 2 for leaf in jax.tree.leaves(state.params))
    assert text.count("stablehlo.reduce_scatter") == matrices
    assert text.count("stablehlo.all_gather") == matrices


def poisoned(value: float):
    """The usual objective, times `value` where the batch holds token 0 first, else times one."""
    base = language_modeling(Decoder(MODEL, dtype=jnp.float32), z_loss=0.0, chunk_tokens=0)

    def objective(weights, batch):
        loss, sums = base(weights, batch)
        return loss * jnp.where(batch["weights"].sum() > 0, value, 1.0), sums

    return objective


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_update_is_skipped_and_counted(value):
    initial = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
    state, metrics = run_steps(1, 1, True, steps=3, objective=poisoned(value))
    jax.tree.map(np.testing.assert_array_equal, state.params, jax.device_get(initial))
    assert (state.step, state.skipped, state.skipped_in_a_row) == (3, 3, 3)
    assert metrics["skipped_in_a_row"] == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.opt_state))


def test_a_good_step_ends_a_row_of_skipped_ones():
    params = {"w": jnp.ones((2, 2))}
    optimizer = make_optimizer(OptimizerConfig())
    state = init_state(params, optimizer)
    options = {"optimizer": optimizer, "learning_rate": constant_rate, "clip_norm": 1.0}
    bad = {"w": jnp.full((2, 2), jnp.nan)}
    state, _ = update(state, bad, jnp.float32(1), **options)
    state, _ = update(state, {"w": jnp.ones((2, 2))}, jnp.float32(1), **options)
    assert (int(state.skipped), int(state.skipped_in_a_row), int(state.step)) == (1, 0, 2)
    assert int(state.opt_state[0].count) == 1


def test_update_is_adamw_with_clipping():
    """Against Loshchilov and Hutter's algorithm 2 in float64, clipped by the global norm."""
    config = dataclasses.replace(OptimizerConfig(), weight_decay=0.1, eps=1e-8)
    rng = np.random.default_rng(0)
    weights = {"matrix": rng.normal(size=(4, 3)), "scale": rng.normal(size=3)}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), weights)
    optimizer = make_optimizer(config)
    state = init_state(params, optimizer)
    first = {key: np.zeros_like(value) for key, value in weights.items()}
    second = {key: np.zeros_like(value) for key, value in weights.items()}
    for t in range(1, 6):
        grads = {key: rng.normal(size=value.shape) for key, value in weights.items()}
        state, metrics = update(
            state,
            jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads),
            jnp.float32(1.0),
            optimizer=optimizer,
            learning_rate=constant_rate,
            clip_norm=CLIP,
        )
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
        for key, weight in weights.items():
            gradient = grads[key] * min(1.0, CLIP / norm)
            first[key] = config.b1 * first[key] + (1 - config.b1) * gradient
            second[key] = config.b2 * second[key] + (1 - config.b2) * gradient**2
            direction = (first[key] / (1 - config.b1**t)) / (
                np.sqrt(second[key] / (1 - config.b2**t)) + config.eps
            )
            decay = config.weight_decay * weight if weight.ndim == 2 else 0.0
            weights[key] = weight - 1e-2 * (direction + decay)
            # float32 arithmetic over five updates of weights of size one
            np.testing.assert_allclose(state.params[key], weights[key], rtol=2e-5, atol=2e-6)

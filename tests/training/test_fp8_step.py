"""The training step in FP8: beside float32, under accumulation and sharding, and restored."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from danube_jax.config import CheckpointConfig, Fp8Config, ModelConfig, OptimizerConfig
from danube_jax.models import fp8
from danube_jax.models.decoder import Decoder, init_params
from danube_jax.training import fp8_scaling
from danube_jax.training.checkpoint import Checkpointer
from danube_jax.training.mesh import DATA_AXIS, put_batch
from danube_jax.training.objectives import language_modeling
from danube_jax.training.optimizer import make_optimizer
from danube_jax.training.step import init_state, make_train_step, state_shardings, state_specs

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)
ROWS, CONTEXT = 16, 32
CONFIG = Fp8Config(amax_history=4)


def make_batch(accumulation, seed=0):
    """[A, B, T] arrays: sequences that count upwards, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    first, stride = rng.integers(0, 64, (ROWS, 1)), rng.integers(1, 4, (ROWS, 1))
    window = ((first + stride * np.arange(CONTEXT + 1)) % 64).astype(np.int32)
    weights = (rng.random((ROWS, CONTEXT)) < 0.8).astype(np.float32)
    arrays = {"tokens": window[:, :-1], "targets": window[:, 1:], "weights": weights}
    shape = (accumulation, ROWS // accumulation, CONTEXT)
    return {key: value.reshape(shape) for key, value in arrays.items()}


class Run:
    """A step, the state it began with, and how both lie on the devices."""

    def __init__(self, config=CONFIG, *, devices=1, model=MODEL, zero1=True, rate=3e-3):
        self.mesh = Mesh(np.array(jax.devices()[:devices]), (DATA_AXIS,))
        optimizer = make_optimizer(OptimizerConfig())
        params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
        state = init_state(params, optimizer, config)
        specs = state_specs(state, devices, zero1)
        self.shardings = state_shardings(self.mesh, specs)
        self.state = jax.device_put(state, self.shardings)
        self._step = make_train_step(
            language_modeling(Decoder(model, dtype=jnp.float32), z_loss=0.0, chunk_tokens=0),
            optimizer,
            lambda _: jnp.float32(rate),
            mesh=self.mesh,
            specs=specs,
            compute_dtype=jnp.float32,
            clip_norm=1.0,
            fp8_config=config,
        )

    def step(self, batch):
        """Takes a step; its metrics."""
        stop = np.zeros(self.mesh.size, np.int32)
        self.state, metrics = self._step(self.state, put_batch(self.mesh, batch), stop)
        return jax.device_get(metrics)

    def steps(self, count, accumulation=1):
        """Metrics of several steps."""
        return [self.step(make_batch(accumulation, seed=i)) for i in range(count)]


def distance(left, right):
    """Norm of the difference of two trees over the norm of the right one."""
    left, right = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(tree))])
        for tree in (left, right)
    )
    return np.linalg.norm(left - right) / np.linalg.norm(right)


@pytest.mark.parametrize("scaling", ["delayed", "current"])
def test_it_learns_as_float32_does(scaling):
    plain = [m["loss"] for m in Run(None).steps(40, 2)]
    quantized = [m["loss"] for m in Run(dataclasses.replace(CONFIG, scaling=scaling)).steps(40, 2)]
    assert abs(quantized[0] - plain[0]) < 0.01 * plain[0]
    assert plain[-1] < 0.75 * plain[0]
    # Each step's gradient differs by some per cent; 2 % of the loss is five times what it comes to.
    np.testing.assert_allclose(quantized, plain, rtol=0.02)


def test_first_gradient_is_close_to_float32():
    plain, quantized = Run(None, rate=0.0), Run(rate=0.0)
    expected, found = plain.steps(1)[0], quantized.steps(1)[0]
    assert abs(found["loss"] / expected["loss"] - 1) < 2e-3
    # Adam's first moment is the gradient times 0.1 (b1 = 0.9), after the same clipping.
    moments = [run.state.opt_state[0].mu for run in (quantized, plain)]
    assert distance(*moments) < 0.12


@pytest.mark.parametrize(
    ("devices", "accumulation", "zero1"), [(1, 4, True), (8, 2, True), (4, 1, False)]
)
def test_accumulation_and_sharding_change_nothing(devices, accumulation, zero1):
    one, other = Run(), Run(devices=devices, zero1=zero1)
    one.steps(1)
    # From the same state on: what the first micro-batch measures depends on its size.
    state = jax.device_get(one.state)
    other.state = jax.device_put(state, other.shardings)
    expected, found = one.step(make_batch(1, seed=7)), other.step(make_batch(accumulation, seed=7))
    # Sums of float32 in another order, and now and then a number that rounds to its other FP8
    # neighbour for it.
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=1e-3)
    assert distance(other.state.opt_state[0].mu, one.state.opt_state[0].mu) < 5e-3
    if accumulation == 1 or devices == 1:
        states = [jax.device_get(run.state.fp8) for run in (other, one)]
        seen = states[0].amax_N2H[..., 0] / states[1].amax_N2H[..., 0]
        assert np.all(seen < 1.001)
        if accumulation == 1:
            np.testing.assert_allclose(seen, 1, rtol=1e-3)


def test_history_moves_once_a_step_whatever_the_accumulation():
    run = Run()
    run.step(make_batch(4))
    first = jax.device_get(run.state.fp8)
    assert np.all(first.amax_N2H[..., 0] > 0)
    assert not np.any(first.amax_N2H[..., 1:])
    run.step(make_batch(4, seed=1))
    second = jax.device_get(run.state.fp8)
    np.testing.assert_array_equal(second.amax_N2H[..., 1], first.amax_N2H[..., 0])
    assert not np.any(second.amax_N2H[..., 2:])
    largest = second.amax_N2H.max(axis=-1)
    expected = [
        fp8.power_of_two_scale(jnp.asarray(largest[:, i]), dtype, CONFIG.margin)
        for i, dtype in enumerate((fp8.E4M3, fp8.E5M2))
    ]
    np.testing.assert_array_equal(second.scale_N2, np.stack(expected, axis=-1))


def test_cold_start_measures_before_the_first_step():
    run = Run(rate=0.0)
    metrics = run.steps(1)[0]
    scales = jax.device_get(run.state.fp8.scale_N2)
    # Gradients of a mean over 400 tokens are far too small for a scale of one.
    assert np.all(scales[:, 1] < 2.0**-10)
    assert np.isfinite(metrics["grad_norm"])
    again = run.steps(1)[0]
    np.testing.assert_allclose(again["grad_norm"], metrics["grad_norm"], rtol=0.02)


def test_a_magnitude_that_says_nothing_keeps_history_and_scale():
    state = fp8_scaling.Fp8State(jnp.full((3, 2, 4), 2.0), jnp.full((3, 2), 0.25))
    amax = jnp.asarray([[0.0, jnp.nan], [jnp.inf, 3.0], [1.0, 5e4]], jnp.float32)
    new = fp8_scaling.next_state(state, amax, CONFIG)
    np.testing.assert_array_equal(new.amax_N2H[0], state.amax_N2H[0])
    np.testing.assert_array_equal(new.amax_N2H[1, 0], state.amax_N2H[1, 0])
    np.testing.assert_array_equal(new.amax_N2H[1, 1], [3, 2, 2, 2])
    # 2 * 3 / 57,344 lies between 2^-14 and 2^-13; 2 * 2 / 448 below 2^-6; 2 * 5e4 / 57,344 below 2.
    np.testing.assert_array_equal(new.scale_N2, [[0.25, 0.25], [0.25, 2.0**-13], [2.0**-6, 2.0]])


def test_a_skipped_update_keeps_the_scales():
    run = Run()
    run.steps(1)
    before = jax.device_get(run.state.fp8)
    params = jax.device_get(run.state.params)
    params["norm"]["scale"] = np.full_like(params["norm"]["scale"], np.nan)
    run.state = jax.device_put(run.state.replace(params=params), run.shardings)
    metrics = run.step(make_batch(2))
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(run.state.fp8), before)


def test_a_restored_run_goes_on_to_the_bit(tmp_path):
    run = Run(devices=2)
    run.steps(2, 2)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    checkpointer.save(2, run.state, {})
    checkpointer.wait()
    metrics = run.step(make_batch(2, seed=5))
    other = Run(devices=2)
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        other.state,
        other.shardings,
    )
    other.state, _ = checkpointer.restore_latest(abstract)
    checkpointer.close()
    assert other.step(make_batch(2, seed=5)) == metrics
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(other.state), jax.device_get(run.state)
    )


@pytest.fixture(scope="module")
def plain_steps():
    """Metrics of two steps of two micro-batches."""
    return Run().steps(2, 2)


@pytest.mark.parametrize("changes", [{"remat": "full"}, {"remat": "dots"}, {"scan_layers": True}])
def test_remat_and_scan_change_nothing(changes, plain_steps):
    expected = plain_steps[-1]
    found = Run(model=dataclasses.replace(MODEL, **changes)).steps(2, 2)[-1]
    np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=1e-4)

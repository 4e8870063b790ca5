"""Gradients summed where they are made, against plain autodiff and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from danube_jax.config import ModelConfig, OptimizerConfig
from danube_jax.models.decoder import Decoder, init_params
from danube_jax.models.gradient_sum import summed_linear, summed_rows
from danube_jax.training import weight_sums
from danube_jax.training.mesh import DATA_AXIS, put_batch
from danube_jax.training.objectives import language_modeling
from danube_jax.training.optimizer import make_optimizer
from danube_jax.training.step import init_state, make_train_step, state_shardings, state_specs

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def first_moment(dtype, *, accumulation, sum_in_place, **changes):
    """Adam's first moment after a step, which is a tenth of the gradient; and the metrics."""
    model = ModelConfig(**SIZES, **changes)
    mesh = Mesh(np.array(jax.devices()[:2]), (DATA_AXIS,))
    optimizer = make_optimizer(OptimizerConfig())
    state = init_state(jax.jit(init_params, static_argnums=0)(model, jax.random.key(0)), optimizer)
    specs = state_specs(state, mesh.size, zero1=True)
    state = jax.device_put(state, state_shardings(mesh, specs))
    step = make_train_step(
        language_modeling(Decoder(model, dtype), z_loss=0.0, chunk_tokens=48),
        optimizer,
        lambda _: jnp.float32(1e-3),
        mesh=mesh,
        specs=specs,
        compute_dtype=dtype,
        clip_norm=0.0,
        sum_in_place=sum_in_place,
    )
    rng = np.random.default_rng(1)
    window = rng.integers(0, 64, (16, 17), dtype=np.int32)
    weights = (rng.random((16, 16)) < 0.8).astype(np.float32)
    arrays = {"tokens": window[:, :-1], "targets": window[:, 1:], "weights": weights}
    batch = {k: v.reshape(accumulation, 16 // accumulation, 16) for k, v in arrays.items()}
    state, metrics = step(state, put_batch(mesh, batch), np.zeros(2, np.int32))
    return jax.device_get(state.opt_state[0].mu), jax.device_get(metrics)


@pytest.mark.parametrize(
    ("accumulation", "changes"),
    [
        (1, {}),
        (4, {"tie_word_embeddings": True}),
        (4, {"remat": "full", "scan_layers": True}),
    ],
)
def test_the_step_is_that_of_plain_autodiff(accumulation, changes):
    options = {"accumulation": accumulation, **changes}
    plain, plain_metrics = first_moment(jnp.float32, sum_in_place=False, **options)
    summed, metrics = first_moment(jnp.float32, sum_in_place=True, **options)
    np.testing.assert_allclose(metrics["loss"], plain_metrics["loss"], rtol=1e-6)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain))
    # float32 sums of the same products, of which a fused one may take another order
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * scale), summed, plain
    )


def test_bfloat16_gradients_are_closer_to_float32():
    exact, _ = first_moment(jnp.float32, accumulation=8, sum_in_place=False)
    distances = []
    for sum_in_place in (False, True):
        found, _ = first_moment(jnp.bfloat16, accumulation=8, sum_in_place=sum_in_place)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
        distances.append(np.sqrt(sum(((a - b) ** 2).sum() for a, b in pairs)))
    assert distances[1] < distances[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_linear_adds_to_its_sum_in_float32(dtype):
    rng = np.random.default_rng(0)
    x, kernel, dy = (
        jnp.asarray(rng.normal(size=shape), dtype) for shape in ((2, 64, 24), (24, 40), (2, 64, 40))
    )
    total = jnp.asarray(rng.normal(size=(24, 40)), jnp.float32)
    y, pullback = jax.vjp(summed_linear, x, kernel, total)
    dx, _, next_total = pullback(dy)
    x64, kernel64, dy64 = (np.asarray(a, np.float64) for a in (x, kernel, dy))
    assert (y.dtype, dx.dtype, next_total.dtype) == (dtype, dtype, jnp.float32)
    # float32 sums of size 10, and one rounding to the dtype, which the total has not.
    tolerance = {"rtol": float(jnp.finfo(dtype).eps), "atol": 2e-5}
    np.testing.assert_allclose(np.asarray(y, np.float64), x64 @ kernel64, **tolerance)
    np.testing.assert_allclose(np.asarray(dx, np.float64), dy64 @ kernel64.T, **tolerance)
    exact = np.asarray(total, np.float64) + np.einsum("bti,bto->io", x64, dy64)
    np.testing.assert_allclose(next_total, exact, rtol=1e-5, atol=1e-5)


def test_embedding_adds_to_its_sum_in_float32():
    tokens = jnp.zeros((4, 1_024), jnp.int32).at[:, ::7].set(3)
    dx = (1.0 + jax.random.normal(jax.random.key(0), (4, 1_024, 8))).astype(jnp.bfloat16)
    total = jnp.full((5, 8), 0.5, jnp.float32)
    rows, pullback = jax.vjp(lambda t: summed_rows(jnp.ones((5, 8), dx.dtype), t, tokens), total)
    assert rows.dtype == jnp.bfloat16
    (found,) = pullback(dx)
    exact = np.full((5, 8), 0.5)
    np.add.at(exact, np.asarray(tokens), np.asarray(dx, np.float64))
    np.testing.assert_allclose(found, exact, rtol=1e-5)


def test_what_is_split_off():
    def paths(**changes):
        params = jax.eval_shape(init_params, ModelConfig(**SIZES, **changes), jax.random.key(0))
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
        trained, weights = weight_sums.split(params)
        joined = weight_sums.join(trained, weights)
        found = jax.tree.leaves(trained, is_leaf=weight_sums.is_sum)
        assert sum(map(weight_sums.is_sum, found)) == len(weights)
        # Joining brings the weights back, and totals the tree's own shapes.
        assert len(jax.tree.leaves(joined)) == len(jax.tree.leaves(params)) + len(weights)
        shapes = [
            [leaf.shape for leaf in jax.tree.leaves(t)]
            for t in (weight_sums.totals(trained), params)
        ]
        assert shapes[0] == shapes[1]
        return set(weights)

    untied = paths()
    assert ("embed_tokens", "embedding") in untied
    assert len(untied) == 4 * 2 + 1
    tied = paths(tie_word_embeddings=True)  # used twice: as embedding and as head
    assert tied == untied - {("embed_tokens", "embedding")}
    adapters = {"layers_0": {"self_attn": {"q_proj": {"a": jnp.zeros((4, 2))}}}}
    assert weight_sums.split(adapters) == (adapters, {})

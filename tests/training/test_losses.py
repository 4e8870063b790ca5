"""Chunked cross-entropy against the plain form and against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from danube_jax.training.losses import chunked_cross_entropy, cross_entropy, token_nll

TOKENS, MODEL, VOCAB = 50, 12, 37


def make_inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    h = jnp.asarray(rng.normal(size=(TOKENS, MODEL)), dtype)
    head = jnp.asarray(rng.normal(size=(MODEL, VOCAB)), dtype)
    targets = jnp.asarray(rng.integers(0, VOCAB, TOKENS), jnp.int32)
    weights = jnp.asarray(rng.choice([0.0, 1.0, 0.25], TOKENS), jnp.float32)
    return h, head, targets, weights


def reference(h, head, targets, weights, z_loss):
    """Weighted NLL and z-loss in float64."""
    logits = np.asarray(h, np.float64) @ np.asarray(head, np.float64)
    shift = logits.max(axis=-1)
    lse = shift + np.log(np.exp(logits - shift[:, None]).sum(axis=-1))
    nll = lse - logits[np.arange(len(targets)), targets]
    weights = np.asarray(weights, np.float64)
    return (weights * nll).sum(), (z_loss * weights * lse**2).sum()


@pytest.mark.parametrize(("chunk_tokens", "z_loss"), [(0, 0.01), (7, 0.0), (10, 0.01), (64, 0.0)])
def test_chunked_equals_plain(chunk_tokens, z_loss):
    h, head, targets, weights = make_inputs()

    def chunked(h, head):
        options = {"chunk_tokens": chunk_tokens, "z_loss": z_loss}
        return chunked_cross_entropy(h, head, targets, weights, **options)

    def plain(h, head):
        return cross_entropy(h @ head, targets, weights, z_loss)

    def differentiate(loss):
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(h, head)

    (loss, aux), gradients = differentiate(chunked)
    (_, plain_aux), expected = differentiate(plain)
    undifferentiated, undifferentiated_aux = jax.jit(chunked)(h, head)
    nll, z = reference(h, head, targets, weights, z_loss)
    # Sums of 50 float32 terms of order 1 to 10.
    np.testing.assert_allclose(loss, nll + z, rtol=1e-5)
    np.testing.assert_allclose(undifferentiated, nll + z, rtol=1e-5)
    for sums in (aux, plain_aux, undifferentiated_aux):
        np.testing.assert_allclose(sums["nll_sum"], nll, rtol=1e-5)
        np.testing.assert_allclose(sums["z_loss_sum"], z, rtol=1e-5)
        np.testing.assert_allclose(sums["weight_sum"], weights.sum(), rtol=1e-6)
    for ours, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_match_finite_differences_in_float64():
    h, head, targets, weights = make_inputs()
    z_loss, step = 0.01, 1e-6

    def loss(h, head):
        options = {"chunk_tokens": 16, "z_loss": z_loss}
        return chunked_cross_entropy(h, head, targets, weights, **options)[0]

    # A cotangent other than one must scale the gradients.
    dh, dhead = jax.grad(lambda h, head: 3.0 * loss(h, head), argnums=(0, 1))(h, head)
    rng = np.random.default_rng(1)
    for argument, gradient in ((0, dh), (1, dhead)):
        direction = rng.normal(size=gradient.shape)
        moved = []
        for sign in (1, -1):
            values = [np.asarray(h, np.float64), np.asarray(head, np.float64)]
            values[argument] = values[argument] + sign * step * direction
            moved.append(sum(reference(*values, targets, weights, z_loss)))
        numeric = 3.0 * (moved[0] - moved[1]) / (2 * step)
        np.testing.assert_allclose(np.sum(gradient * direction), numeric, rtol=1e-4)


def test_weight_zero_leaves_a_token_out():
    h, head, targets, weights = make_inputs()
    other = targets.at[weights == 0].set((targets[weights == 0] + 1) % VOCAB)

    def loss(h, targets):
        return chunked_cross_entropy(h, head, targets, weights, chunk_tokens=16)[0]

    dh = jax.grad(loss)(h, targets)
    assert loss(h, targets) == loss(h, other)
    assert not np.any(dh[weights == 0])
    assert np.all(np.any(dh[weights > 0] != 0, axis=-1))


@pytest.mark.parametrize("chunk_tokens", [0, 16])
def test_token_nll(chunk_tokens):
    h, head, targets, _ = make_inputs()
    nll = token_nll(h, head, targets, chunk_tokens=chunk_tokens)
    expected = -jax.nn.log_softmax(h @ head)[np.arange(TOKENS), targets]
    np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-5)


def test_dtypes_of_mixed_precision():
    h, _, targets, weights = make_inputs(jnp.bfloat16)
    head = make_inputs(jnp.float32)[1]

    def loss(h, head):
        return chunked_cross_entropy(h, head, targets, weights, chunk_tokens=16)[0]

    value, (dh, dhead) = jax.value_and_grad(loss, argnums=(0, 1))(h, head)
    assert (value.dtype, dh.dtype, dhead.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    exact = sum(reference(h.astype(jnp.float32), head, targets, weights, 0.0))
    # Logits and head are rounded to bfloat16 (2^-9 each), errors average over 50 tokens.
    np.testing.assert_allclose(value, exact, rtol=1e-2)


def jaxpr_shapes(jaxpr):
    """(shape, dtype) of every value in a jaxpr, nested ones included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield tuple(variable.aval.shape), variable.aval.dtype
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from jaxpr_shapes(getattr(value, "jaxpr", value))


def _is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def test_all_logits_never_exist_at_once():
    h, head, targets, weights = make_inputs()

    def chunked(h, head):
        return chunked_cross_entropy(h, head, targets, weights, chunk_tokens=10)[0]

    def plain(h, head):
        return cross_entropy(h @ head, targets, weights)[0]

    def holds_all_logits(loss):
        jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(h, head).jaxpr
        shapes = {shape for shape, _ in jaxpr_shapes(jaxpr)}
        assert shapes
        return any(np.prod(shape) >= TOKENS * VOCAB for shape in shapes)

    assert holds_all_logits(plain)  # the search finds them where they are
    assert not holds_all_logits(chunked)

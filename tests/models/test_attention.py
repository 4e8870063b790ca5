"""Every backend that runs on a CPU against dense attention in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from danube_jax.errors import UserError
from danube_jax.models import attention as attention_lib
from danube_jax.models.attention import attention, cached_attention

CPU_BACKENDS = ("xla", "blocked", "auto")

run = jax.jit(attention, static_argnames=("sliding_window", "backend"))


def reference(q, k, v, window=None, segments=None, positions=None):
    """Dense float64 attention, with explicit loops over heads."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, length, heads, size = q.shape
    group = heads // k.shape[2]
    out = np.zeros_like(q)
    for b in range(batch):
        i = np.arange(length)[:, None] if positions is None else np.asarray(positions)[b][:, None]
        j = np.arange(k.shape[1])[None]
        visible = j <= i
        if window is not None:
            visible &= j > i - window
        if segments is not None:
            visible &= np.asarray(segments)[b][:, None] == np.asarray(segments)[b][None]
        for n in range(heads):
            scores = q[b, :, n] @ k[b, :, n // group].T / np.sqrt(size)
            scores[~visible] = -np.inf
            p = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[b, :, n] = p / p.sum(axis=-1, keepdims=True) @ v[b, :, n // group]
    return out


def make_inputs(length, heads, kv_heads, size=10, key_length=None, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(2, length, heads, size)] + 2 * [(2, key_length or length, kv_heads, size)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def make_segments(length):
    """Two rows of documents of unequal lengths; the second ends in padding."""
    cuts = ([length // 3, length // 2 + 1], [5, length - length // 4])
    rows = [np.searchsorted(row, np.arange(length), side="right") + 1 for row in cuts]
    rows[1][length - length // 4 :] = 0
    return jnp.asarray(np.stack(rows), jnp.int32)


# Rounding of float32: outputs are means of values of order 1.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}


@pytest.mark.parametrize("backend", ["xla", "blocked"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "window", "segmented"),
    [
        (4, 2, None, False),
        (4, 2, 150, False),
        (4, 2, None, True),
        (3, 3, 150, True),
        (3, 3, None, False),
        (4, 1, 1, False),
        (4, 1, 300, True),
        (4, 2, 1_000, False),
    ],
)
def test_matches_float64(backend, heads, kv_heads, window, segmented):
    length = 300  # not a whole number of blocks
    q, k, v = make_inputs(length, heads, kv_heads)
    segments = make_segments(length) if segmented else None
    out = run(q, k, v, sliding_window=window, segment_ids_BT=segments, backend=backend)
    np.testing.assert_allclose(out, reference(q, k, v, window, segments), **TOLERANCE)


@pytest.mark.parametrize("length", [1, 257])
def test_blocked_takes_any_length(length):
    q, k, v = make_inputs(length, 4, 2)
    out = run(q, k, v, sliding_window=5, backend="blocked")
    np.testing.assert_allclose(out, reference(q, k, v, window=5), **TOLERANCE)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_over_a_cache(window, dtype):
    q, k, v = make_inputs(2, 4, 2, key_length=12)
    positions = np.array([[3, 4], [10, 11]])
    keys = np.arange(12)
    visible = keys <= positions[..., None]
    if window is not None:
        visible &= keys > positions[..., None] - window
    bias = np.where(visible, 0.0, -1e30).astype(np.float32)
    cached = (k.transpose(0, 2, 3, 1).astype(dtype), v.swapaxes(1, 2).astype(dtype))
    out = jax.jit(cached_attention)(q.astype(dtype), *cached, bias)
    assert out.dtype == dtype
    # Queries, keys, values, probabilities and the output are rounded to bfloat16 (2^-9 each).
    tolerance = TOLERANCE if dtype == jnp.float32 else {"rtol": 2**-6, "atol": 2**-5}
    expected = reference(q, k, v, window, None, positions)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, **tolerance)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("few_rows", [False, True])
def test_blocked_gradients_match_dense(window, segmented, few_rows, monkeypatch):
    if few_rows:  # as for long sequences: rows in several chunks
        monkeypatch.setattr("danube_jax.models.blocked_attention._CACHED_SCORES", 1)
    length = 200
    q, k, v = make_inputs(length, 4, 2)
    segments = make_segments(length) if segmented else None
    weights = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

    def loss(backend, q, k, v):
        options = {"sliding_window": window, "segment_ids_BT": segments, "backend": backend}
        return jnp.sum(weights * attention(q, k, v, **options))

    gradients = jax.jit(jax.grad(loss, argnums=(1, 2, 3)), static_argnums=0)
    ours, dense = gradients("blocked", q, k, v), gradients("xla", q, k, v)
    for a, b in zip(ours, dense, strict=True):
        # Sums of up to 200 products of order 1, in another order.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_blocked_memory_grows_with_the_block_not_the_square():
    q, k, v = (jax.ShapeDtypeStruct((1, 4_096, 2, 8), jnp.float32) for _ in range(3))

    def loss(backend, q, k, v):
        return jnp.sum(attention(q, k, v, backend=backend))

    def temporary(backend):
        gradient = jax.jit(jax.grad(lambda *x: loss(backend, *x), argnums=(0, 1, 2)))
        return gradient.lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    assert temporary("blocked") < temporary("xla") / 4


def test_bfloat16_in_bfloat16_out():
    q, k, v = (x.astype(jnp.bfloat16) for x in make_inputs(64, 4, 2))
    for backend in CPU_BACKENDS:
        out = run(q, k, v, backend=backend)
        assert out.dtype == jnp.bfloat16
        # The output (2^-9), and in the dense backend the probabilities, are rounded to bfloat16.
        np.testing.assert_allclose(
            out.astype(np.float32), reference(q, k, v), rtol=2**-6, atol=2**-6
        )


@pytest.mark.parametrize(
    ("options", "dtype", "size", "platform", "reason"),
    [
        ({}, jnp.bfloat16, 16, "cpu", "needs an NVIDIA GPU"),
        ({}, jnp.float32, 16, "gpu", "bfloat16 or float16, not float32"),
        ({}, jnp.bfloat16, 10, "gpu", "multiples of 8 up to 256, not 10"),
        ({"segment_ids_BT": jnp.ones((2, 6), int)}, jnp.bfloat16, 16, "gpu", "segment ids"),
    ],
)
def test_cudnn_refuses_with_the_reason(options, dtype, size, platform, reason, monkeypatch):
    monkeypatch.setattr(attention_lib, "_platform", lambda: platform)
    q, k, v = (x.astype(dtype) for x in make_inputs(6, 4, 2, size))
    with pytest.raises(UserError, match=reason):
        attention(q, k, v, backend="cudnn", **options)
    if platform == "gpu":  # what cuDNN cannot honour, auto computes some other way
        out = attention(q, k, v, backend="auto", **options)
        expected = attention(q, k, v, backend="xla", **options)
        np.testing.assert_array_equal(out, expected)


def test_other_refusals():
    q, k, v = make_inputs(6, 4, 2)
    with pytest.raises(UserError, match="expected one of"):
        attention(q, k, v, backend="flash")
    with pytest.raises(UserError, match="as many keys as queries"):
        attention(q[:, :3], k, v)
    with pytest.raises(UserError, match="evenly"):
        attention(q[:, :, :3], k, v)
    with pytest.raises(UserError, match="do not fit"):
        attention(q, k[..., :4], v)

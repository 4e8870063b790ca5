"""FP8 linear layers against float64 arithmetic and against the unquantised layer."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from danube_jax.models import fp8

M, I, O = 256, 512, 384  # noqa: E741


def relative_error(found, expected):
    """Norm of the difference over the norm of what is expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def make_weight(kernel_IO, *, input_amax, gradient_amax, **mode):
    """The weight of a layer whose scales fit these magnitudes."""
    scale = fp8.power_of_two_scale(fp8.amax(kernel_IO), fp8.E4M3)
    quantized_IO = fp8.quantize(kernel_IO, 1 / scale, fp8.E4M3)
    return fp8.Fp8Weight(
        kernel_OI=quantized_IO.T,
        kernel_IO=quantized_IO,
        scale=scale,
        delayed=fp8.Scales.of(
            scale,
            fp8.power_of_two_scale(jnp.float32(input_amax), fp8.E4M3),
            fp8.power_of_two_scale(jnp.float32(gradient_amax), fp8.E5M2),
        ),
        **mode,
    )


@pytest.fixture(scope="module")
def arrays():
    """Inputs, kernel and output gradient of a layer, normally distributed."""
    rng = np.random.default_rng(0)
    shapes = {"x": (2, M // 2, I), "kernel": (I, O), "dy": (2, M // 2, O)}
    scales = {"x": 1.0, "kernel": 0.02, "dy": 1e-7}  # as in training: dy is far below E5M2's least
    return {k: jnp.asarray(rng.normal(size=s) * scales[k], jnp.float32) for k, s in shapes.items()}


def run(arrays, dtype=jnp.float32, **mode):
    """Output, input gradient, and the sums' next values, from sums that are not zero."""
    x, dy = arrays["x"].astype(dtype), arrays["dy"].astype(dtype)
    weight = make_weight(
        arrays["kernel"], input_amax=fp8.amax(x), gradient_amax=fp8.amax(dy), **mode
    )
    sums = fp8.Fp8Sums(jnp.full((I, O), 1e-7), jnp.float32(0.5), jnp.float32(2e-9))
    y, pullback = jax.vjp(lambda x, sums: fp8.fp8_linear(x, fp8.Fp8Kernel(weight, sums)), x, sums)
    return weight, y, *pullback(dy)


@pytest.mark.parametrize("amax", [1.0, 0.75, 448.0, 448.1, 3e-9, 1e9, 2.0**-20, 57_344.0])
@pytest.mark.parametrize("margin", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [fp8.E4M3, fp8.E5M2])
def test_scale_is_the_least_power_of_two_that_fits(amax, margin, dtype):
    scale = float(fp8.power_of_two_scale(jnp.float32(amax), dtype, margin))
    assert math.frexp(scale)[0] == 0.5
    # The quotient in float32 has three roundings, which matter at equality only.
    assert amax * margin <= scale * fp8.LARGEST[dtype] * (1 + 2**-22)
    assert amax * margin > scale / 2 * fp8.LARGEST[dtype] * (1 - 2**-22)


def test_scales_stay_where_products_of_two_are_finite():
    extremes = jnp.asarray([1e-30, 3e38, 0.0], jnp.float32)
    scales = fp8.power_of_two_scale(extremes, fp8.E4M3)
    np.testing.assert_array_equal(scales, [2.0**-60, 2.0**60, 1.0])


@pytest.mark.parametrize("dtype", [fp8.E4M3, fp8.E5M2])
def test_quantising_clips_and_rounds_to_nearest(dtype):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=1_000) * 10.0 ** rng.uniform(-9, 9, 1_000), [0, 1e30]])
    x = x.astype(np.float32)
    scale = 2.0**-3
    found = np.asarray(fp8.quantize(jnp.asarray(x), jnp.float32(1 / scale), dtype)).astype(
        np.float64
    )
    largest = fp8.LARGEST[dtype]
    numpy_type = {fp8.E4M3: ml_dtypes.float8_e4m3fn, fp8.E5M2: ml_dtypes.float8_e5m2}[dtype]
    expected = np.clip(x.astype(np.float64) / scale, -largest, largest).astype(numpy_type)
    np.testing.assert_array_equal(found, expected.astype(np.float64))
    assert np.isfinite(found).all()


def test_a_power_of_two_scale_changes_no_bit():
    x = jnp.asarray(np.random.default_rng(1).normal(size=1_000), jnp.float32)
    plain = fp8.quantize(x, jnp.float32(1), fp8.E5M2).astype(jnp.float32)
    scaled = fp8.quantize(x * 2**-20, jnp.float32(2**20), fp8.E5M2).astype(jnp.float32)
    np.testing.assert_array_equal(plain, scaled)


@pytest.mark.parametrize("current", [False, True])
def test_layer_is_close_to_the_unquantised_one(arrays, current):
    _, y, dx, _ = run(arrays, current=current)
    x, kernel, dy = (np.asarray(arrays[k], np.float64) for k in ("x", "kernel", "dy"))
    # 3 mantissa bits in x and weight, 2 in dy: measured 3.8 % and 5.9 %.
    assert relative_error(y, x @ kernel) < 0.05
    assert relative_error(dx, dy @ kernel.T) < 0.08


def test_weight_gradient_is_added_to_its_sum(arrays):
    weight, _, _, sums = run(arrays)
    x, dy = (np.asarray(arrays[k], np.float64).reshape(M, -1) for k in ("x", "dy"))
    assert relative_error(sums.gradient_IO - 1e-7, x.T @ dy) < 0.08
    scales = [1 / float(s) for s in (weight.delayed.input_inverse, weight.delayed.gradient_inverse)]
    exact_x = (x / scales[0]).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scales[0]
    exact_dy = (dy / scales[1]).astype(ml_dtypes.float8_e5m2).astype(np.float64) * scales[1]
    exact = 1e-7 + exact_x.T @ exact_dy
    assert relative_error(sums.gradient_IO, exact) < 1e-6  # float32 sums of 256 products


def test_magnitudes_combine_by_maximum(arrays):
    _, _, _, sums = run(arrays)
    assert sums.input_amax == jnp.max(jnp.abs(arrays["x"]))
    assert sums.gradient_amax == jnp.max(jnp.abs(arrays["dy"]))
    _, _, _, kept = run(arrays, measure=False)
    assert (float(kept.input_amax), kept.gradient_amax) == (0.5, jnp.float32(2e-9))
    larger = {**arrays, "x": arrays["x"] * 1e-3, "dy": arrays["dy"] * 1e-3}
    _, _, _, sums = run(larger)
    assert (float(sums.input_amax), sums.gradient_amax) == (0.5, jnp.float32(2e-9))


def test_bfloat16_results_are_those_of_float32_rounded(arrays):
    rounded = {key: value.astype(jnp.bfloat16).astype(jnp.float32) for key, value in arrays.items()}
    rounded["kernel"] = arrays["kernel"]
    _, y, dx, sums = run(rounded)
    _, y16, dx16, sums16 = run(rounded, dtype=jnp.bfloat16)
    assert y16.dtype == dx16.dtype == jnp.bfloat16
    assert sums16.gradient_IO.dtype == jnp.float32
    # One rounding to 8 bits: 2^-9 at most, two where XLA rounds before it scales.
    np.testing.assert_allclose(y16.astype(jnp.float32), y, rtol=2**-8)
    np.testing.assert_allclose(dx16.astype(jnp.float32), dx, rtol=2**-8)
    assert relative_error(sums16.gradient_IO, sums.gradient_IO) < 1e-6


@pytest.mark.parametrize("current", [False, True])
def test_zeros_and_huge_numbers_stay_finite(arrays, current):
    zeros = {**arrays, "x": jnp.zeros_like(arrays["x"]), "dy": jnp.zeros_like(arrays["dy"])}
    _, y, dx, _ = run(zeros, current=current)
    assert not y.any()
    assert not dx.any()
    weight = make_weight(arrays["kernel"], input_amax=1, gradient_amax=1, current=current)
    sums = fp8.Fp8Sums.zeros(I, O)
    huge = arrays["x"] * 1e6
    y, pullback = jax.vjp(lambda x, s: fp8.fp8_linear(x, fp8.Fp8Kernel(weight, s)), huge, sums)
    assert np.isfinite(y).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(pullback(huge[..., :O])))

"""FP8 linear layers: E4M3 inputs and weights, E5M2 output gradients, one scale a tensor.

A tensor is stored as q = x / scale. Scales are powers of two, so that scaling is exact; what lies
beyond the format's largest number is clipped. Formats: Micikevicius et al., arXiv 2209.05433,
section 3; delayed scaling: Peng et al., arXiv 2310.18313, section 2.

The weight's gradient is added to its accumulator inside the matmul, and the accumulator's
*gradient is its next value*, as are the largest magnitudes seen. cuBLAS multiplies FP8 matrices
only where the contracted dimension is the last one of both, hence the two layouts of a weight.

Shape suffixes: M tokens, I inputs, O outputs.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

E4M3 = jnp.float8_e4m3fn
E5M2 = jnp.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57_344.0}
MAX_EXPONENT = 60  # of a scale; the product of two stays far inside float32 and bfloat16

_LAST_DIMENSIONS = (((1,), (1,)), ((), ()))


@flax.struct.dataclass
class Scales:
    """What quantises a layer's input and output gradient, and what its three results are times.

    float32 scalars, or arrays of layers. They are made once a step: a kernel for each of them in
    every micro-batch would take longer than a norm.

    Attributes:
      input_inverse, gradient_inverse: 1 / scale of input and output gradient.
      output, input_gradient, weight_gradient: products of the scales of what is multiplied.
    """

    input_inverse: jax.Array
    gradient_inverse: jax.Array
    output: jax.Array
    input_gradient: jax.Array
    weight_gradient: jax.Array

    @classmethod
    def of(cls, weight: jax.Array, inputs: jax.Array, gradients: jax.Array) -> "Scales":
        """From the scales of weight, input and output gradient, powers of two."""
        return cls(
            1 / inputs, 1 / gradients, inputs * weight, gradients * weight, inputs * gradients
        )


@flax.struct.dataclass
class Fp8Weight:
    """What one linear layer computes with in FP8; constant during a step.

    Attributes:
      kernel_OI, kernel_IO: the weight / `scale`, E4M3.
      scale: float32 power of two.
      delayed: how input and output gradient are scaled where that is not `current`.
      measure: the largest magnitudes of input and output gradient are taken.
      current: they are also what scales them (current scaling), in place of the two scales above.
      fast: of the matmuls for output, input gradient, and weight gradient: whether tensor cores
        may add up with fewer bits.
    """

    kernel_OI: jax.Array
    kernel_IO: jax.Array
    scale: jax.Array
    delayed: "Scales"
    measure: bool = flax.struct.field(pytree_node=False, default=True)
    current: bool = flax.struct.field(pytree_node=False, default=False)
    fast: tuple[bool, bool, bool] = flax.struct.field(pytree_node=False, default=(True,) * 3)


@flax.struct.dataclass
class Fp8Sums:
    """What a backward pass hands on; the gradient of each array is its next value.

    Attributes:
      gradient_IO: float32 sum of the weight's gradients.
      input_amax, gradient_amax: float32 scalars, largest magnitude of input and output gradient.
    """

    gradient_IO: jax.Array
    input_amax: jax.Array
    gradient_amax: jax.Array

    @classmethod
    def zeros(cls, inputs: int, outputs: int) -> "Fp8Sums":
        """Nothing seen yet."""
        scalars = (jnp.zeros((), jnp.float32) for _ in range(2))
        return cls(jnp.zeros((inputs, outputs), jnp.float32), *scalars)


@flax.struct.dataclass
class Fp8Kernel:
    """Stands in a linear layer's parameters where its kernel would; only `sums` has a gradient."""

    weight: Fp8Weight
    sums: Fp8Sums


def power_of_two_scale(amax: jax.Array, dtype: Any, margin: float = 1.0) -> jax.Array:
    """The least power of two at which `amax * margin` does not exceed the format's largest number.

    Exact: it reads the exponent's bits. The exponent is kept within ±`MAX_EXPONENT`; of 0 it is 1.
    """
    mantissa, exponent = jnp.frexp(amax.astype(jnp.float32) * (margin / LARGEST[dtype]))
    exponent = jnp.where(mantissa == 0.5, exponent - 1, exponent)  # itself a power of two
    return jnp.ldexp(jnp.float32(1), jnp.clip(exponent, -MAX_EXPONENT, MAX_EXPONENT))


def quantize(x: jax.Array, inverse_scale: jax.Array, dtype: Any) -> jax.Array:
    """x * inverse_scale in an FP8 format, clipped: the bare cast would give NaN or infinity."""
    largest = LARGEST[dtype]
    return jnp.clip(x.astype(jnp.float32) * inverse_scale, -largest, largest).astype(dtype)


def amax(x: jax.Array) -> jax.Array:
    """The largest magnitude in an array, float32."""
    return jnp.max(jnp.abs(x)).astype(jnp.float32)


def fp8_linear(x_BTI: jax.Array, kernel: Fp8Kernel) -> jax.Array:
    """x @ kernel by FP8 matmuls; the result [B, T, O] has the dtype of `x_BTI`.

    Differentiated, it gives the input's gradient in that dtype, and as the gradient of the kernel's
    `sums` their next values.
    """
    x_MI = x_BTI.reshape(-1, x_BTI.shape[-1])
    return _linear(x_MI, kernel.weight, kernel.sums).reshape(*x_BTI.shape[:-1], -1)


@jax.custom_vjp
def _linear(x_MI: jax.Array, weight: Fp8Weight, sums: Fp8Sums) -> jax.Array:
    return _forward(x_MI, weight, sums)[0]


def _forward(x_MI, weight, sums):
    x_amax = amax(x_MI) if weight.measure or weight.current else None
    scales = weight.delayed
    if weight.current:
        x_scale = power_of_two_scale(x_amax, E4M3)
        scales = Scales.of(weight.scale, x_scale, jnp.ones_like(x_scale))
    q_MI, q_IM, x_amax = _together(quantize(x_MI, scales.input_inverse, E4M3), x_amax)
    y_MO = _matmul(q_MI, weight.kernel_OI, x_MI.dtype, weight.fast[0])
    # In the result's dtype: the scale then becomes part of the matmul's own.
    y_MO *= scales.output.astype(y_MO.dtype)
    seen = sums.input_amax if x_amax is None else jnp.maximum(sums.input_amax, x_amax)
    return y_MO, (q_IM, scales, weight, sums.replace(input_amax=seen))


def _backward(residuals, dy_MO):
    q_IM, scales, weight, sums = residuals
    dy_amax = amax(dy_MO) if weight.measure or weight.current else None
    if weight.current:
        dy_scale = power_of_two_scale(dy_amax, E5M2)
        scales = Scales.of(weight.scale, 1 / scales.input_inverse, dy_scale)
    dq_MO, dq_OM, dy_amax = _together(quantize(dy_MO, scales.gradient_inverse, E5M2), dy_amax)
    dx_MI = _matmul(dq_MO, weight.kernel_IO, dy_MO.dtype, weight.fast[1])
    dx_MI *= scales.input_gradient.astype(dx_MI.dtype)
    dw_IO = _matmul(q_IM, dq_OM, jnp.float32, weight.fast[2])
    seen = sums.gradient_amax if dy_amax is None else jnp.maximum(sums.gradient_amax, dy_amax)
    total_IO = sums.gradient_IO + dw_IO * scales.weight_gradient
    return dx_MI, None, sums.replace(gradient_IO=total_IO, gradient_amax=seen)


_linear.defvjp(_forward, _backward)


def _together(q: jax.Array, largest: jax.Array | None) -> tuple[jax.Array, ...]:
    """A quantised matrix, its transpose, and the magnitude taken of it, if any.

    A matmul of the matrix waits for the magnitude: the scheduler might leave it for the end of the
    backward pass, and keep the unquantised matrices of all layers until then.
    """
    if largest is None:
        return q, q.T, None
    return lax.optimization_barrier((q, q.T, largest))


def _matmul(left: jax.Array, right: jax.Array, dtype: Any, fast: bool) -> jax.Array:
    """left @ right.T of FP8 matrices."""
    precision = lax.Precision.DEFAULT if fast else lax.Precision.HIGHEST
    return lax.dot_general(
        left, right, _LAST_DIMENSIONS, precision=precision, preferred_element_type=dtype
    )

"""Weights whose gradients are summed in float32 where they are made.

A `SummedWeight` stands in the parameters in place of an array. Its weight is a constant of the
step. What has a gradient is the sum, and that *gradient is its next value*: the backward pass adds
the weight's gradient to it. Of a linear layer, cuBLAS does so inside the matmul, in place, and the
gradient is never rounded to the dtype of the weight. A sum may enter a computation once only.

Shape suffixes: B batch, T length, I features in, O features out, M = B * T, V vocabulary, D model.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax


@flax.struct.dataclass
class GradientSum:
    """float32 sum of a weight's gradients, in the shape of the weight."""

    total: jax.Array

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> "GradientSum":
        """Nothing added yet."""
        return cls(jnp.zeros(shape, jnp.float32))


@flax.struct.dataclass
class SummedWeight:
    """Stands in the parameters where a weight would; only `sum` has a gradient."""

    weight: jax.Array
    sum: GradientSum


@jax.custom_vjp
def summed_linear(x_BTI: jax.Array, kernel_IO: jax.Array, total_IO: jax.Array) -> jax.Array:
    """x_BTI @ kernel_IO; differentiated, the gradient of `total_IO` is its next value."""
    return jnp.dot(x_BTI, kernel_IO)


def _linear_forward(x_BTI, kernel_IO, total_IO):
    return jnp.dot(x_BTI, kernel_IO), (x_BTI, kernel_IO, total_IO)


def _linear_backward(residuals, dy_BTO):
    x_BTI, kernel_IO, total_IO = residuals
    x_MI, dy_MO = (array.reshape(-1, array.shape[-1]) for array in (x_BTI, dy_BTO))
    dkernel_IO = lax.dot(x_MI.T, dy_MO, preferred_element_type=jnp.float32)
    return jnp.dot(dy_BTO, kernel_IO.T), None, total_IO + dkernel_IO


summed_linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def summed_rows(embedding_VD: jax.Array, total_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Rows of the embedding; differentiated, the gradient of `total_VD` is its next value."""
    return jnp.take(embedding_VD, tokens_BT, axis=0)


def _rows_forward(embedding_VD, total_VD, tokens_BT):
    return summed_rows(embedding_VD, total_VD, tokens_BT), (total_VD, tokens_BT)


def _rows_backward(residuals, dx_BTD):
    total_VD, tokens_BT = residuals
    return None, total_VD.at[tokens_BT].add(dx_BTD.astype(jnp.float32)), None


summed_rows.defvjp(_rows_forward, _rows_backward)

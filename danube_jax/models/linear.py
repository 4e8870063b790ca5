"""The matmul of the decoder's blocks.

Shape suffixes: B batch, T length, I features in, O features out, M = B * T.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from danube_jax.models.fp8 import Fp8Kernel, fp8_linear
from danube_jax.models.gradient_sum import SummedWeight, summed_linear
from danube_jax.models.lora import COLLECTION, adapter_output


class Linear(nn.Module):
    """A bias-free linear map; every matmul of the blocks goes through this module.

    The matmul runs in `linear_dtype`; the result has the dtype `dtype`. Where the collection 'lora'
    holds adapters of some of the projections (see `lora.adapter_collection`), they are added. Where
    the parameters hold an `Fp8Kernel` in place of the kernel, it runs in FP8; where they hold a
    `SummedWeight`, the kernel's gradient is added to its sum.
    """

    parts: tuple[tuple[str, int], ...]  # projections side by side, and their sizes
    init_std: float
    dtype: jnp.dtype
    linear_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTI: jax.Array) -> jax.Array:
        kernel = self.get_variable("params", "kernel")
        if isinstance(kernel, Fp8Kernel):
            y_BTO = fp8_linear(x_BTI, kernel)
        elif isinstance(kernel, SummedWeight):
            kernel_IO = kernel.weight.astype(self.linear_dtype)
            y_BTO = summed_linear(x_BTI.astype(self.linear_dtype), kernel_IO, kernel.sum.total)
        else:
            shape = (x_BTI.shape[-1], sum(size for _, size in self.parts))
            init = nn.initializers.normal(self.init_std)
            kernel_IO = self.param("kernel", init, shape, jnp.float32)
            y_BTO = linear(x_BTI.astype(self.linear_dtype), kernel_IO.astype(self.linear_dtype))
        adapters = self.variables.get(COLLECTION)
        if not adapters:
            return y_BTO.astype(self.dtype)
        return y_BTO.astype(self.dtype) + adapter_output(x_BTI, adapters, self.parts, self.dtype)


@jax.custom_vjp
def linear(x_BTI: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    """x_BTI @ kernel_IO, with a backward pass that makes the kernel's gradient as [I, O].

    Plain autodiff makes it as [O, I] and transposes it afterwards.
    """
    return jnp.dot(x_BTI, kernel_IO)


def _linear_forward(x_BTI, kernel_IO):
    return jnp.dot(x_BTI, kernel_IO), (x_BTI, kernel_IO)


def _linear_backward(residuals, dy_BTO):
    x_BTI, kernel_IO = residuals
    x_MI, dy_MO = (array.reshape(-1, array.shape[-1]) for array in (x_BTI, dy_BTO))
    return jnp.dot(dy_BTO, kernel_IO.T), jnp.dot(x_MI.T, dy_MO)


linear.defvjp(_linear_forward, _linear_backward)

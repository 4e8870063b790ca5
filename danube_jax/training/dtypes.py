"""The dtypes that a config names."""

import jax.numpy as jnp

from danube_jax.config import PrecisionConfig

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def linear_dtype(precision: PrecisionConfig) -> jnp.dtype:
    """Dtype of the blocks' matmuls outside of FP8: where that is on, in evaluation only."""
    return DTYPES[precision.compute if precision.linear == "fp8" else precision.linear]

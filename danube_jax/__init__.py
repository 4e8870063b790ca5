"""danube_jax: train, tune and ship small H2O-Danube language models with JAX and Flax."""

__version__ = "0.1.0"

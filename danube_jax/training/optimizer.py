"""AdamW and its learning-rate schedule over the run's tokens."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from danube_jax.config import OptimizerConfig
from danube_jax.data.phases import PhaseSchedule


def learning_rate_schedule(
    config: OptimizerConfig, schedule: PhaseSchedule
) -> Callable[[jax.Array], jax.Array]:
    """Linear warm-up, then one cosine to the floor, over the whole run's tokens.

    Danube, section 4: the schedule does not restart where the context grows. The rate of update i
    (from 0) is that of the tokens consumed when it is done, so the first update is not zero and
    the last one is `final_learning_rate`.

    Returns:
      A function from a step (int32 scalar) to a float32 rate, for use inside jit.
    """
    total = schedule.total_tokens
    boundaries = [phase.first_step for phase in schedule.phases] + [schedule.total_steps]
    consumed = [phase.first_token / total for phase in schedule.phases] + [1.0]
    warmup = max(config.warmup_tokens / total, config.warmup_fraction)
    steps_K = np.asarray(boundaries, np.float32)
    consumed_K = np.asarray(consumed, np.float32)

    def rate(step: jax.Array) -> jax.Array:
        done = jnp.interp(jnp.float32(step) + 1, steps_K, consumed_K)
        warm = done / warmup if warmup else jnp.float32(jnp.inf)
        progress = jnp.clip((done - warmup) / max(1.0 - warmup, 1e-9), 0.0, 1.0)
        span = config.learning_rate - config.final_learning_rate
        cosine = config.final_learning_rate + span * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return jnp.where(warm < 1.0, config.learning_rate * warm, cosine).astype(jnp.float32)

    return rate


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW's direction, to be multiplied by minus the learning rate (Loshchilov and Hutter).

    Clipping and the rate are applied by the training step: the rate follows the tokens consumed,
    also where an update was skipped. Only matrices are decayed.
    """

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)

    return optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=matrices),
    )

"""The spike guard: which updates are too far from the steps before to be trusted.

A step whose loss or gradient norm lies more than so many standard deviations above the mean of the
last ones is skipped. The rule is that of OLMo-core's SkipStep optimizers: both figures, only
upwards, and not before half a window of values is there.

What is remembered is every finite value, skipped or not, but none further out than its own bound.
So a single spike does not widen the bounds so far that the next one passes, and a run whose loss
rises for good, as at a change of phase, is let through after some skipped steps instead of never.

Legend: W window, 2: loss, gradient norm.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

# Of the mean: a spread below what float32 resolves says nothing.
_LEAST_SPREAD = 1e-6


@dataclasses.dataclass(frozen=True)
class SpikeGuard:
    """The guard's settings.

    Attributes:
      deviations: how many standard deviations above the mean is too far.
      window: how many steps mean and deviation are taken over.
    """

    deviations: float
    window: int


@flax.struct.dataclass
class SpikeHistory:
    """What the guard carries from step to step; it starts as zeros.

    Attributes:
      values_2W: float32, the last values, a ring.
      count: int32 scalar, values entered in all.
    """

    values_2W: jax.Array
    count: jax.Array


def init_history(guard: SpikeGuard) -> SpikeHistory:
    """A history without values."""
    return SpikeHistory(jnp.zeros((2, guard.window), jnp.float32), jnp.zeros((), jnp.int32))


def judge(
    guard: SpikeGuard, history: SpikeHistory, loss: jax.Array, grad_norm: jax.Array
) -> tuple[jax.Array, jax.Array, SpikeHistory]:
    """Judges one step by those before it, and remembers it.

    Args:
      guard: the settings.
      history: the steps before.
      loss, grad_norm: float32 scalars of this step, equal on all devices.

    Returns:
      Whether the step is within bounds (a boolean scalar; not finite is never), the bounds
      float32 [2] of loss and gradient norm (infinite while there are too few values), and the
      history for the next step.
    """
    value_2 = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    known = jnp.minimum(history.count, guard.window)
    here_W = jnp.arange(guard.window) < known
    mean_2 = jnp.sum(jnp.where(here_W, history.values_2W, 0), axis=1) / jnp.maximum(known, 1)
    squares_2W = jnp.where(here_W, (history.values_2W - mean_2[:, None]) ** 2, 0)
    deviation_2 = jnp.sqrt(jnp.sum(squares_2W, axis=1) / jnp.maximum(known - 1, 1))
    deviation_2 = jnp.maximum(deviation_2, _LEAST_SPREAD * jnp.abs(mean_2))
    bound_2 = jnp.where(
        known >= max(2, guard.window // 2), mean_2 + guard.deviations * deviation_2, jnp.inf
    )
    fine = jnp.all(value_2 <= bound_2)  # false for a NaN
    finite = jnp.all(jnp.isfinite(value_2))
    place = history.count % guard.window
    values_2W = history.values_2W.at[:, place].set(jnp.minimum(value_2, bound_2))
    remembered = SpikeHistory(values_2W, history.count + 1)
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), remembered, history)
    return fine & finite, bound_2, kept


def skip_reason(metrics: Mapping[str, Any]) -> str:
    """Why a step's update was skipped, from its metrics."""
    for key, name in (("loss", "loss"), ("grad_norm", "gradient norm")):
        bound = metrics.get(f"{key}_bound", math.inf)
        if not math.isfinite(metrics[key]):
            return f"the {name} is not finite"
        if metrics[key] > bound:
            return f"the {name} is a spike (the spike guard's bound is {bound:.4g})"
    return "the spike guard refused it"

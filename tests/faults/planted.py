"""Runs the training command with planted faults of numbers.

Usage: planted.py '{"nan": [STEP, ...], "spike": [STEP, ...]}' [the training command's arguments]

The batch of a step under "nan" has weights that are no numbers; in one under "spike" the loss, and
with it every gradient, is ten thousand times what it is.
"""

import json
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np

from danube_jax import command_line, train
from danube_jax.data.loader import BatchSource
from danube_jax.training.pretraining import Pretraining

SPIKE = 2.0  # the weight of a token that marks such a batch
FACTOR = 1e4

planted = json.loads(sys.argv.pop(1))
read, make_objective = BatchSource.__getitem__, Pretraining.train_objective


def read_planted(self: BatchSource, step: int) -> dict[str, np.ndarray]:
    """A batch, spoilt where that was asked for; steps count from 1."""
    batch = read(self, step)
    for kind, weight in (("nan", np.nan), ("spike", SPIKE)):
        if int(step) + 1 in planted.get(kind, ()):
            batch["weights"][0, 0, 0] = weight
    return batch


def planted_objective(self: Pretraining, decoder: Any) -> Any:
    """The usual one, with a much larger loss where the batch is marked."""
    objective = make_objective(self, decoder)

    def spoilt(weights: Any, batch: Any, *more: Any) -> Any:
        loss, sums = objective(weights, batch, *more)
        return loss * jnp.where(jnp.max(batch["weights"]) == SPIKE, FACTOR, 1.0), sums

    return spoilt


BatchSource.__getitem__ = read_planted
Pretraining.train_objective = planted_objective
command_line.run(train.main)

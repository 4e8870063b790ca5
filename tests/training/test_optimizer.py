"""The learning rate over the run's tokens, against float64 arithmetic at every boundary."""

import dataclasses
import math

import numpy as np
import pytest

from danube_jax.config import DataConfig, OptimizerConfig, PhaseConfig, RunConfig, SourceConfig
from danube_jax.data.phases import PhaseSchedule
from danube_jax.training.optimizer import learning_rate_schedule

BATCH = 1_179_648
DANUBE = OptimizerConfig(learning_rate=2e-4, final_learning_rate=1e-5, warmup_tokens=2_000 * BATCH)


def schedule_of(*rows: tuple[int, int, int]) -> PhaseSchedule:
    """A schedule of (steps, context, batch tokens) rows over one source."""
    phases = tuple(
        PhaseConfig(f"p{i}", steps * batch, context, {"a": 1.0}, batch)
        for i, (steps, context, batch) in enumerate(rows)
    )
    data = DataConfig(sources={"a": SourceConfig(path="a")})
    return PhaseSchedule.from_config(dataclasses.replace(RunConfig(), data=data, phases=phases))


def expected_rate(config: OptimizerConfig, done: int, total: int) -> float:
    """The paper's schedule in float64: linear to the peak, then one cosine to the floor."""
    if done < config.warmup_tokens:
        return config.learning_rate * done / config.warmup_tokens
    progress = (done - config.warmup_tokens) / (total - config.warmup_tokens)
    span = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * progress))


@pytest.mark.parametrize(
    "rows",
    [
        ((593_398, 2_048, BATCH), (84_771, 4_096, BATCH), (84_771, 16_384, BATCH)),
        ((1_000, 2_048, BATCH // 2), (3_000, 4_096, BATCH), (500, 8_192, 2 * BATCH)),
    ],
)
def test_rate_at_every_boundary(rows):
    schedule = schedule_of(*rows)
    rate = learning_rate_schedule(DANUBE, schedule)
    boundaries = [phase.first_step for phase in schedule.phases] + [schedule.total_steps, 2_000]
    steps = {b + d for b in boundaries for d in (-2, -1, 0, 1)} | {0, 1, schedule.total_steps // 2}
    for step in sorted(s for s in steps if 0 <= s < schedule.total_steps):
        done = schedule.tokens_at_step(step + 1)
        expected = expected_rate(DANUBE, done, schedule.total_tokens)
        # float32 fractions of the run: 1e-7 of it, which warm-up turns into 1e-4 of the rate
        np.testing.assert_allclose(float(rate(np.int32(step))), expected, rtol=3e-4, atol=1e-10)


def test_ends_and_peak_are_the_papers():
    schedule = schedule_of((847_711, 2_048, BATCH))
    rate = learning_rate_schedule(DANUBE, schedule)
    assert float(rate(np.int32(0))) == pytest.approx(2e-4 / 2_000, rel=1e-4)
    assert float(rate(np.int32(1_999))) == pytest.approx(2e-4, rel=1e-4)
    assert float(rate(np.int32(schedule.total_steps - 1))) == pytest.approx(1e-5, rel=1e-4)


def test_no_warmup_starts_at_the_peak():
    config = dataclasses.replace(DANUBE, warmup_tokens=0)
    rate = learning_rate_schedule(config, schedule_of((1_000, 2_048, BATCH)))
    assert float(rate(np.int32(0))) == pytest.approx(2e-4, rel=1e-4)

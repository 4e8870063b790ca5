"""Training steps compiled for H100s that are not there; each one once a test process."""

import functools
import runpy
from pathlib import Path

import pytest

from danube_jax.config import RunConfig, parse_config
from danube_jax.data.phases import PhaseSchedule
from danube_jax.training import aot
from danube_jax.training.aot import CompiledStep

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

needs_compiler = pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))


@functools.cache
def make_run(name: str, linear: str = "fp8", microbatch_tokens: int = 16_384, **model) -> RunConfig:
    """A config of configs/, with some values replaced."""
    config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()
    config.precision.linear = linear
    config.training.microbatch_tokens = microbatch_tokens
    config.model.update(model)
    return parse_config(config)


@functools.cache
def compiled(
    name: str, *, context: int, devices: int = 1, layers: int = 24, **changes
) -> CompiledStep:
    """The step of the phase of a config that has this context."""
    run = make_run(name, num_hidden_layers=layers, **changes)
    phases = PhaseSchedule.from_config(run).phases
    phase = next(phase for phase in phases if phase.context == context)
    return aot.compile_phase(run, phase, devices)

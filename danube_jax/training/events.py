"""Events of a run: rows of kind "event" in metrics.jsonl, for the report and whoever asks later.

A row says what happened (`event`), when (`time`, seconds since 1970) and where in the run (`step`,
`tokens`: those done by then). Where the run resumes from an earlier step, the events that belong to
the steps run again are dropped; those of `HISTORY` stay.

  start, resume   `versions`, `device`, `devices`, `processes`, `parameters` (of the model),
                  `trained_parameters`, `last_step` (where this session will end), and `lost_steps`
                  where steps had to be run again
  restored_older  `damaged`: steps of the checkpoints that could not be used
  init_from       `source`: what the weights were initialised from
  data_changed    `changes`
  phase           `phase`, `context`
  skipped         `loss`, `grad_norm`, `in_a_row`, `in_all`: an update that was not finite or, with
                  the bound in `loss_bound` or `grad_norm_bound`, that the spike guard refused
  stopped         asked to stop, and saved
  diverged        `in_a_row`: the run gave up
  finished        `unigram`: nats a held-out token under token frequencies, a source
"""

import importlib.metadata
import math
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax

import danube_jax
from danube_jax.config import ModelConfig
from danube_jax.data.phases import PhaseSchedule
from danube_jax.models.decoder import param_count
from danube_jax.training.step import TrainState

START, RESUME, FINISHED = "start", "resume", "finished"
STOPPED, DIVERGED, SKIPPED, PHASE = "stopped", "diverged", "skipped", "phase"
RESTORED_OLDER, DATA_CHANGED, INIT_FROM = "restored_older", "data_changed", "init_from"

HISTORY = (START, RESUME, STOPPED, DIVERGED, RESTORED_OLDER, DATA_CHANGED, INIT_FROM)

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Writer(Protocol):
    """What a `MetricsWriter` is to this module, which `metrics` imports."""

    lost_steps: int

    def write(self, row: dict[str, Any]) -> None: ...


class EventLog:
    """Writes a run's events; processes without a writer write none."""

    def __init__(
        self,
        writer: Writer | None,
        model: ModelConfig,
        schedule: PhaseSchedule,
        last_step: int,
    ):
        self._writer, self._model = writer, model
        self._schedule, self._last_step = schedule, last_step

    def record(self, event: str, step: int, **details: Any) -> None:
        """Writes one event of step `step`."""
        if self._writer is not None:
            tokens = self._schedule.tokens_at_step(step)
            self._writer.write(event_row(event, step, tokens, details))

    def begin(
        self,
        state: TrainState,
        damaged: Sequence[int],
        origin: Mapping[str, Any] | None,
        data_changes: Sequence[str],
    ) -> None:
        """Records a start or a resume, and what was unusual about it.

        Args:
          state: what training begins with.
          damaged: steps of checkpoints that could not be used.
          origin: what the weights were initialised from, if from anything.
          data_changes: what differs from the data of the checkpoint.
        """
        step = int(state.step)
        self.record(
            RESUME if step else START,
            step,
            **environment(),
            parameters=param_count(self._model),
            trained_parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            last_step=self._last_step,
            lost_steps=(self._writer.lost_steps or None) if self._writer is not None else None,
        )
        if damaged:
            self.record(RESTORED_OLDER, step, damaged=list(damaged))
        if step == 0 and origin:
            self.record(INIT_FROM, 0, source=dict(origin))
        if data_changes:
            self.record(DATA_CHANGED, step, changes=list(data_changes))

    def skipped(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records an update that was skipped, from the step's metrics."""
        self.record(
            SKIPPED,
            step,
            loss=metrics["loss"],
            grad_norm=metrics["grad_norm"],
            in_a_row=metrics["skipped_in_a_row"],
            in_all=metrics["skipped"],
            **{
                f"{key}_bound": metrics[f"{key}_bound"]
                for key in ("loss", "grad_norm")
                if metrics[key] > metrics.get(f"{key}_bound", math.inf)
            },
        )


def event_row(event: str, step: int, tokens: int, details: Mapping[str, Any]) -> dict[str, Any]:
    """One row; a detail that is None is left out."""
    kept = {key: value for key, value in details.items() if value is not None}
    return {
        "kind": "event",
        "step": step,
        "tokens": tokens,
        "event": event,
        "time": round(time.time(), 3),
        **kept,
    }


def environment() -> dict[str, Any]:
    """What the run runs on and with: `versions`, `device`, `devices` and `processes`."""
    versions = {"danube_jax": danube_jax.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }

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
  skipped         `loss`, `grad_norm`, `in_a_row`, `in_all`: an update that was not finite
  stopped         asked to stop, and saved
  diverged        `in_a_row`: the run gave up
  finished        `unigram`: nats a held-out token under token frequencies, a source
"""

import importlib.metadata
import platform
import time
from collections.abc import Mapping
from typing import Any

import jax

import danube_jax

START, RESUME, FINISHED = "start", "resume", "finished"
STOPPED, DIVERGED, SKIPPED, PHASE = "stopped", "diverged", "skipped", "phase"
RESTORED_OLDER, DATA_CHANGED, INIT_FROM = "restored_older", "data_changed", "init_from"

HISTORY = (START, RESUME, STOPPED, DIVERGED, RESTORED_OLDER, DATA_CHANGED, INIT_FROM)

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


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

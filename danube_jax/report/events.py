"""Events in words."""

from collections.abc import Mapping
from typing import Any

from danube_jax.report import numbers
from danube_jax.report.charts import Mark
from danube_jax.report.collect import RunFolder

WARNINGS = ("skipped", "diverged", "restored_older", "data_changed")
SILENT_ON_CHARTS = ("start", "phase", "finished", "init_from")
MAX_ROWS = 60  # of the table; runs of skipped updates are the only thing that can be long


def describe(event: Mapping[str, Any]) -> str:
    """One event in a sentence; unknown ones by their name."""
    kind = str(event.get("event", "?"))
    known = {
        "start": lambda: f"Started{_where(event)}.",
        "resume": lambda: f"Resumed{_where(event)}{_lost(event)}.",
        "restored_older": lambda: (
            f"Checkpoint {_listed(event.get('damaged'))} was damaged; an older one was used."
        ),
        "init_from": lambda: f"Weights initialised from {_source(event.get('source'))}.",
        "data_changed": lambda: f"The data changed: {_listed(event.get('changes'))}.",
        "phase": lambda: f"Phase {event.get('phase')!s}: context {_count(event.get('context'))}.",
        "skipped": lambda: (
            f"Update skipped: loss {_figure(event.get('loss'))}, gradient norm "
            f"{_figure(event.get('grad_norm'))}{_bounds(event)}."
        ),
        "stopped": lambda: "Asked to stop; saved.",
        "diverged": lambda: f"Gave up after {_count(event.get('in_a_row'))} skipped updates.",
        "finished": lambda: "Finished.",
    }
    return known[kind]() if kind in known else kind.replace("_", " ")


def _bounds(event: Mapping[str, Any]) -> str:
    """What the spike guard allowed, where it refused the update."""
    keys = {"loss_bound": "loss", "grad_norm_bound": "gradient norm"}
    parts = [f"{name} {_figure(event[key])}" for key, name in keys.items() if key in event]
    return f"; the spike guard allowed a {' and a '.join(parts)}" if parts else ""


def marks_of(run: RunFolder) -> list[Mark]:
    """Events worth a mark on a chart: what interrupted the run or went wrong."""
    marks = []
    for event in run.metrics.events:
        kind, tokens = event.get("event"), event.get("tokens")
        if kind in SILENT_ON_CHARTS or not isinstance(tokens, int | float):
            continue
        text = f"Step {event['step']:,}: {describe(event)}"
        marks.append(Mark(float(tokens), text, "warning" if kind in WARNINGS else "info"))
    return marks


def table(run: RunFolder) -> tuple[list[dict[str, str]], int]:
    """Rows for the page, and how many were left out of the middle."""
    rows, seen = [], set()
    for event in run.metrics.events:
        kind = event.get("event")
        key = (str(kind), event["step"], str(event.get("phase")))
        if kind == "phase" and key in seen:  # entered again after a stop right there
            continue
        seen.add(key)
        tokens = event.get("tokens")
        rows.append(
            {
                "time": numbers.moment(event.get("time")),
                "step": f"{event['step']:,}",
                "tokens": numbers.count(tokens) if isinstance(tokens, int | float) else "",
                "text": describe(event),
                "kind": "warning" if kind in WARNINGS else "info",
            }
        )
    if len(rows) <= MAX_ROWS:
        return rows, 0
    half = MAX_ROWS // 2
    return rows[:half] + rows[-half:], len(rows) - 2 * half


def _where(event: Mapping[str, Any]) -> str:
    device, devices = event.get("device"), event.get("devices")
    if not isinstance(device, str) or not isinstance(devices, int):
        return ""
    processes = event.get("processes")
    several = f", {processes} processes" if isinstance(processes, int) and processes > 1 else ""
    return f" on {devices} x {device}{several}"


def _lost(event: Mapping[str, Any]) -> str:
    lost = event.get("lost_steps")
    return f"; {lost:,} steps are run again" if isinstance(lost, int) and lost else ""


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _source(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("path") or value.get("source") or dict(value))
    return str(value)


def _figure(value: Any) -> str:
    return numbers.figure(float(value)) if isinstance(value, int | float) else str(value)


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)

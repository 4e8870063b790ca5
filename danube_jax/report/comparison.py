"""The page that sets runs side by side: one colour a run, in every chart and table."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from danube_jax.report import curves, numbers, sections, standing
from danube_jax.report.charts import COLORS, Chart, Line, line_chart, smooth
from danube_jax.report.collect import RunFolder, tail_mean
from danube_jax.report.metric_rows import EMPTY, Series

SHARES = (0.25, 0.5, 0.75, 1.0)  # of the shortest run, where losses are set side by side

EMPTY_VALUES = {numbers.NONE, "", "None", "[]", "{}"}  # of the config: not set, or not there


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: a cell a run; `best` the indices of the best ones."""

    label: str
    cells: tuple[str, ...]
    best: tuple[int, ...] = ()


def context(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Everything that the page shows."""
    names = labels(runs)
    content = {
        "runs": [
            {"name": name, "color": index % COLORS, "run": run}
            for index, (name, run) in enumerate(zip(names, runs, strict=True))
        ],
        "problems": [
            f"{name}: {problem}"
            for name, run in zip(names, runs, strict=True)
            for problem in run.problems
        ],
        "headline": headline(runs),
        "loss_charts": loss_charts(runs, names),
        "time_chart": time_chart(runs, names),
        "at_tokens": losses_at_tokens(runs),
        "phases": phase_bars(runs),
        "heldout_charts": heldout_charts(runs, names),
        "heldout": heldout_rows(runs),
        "published_parts": standing.published_parts(runs),
        "tasks": task_rows(runs),
        "known_charts": known_charts(runs, names),
        "extra_charts": extra_charts(runs, names),
        "samples": last_samples(runs),
        "differences": config_differences(runs),
    }
    parts = [(name, title) for name, title, keys in PARTS if any(content[key] for key in keys)]
    return content | {"parts": parts, "has_phases": any(content["phases"])}


PARTS = (
    ("loss", "Loss", ("loss_charts",)),
    ("heldout", "Held-out data", ("heldout_charts", "heldout")),
    ("scores", "Evaluation", ("published_parts", "tasks")),
    ("samples", "Last samples", ("samples",)),
    ("more", "What else was logged", ("extra_charts",)),
    ("training", "Optimisation and speed", ("known_charts",)),
    ("config", "Differences of configuration", ("differences",)),
)


def labels(runs: Sequence[RunFolder]) -> list[str]:
    """A name a run: its config's, its folder's or its path, the first that tells all apart."""
    choices: tuple[Callable[[RunFolder], str], ...] = (
        lambda run: run.name,
        lambda run: run.path.resolve().name,
        lambda run: str(run.path),
    )
    for choose in choices:
        names = [choose(run) for run in runs]
        if len(set(names)) == len(names):
            return names
    return [f"{index}: {name}" for index, name in enumerate(names, 1)]


def headline(runs: Sequence[RunFolder]) -> list[Row]:
    """The tiles of each run's own page, as rows."""
    lines = [sections.status_line(run).split(", ") for run in runs]
    rows = [
        Row("Status", tuple(line[0] for line in lines)),
        Row("Steps", tuple(line[1].removeprefix("step ") for line in lines)),
    ]
    tiles = [{tile.label: tile for tile in sections.headline(run)} for run in runs]
    order = list(dict.fromkeys(label for run_tiles in tiles for label in run_tiles))
    for label in order:
        cells = [
            run_tiles[label].value if label in run_tiles else numbers.NONE for run_tiles in tiles
        ]
        best: tuple[int, ...] = ()
        if label == "Training loss":
            best = lowest([final[0] if (final := run.final()) else None for run in runs])
        rows.append(Row(label, tuple(cells), best))
    devices = [(run.detail("devices", int), run.detail("device", str)) for run in runs]
    if any(count and device for count, device in devices):
        written = [f"{count} x {device}" if count and device else "" for count, device in devices]
        rows.append(Row("Devices", tuple(written)))
    return rows


def lowest(values: Sequence[float | None]) -> tuple[int, ...]:
    """Indices of the smallest value, where there are at least two and they differ."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    if len(known) < 2 or min(known) == max(known):
        return ()
    return tuple(i for i, value in enumerate(values) if value == min(known))


def _overlay(
    title: str, names: Sequence[str], series: Sequence[Series], **options: Any
) -> Chart | None:
    """One line a run; few points are dots."""
    lines = [
        Line(name, one, index, "dots" if len(one) < curves.SMOOTH_LEAST else "line")
        for index, (name, one) in enumerate(zip(names, series, strict=True))
    ]
    longest = max((float(one.tokens[-1]) for one in series if len(one)), default=0.0)
    limits = (0.0, longest) if longest > 0 else None
    return line_chart(title, lines, legend=True, **({"x_range": limits} | options))


def loss_charts(runs: Sequence[RunFolder], names: Sequence[str]) -> list[Chart]:
    """Smoothed training losses, and a closer look where the beginning dwarfs the rest."""
    series = [_smoothed(run.metrics.series("loss")) for run in runs]
    note = "Nats a token; running mean over 2 % of each run, five points at least."
    whole = _overlay("Training loss", names, series, note=note, wide=True)
    if whole is None:
        return []
    start = curves.ZOOM_FROM * max(run.tokens for run in runs)
    late = [curves.after(one, start) for one in series]
    full = np.concatenate([one.finite.values for one in series])
    rest = np.concatenate([one.finite.values for one in late])
    if not rest.size or np.ptp(full) < curves.ZOOM_GAIN * max(np.ptp(rest), 1e-9):
        return [whole]
    longest = max(float(one.tokens[-1]) for one in late if len(one))
    zoom = _overlay(
        "Training loss, a closer look",
        names,
        late,
        x_range=(start, longest),
        note=f"The same from {numbers.count(start)} tokens on.",
        wide=True,
    )
    return [whole, zoom] if zoom else [whole]


def time_chart(runs: Sequence[RunFolder], names: Sequence[str]) -> Chart | None:
    """Smoothed training losses against time of training."""
    longest = max((run.training_seconds or 0.0 for run in runs), default=0.0)
    unit, seconds = ("hours", 3600) if longest > 2 * 3600 else ("minutes", 60)
    series = []
    for run in runs:
        loss, clock = _smoothed(run.metrics.series("loss")), run.clock
        _, ours, theirs = np.intersect1d(loss.steps, clock.steps, return_indices=True)
        times = clock.values[theirs] / seconds
        series.append(Series(loss.steps[ours], times, loss.values[ours]))
    note = f"Against {unit} of training: compiling, evaluating and saving do not count."
    return _overlay("Training loss against time", names, series, note=note, wide=True, x_unit=unit)


def _smoothed(series: Series) -> Series:
    return smooth(series) if len(series.finite) >= curves.SMOOTH_LEAST else series


def losses_at_tokens(runs: Sequence[RunFolder]) -> list[Row]:
    """Losses at shares of what the shortest run has read: means as of the headline, up to there.

    No row where objectives differ, and losses with them.
    """
    series = [run.metrics.series("loss").finite for run in runs]
    objectives = {str(run.config.get("objective", "pretrain")) for run in runs}
    if not all(len(one) for one in series) or len(objectives) > 1:
        return []
    end = min(float(one.tokens[-1]) for one in series)
    rows = []
    for share in SHARES:
        until = [curves.until(one, share * end) for one in series]
        means = [tail_mean(one) for one in until]
        if not all(means):
            continue
        values = [mean[0] for mean in means if mean]
        cells = tuple(numbers.figure(value) for value in values)
        rows.append(Row(f"{numbers.count(share * end)} tokens", cells, lowest(values)))
    return rows


def phase_bars(runs: Sequence[RunFolder]) -> list[list[dict[str, Any]]]:
    """The phases of each run as stretches of the longest one's tokens, in percent."""
    longest = max((run.schedule.total_tokens for run in runs if run.schedule), default=0)
    return [
        [
            {
                "name": phase.name,
                "context": f"{phase.context:,}",
                "left": 100 * phase.first_token / longest,
                "width": 100 * phase.tokens / longest,
            }
            for phase in (run.schedule.phases if run.schedule else ())
        ]
        for run in runs
    ]


def _union(dictionaries: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for one in dictionaries for key in one))


def heldout_charts(runs: Sequence[RunFolder], names: Sequence[str]) -> list[Chart]:
    """Held-out loss, a chart a source."""
    keys = [key for key in _union([r.metrics.evaluation for r in runs]) if key.startswith("loss/")]
    charts = [
        _overlay(
            f"Held-out loss: {key.removeprefix('loss/')}",
            names,
            [run.metrics.evaluation.get(key, EMPTY) for run in runs],
        )
        for key in keys
    ]
    return [chart for chart in charts if chart]


def heldout_rows(runs: Sequence[RunFolder]) -> list[Row]:
    """The last held-out losses and bits a byte, a source; bits compare across tokenizers."""
    rows = []
    for prefix, what in (("loss/", "loss"), ("bits_per_byte/", "bits a byte")):
        last = [run.last_heldout(prefix) for run in runs]
        for source in _union(last):
            values = [one.get(source) for one in last]
            cells = tuple(numbers.figure(value) for value in values)
            rows.append(Row(f"{source}, {what}", cells, lowest(values)))
    return rows


def task_rows(runs: Sequence[RunFolder]) -> list[Row]:
    """Every task's newest score, a run."""
    scores = []
    for run in runs:
        found = {}
        for results in standing.latest(run.results):
            for score in results.scores:
                shots = "" if score.shots is None else f", {score.shots}-shot"
                found[f"{score.task}, {score.metric}{shots}"] = standing.written(score)
        scores.append(found)
    return [
        Row(task, tuple(found.get(task, numbers.NONE) for found in scores))
        for task in _union(scores)
    ]


def known_charts(runs: Sequence[RunFolder], names: Sequence[str]) -> list[Chart]:
    """The known curves of training rows, a line a run."""
    charts = []
    has_mfu = all(len(run.metrics.series("mfu").finite) for run in runs)
    for key, title, note, form, zero in curves.KNOWN:
        if key == "tflops_per_second_per_device" and has_mfu:
            continue
        series = [run.metrics.series(key) for run in runs]
        if form == "percent":
            series = [Series(one.steps, one.tokens, 100 * one.values) for one in series]
            form = curves.percent_form
        charts.append(_overlay(title, names, series, note=note, include_zero=zero, form=form))
    return [chart for chart in charts if chart]


def extra_charts(runs: Sequence[RunFolder], names: Sequence[str]) -> list[Chart]:
    """Every other scalar that varies in some run, a chart each."""
    keys = dict.fromkeys(key for run in runs for key in curves.extra_keys(run.metrics))
    charts = [
        _overlay(
            key.replace("/", ": ").replace("_", " "),
            names,
            [_smoothed(run.metrics.series(key)) for run in runs],
        )
        for key in keys
    ]
    return [chart for chart in charts if chart]


def last_samples(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """What each run last wrote to the prompts that at least two of them have."""
    last = []
    for run in runs:
        pairs = (
            zip(run.samples[-1].prompts, run.samples[-1].texts, strict=True) if run.samples else ()
        )
        last.append({prompt: text[len(prompt) :] for prompt, text in pairs if prompt})
    return [
        {"prompt": prompt, "texts": [one.get(prompt) for one in last]}
        for prompt in _union(last)
        if sum(prompt in one for one in last) > 1
    ]


def config_differences(runs: Sequence[RunFolder]) -> list[Row]:
    """Keys of the config, and versions, that are not the same in all runs."""
    flat = []
    for run in runs:
        versions = {f"version of {name}": version for name, version in sections.versions(run)}
        flat.append((sections.flatten(run.config) if run.config else {}) | versions)
    rows = []
    for key in _union(flat):
        cells = tuple(sections.written(one[key]) if key in one else numbers.NONE for one in flat)
        if len(set(cells)) > 1 and not set(cells) <= EMPTY_VALUES:
            rows.append(Row(key, cells))
    return rows

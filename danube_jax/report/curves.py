"""Which charts a run gets: the known curves by name, and every other number that was logged."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from danube_jax.report import numbers
from danube_jax.report.charts import Band, Chart, Line, line_chart, smooth
from danube_jax.report.collect import RunFolder
from danube_jax.report.events import marks_of
from danube_jax.report.metric_rows import Metrics, Series

ZOOM_FROM = 0.2  # of the run's tokens, where the closer look at the loss begins
ZOOM_GAIN = 2.5  # how much larger the whole range of the loss must be for a closer look
SMOOTH_LEAST = 20  # points from which a curve gets a smoothed one
PLACEHOLDERS = ("context",)  # numbers of a training row that are no curves

# Known curves of training rows: key, title, note, form, whether the axis begins at zero.
KNOWN: tuple[tuple[str, str, str, Callable[[float], str], bool], ...] = (
    ("learning_rate", "Learning rate", "Of each logged step.", numbers.figure, True),
    ("grad_norm", "Gradient norm", "Global norm before clipping.", numbers.figure, False),
    (
        "tokens_per_second",
        "Throughput",
        "Tokens a second, all devices; without compiling, evaluating and saving.",
        numbers.count,
        True,
    ),
    ("mfu", "Model FLOPs utilisation", "Percent of the dense bfloat16 peak.", "percent", True),
    (
        "tflops_per_second_per_device",
        "TFLOP/s a device",
        "Matmuls, causal attention at half.",
        numbers.figure,
        True,
    ),
    ("data_wait", "Waiting for data", "Percent of the time.", "percent", True),
)
# Other curves of training rows that belong together.
FAMILIES = {
    "Implicit rewards": ("reward_chosen", "reward_rejected", "margin"),
    "Preferred answers, share": ("accuracy", "likelihood_accuracy"),
    "Log-probabilities of answers": ("log_prob_chosen", "log_prob_rejected"),
}
HELDOUT_QUIET = ("tokens", "bits_per_byte", "context", "pairs")  # in tables, or amounts
LOSS_KEYS = ("loss", "nll")
QUIET = (  # said elsewhere, or the same as another curve
    "skipped",
    "skipped_in_a_row",
    "loss_bound",
    "grad_norm_bound",
    "tokens_per_second_per_device",
    "memory_bytes",
)


def bands_of(run: RunFolder) -> list[Band]:
    """The phases as shaded stretches, with their contexts; a round of tuning is one stretch."""
    if run.schedule is None:
        rounds = run.config.get("rounds")
        one = rounds[0] if isinstance(rounds, list) and len(rounds) == 1 else None
        if not isinstance(one, dict) or not isinstance(one.get("context_length"), int):
            return []
        return [Band(0, math.inf, str(one.get("name", "")), f"{one['context_length']:,}")]
    return [
        Band(
            phase.first_token,
            phase.first_token + phase.tokens,
            phase.name,
            f"{phase.context:,}",
        )
        for phase in run.schedule.phases
    ]


def x_range(run: RunFolder) -> tuple[float, float] | None:
    """Tokens from 0 to what was read; None where nothing was."""
    return (0.0, run.tokens) if run.tokens > 0 else None


def loss_charts(run: RunFolder) -> list[Chart]:
    """The training loss, and a closer look where the beginning dwarfs the rest."""
    loss = run.metrics.series("loss")
    bands, marks, limits = bands_of(run), marks_of(run), x_range(run)
    whole = line_chart(
        "Training loss",
        _with_smooth("training loss", loss),
        x_range=limits,
        bands=bands,
        marks=marks,
        note=_loss_note(run) + (" Dashed: see events." if marks else ""),
        wide=True,
    )
    charts = [whole] if whole else []
    finite = loss.finite
    if limits is None or len(finite) < SMOOTH_LEAST:
        return charts
    start = limits[1] * ZOOM_FROM
    late = finite.tokens >= start
    if not late.any() or np.ptp(finite.values) < ZOOM_GAIN * max(np.ptp(finite.values[late]), 1e-9):
        return charts
    cut = [
        dataclasses.replace(line, series=after(line.series, start))
        for line in _with_smooth("training loss", loss)
    ]
    zoom = line_chart(
        "Training loss, a closer look",
        cut,
        x_range=(start, limits[1]),
        bands=bands,
        marks=marks,
        note=f"The same from {numbers.count(start)} tokens on.",
        wide=True,
    )
    return [*charts, zoom] if zoom else charts


def _loss_note(run: RunFolder) -> str:
    unit = "Preference loss a pair" if run.config.get("objective") == "dpo" else "Nats a token"
    note = f"{unit} of each logged step's batch"
    if len(run.metrics.series("loss").finite) >= SMOOTH_LEAST:
        note += "; bold: running mean over 2 % of the run, five points at least"
    return f"{note}. The x-axis counts tokens."


def after(series: Series, tokens: float) -> Series:
    """The points from `tokens` on."""
    keep = series.tokens >= tokens
    return Series(series.steps[keep], series.tokens[keep], series.values[keep])


def until(series: Series, tokens: float) -> Series:
    """The points up to `tokens`."""
    keep = series.tokens <= tokens
    return Series(series.steps[keep], series.tokens[keep], series.values[keep])


def _with_smooth(name: str, series: Series, color: int = 0) -> list[Line]:
    """A noisy curve, faint, and its running mean; alone where it has few points."""
    if len(series.finite) < SMOOTH_LEAST:
        return [Line(name, series, color, "dots" if len(series) < SMOOTH_LEAST else "line")]
    return [Line("each step", series, color, "faint"), Line(name, smooth(series), color)]


def heldout_charts(run: RunFolder) -> list[Chart]:
    """Held-out loss a source, then whatever else the evaluation rows hold and that varies.

    With one source, figures of a family share a chart; with several, each has its own.
    """
    colors = source_colors(run)
    series = run.metrics.evaluation
    groups: dict[str, list[str]] = {"loss": []}
    for prefix, keys in _by_prefix(series).items():
        if prefix in HELDOUT_QUIET or (prefix != "loss" and not _varies(series, keys)):
            continue
        family = next((title for title, names in FAMILIES.items() if prefix in names), prefix)
        groups.setdefault(family if len(keys) == 1 else prefix, []).extend(keys)
    charts = []
    for title, keys in groups.items():
        lines = []
        for index, key in enumerate(keys):
            figure, _, source = key.partition("/")
            together = title in FAMILIES
            name = figure.replace("_", " ") if together or not source else source
            color = index if together else colors.get(source, index)
            lines.append(Line(name, series[key], color, "dots"))
        chart = line_chart(
            f"Held-out {title[:1].lower()}{title[1:].replace('_', ' ')}",
            lines,
            x_range=x_range(run),
            bands=bands_of(run),
            note="On data that is not trained on, a source." if title == "loss" else "",
            wide=title == "loss",
        )
        charts += [chart] if chart else []
    return charts


def _varies(series: dict[str, Series], keys: Sequence[str]) -> bool:
    values = [series[key].finite.values for key in keys]
    return any(one.size == 1 or (one.size and np.ptp(one)) for one in values)


def source_colors(run: RunFolder) -> dict[str, int]:
    """Source → colour, the same in every chart."""
    names = list(run.schedule.sources) if run.schedule else []
    names += [
        key.removeprefix("loss/")
        for key in run.metrics.evaluation
        if key.startswith("loss/") and key.removeprefix("loss/") not in names
    ]
    return {name: index for index, name in enumerate(names)}


def known_charts(run: RunFolder) -> list[Chart]:
    """Learning rate, gradient norm, throughput, MFU or FLOP/s, and waiting for data."""
    charts = []
    has_mfu = bool(len(run.metrics.series("mfu").finite))
    for key, title, note, form, zero in KNOWN:
        series = run.metrics.series(key)
        if key == "tflops_per_second_per_device" and has_mfu:
            continue
        if form == "percent":
            series = Series(series.steps, series.tokens, 100 * series.values)
            form = percent_form
        lines = [Line(title.lower(), series, 0, "dots" if len(series) < SMOOTH_LEAST else "line")]
        chart = line_chart(
            title,
            lines,
            x_range=x_range(run),
            bands=bands_of(run),
            note=note,
            include_zero=zero,
            form=form,
        )
        charts += [chart] if chart else []
    return charts


def percent_form(value: float) -> str:
    """A value that is in percent already."""
    return f"{numbers.figure(value, 3)} %"


def extra_charts(run: RunFolder) -> list[Chart]:
    """Every other scalar of the training rows that varies; keys with one prefix share a chart.

    What a preference run logs (rewards, margins, accuracies) comes here without being named.
    """
    charts = []
    for title, keys in _groups(extra_keys(run.metrics)).items():
        lines = []
        for index, key in enumerate(keys):
            name = (key.partition("/")[2] or key).replace("_", " ")
            lines += _with_smooth(name, run.metrics.series(key), index)
        chart = line_chart(title, lines, x_range=x_range(run), bands=bands_of(run))
        charts += [chart] if chart else []
    return charts


def extra_keys(metrics: Metrics) -> list[str]:
    """Training curves that have no chart of their own and do not stay what they are."""
    own = {key for key, *_ in KNOWN} | set(QUIET) | set(PLACEHOLDERS) | {"loss"}
    keys = []
    for key, series in metrics.train.items():
        finite = series.finite.values
        if key in own or not finite.size or (len(finite) > 1 and not np.ptp(finite)):
            continue
        if key == "nll" and np.array_equal(series.values, metrics.series("loss").values, True):
            continue
        if finite.size == 1 and finite[0] == 0:
            continue
        keys.append(key)
    return keys


def constants(metrics: Metrics) -> dict[str, float]:
    """Numbers of the training rows that never change, the known ones left out."""
    own = {key for key, *_ in KNOWN} | set(QUIET) | set(PLACEHOLDERS) | set(LOSS_KEYS)
    return {
        key: float(series.finite.values[0])
        for key, series in metrics.train.items()
        if key not in own and len(series.finite) > 1 and not np.ptp(series.finite.values)
    }


def _groups(keys: Sequence[str]) -> dict[str, list[str]]:
    """Title → keys of one chart: a family, or "a/x" and "a/y"; shares apart from other scales."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        prefix, slash, _ = key.partition("/")
        title = next((title for title, family in FAMILIES.items() if key in family), "")
        if not title:
            apart = slash and ("accurac" in key or "margin" in key)
            title = (key.replace("/", ": ") if apart else prefix).replace("_", " ")
            title = title[:1].upper() + title[1:]
        groups.setdefault(title, []).append(key)
    return groups


def _by_prefix(series: dict[str, Series]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for key in series:
        out.setdefault(key.partition("/")[0], []).append(key)
    return out


def benchmark_charts(run: RunFolder) -> list[Chart]:
    """Scores of tasks that were measured while training, in percent where they are shares."""
    lines = [
        Line(
            _score_name(key),
            Series(series.steps, series.tokens, 100 * series.values)
            if _are_shares(series)
            else series,
            index,
            "dots",
        )
        for index, (key, series) in enumerate(run.metrics.benchmark.items())
        if key not in PLACEHOLDERS and "stderr" not in key
    ]
    chart = line_chart(
        "Scores while training",
        lines,
        x_range=x_range(run),
        bands=bands_of(run),
        note="Percent, where a score is a share of right answers.",
        wide=True,
    )
    return [chart] if chart else []


def _score_name(key: str) -> str:
    """ "arc_easy/acc_norm,none" as "arc_easy acc_norm"."""
    return key.replace("/", " ").removesuffix(",none").replace(",", " ")


def _are_shares(series: Series) -> bool:
    values = series.finite.values
    return bool(values.size and values.min() >= 0 and values.max() <= 1)

"""Line charts as plain geometry; the template `chart.html` turns them into inline SVG.

A plot's SVG is 1000 × 1000 units stretched to whatever width the page gives it, with strokes that
do not stretch; all text is HTML beside it, so that it stays readable on a phone and on paper.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence

import numpy as np

from danube_jax.report import numbers
from danube_jax.report.metric_rows import Series

UNITS = 1000.0  # of the SVG, either way
COLORS = 8  # in the style sheet
BUCKETS = 300  # of a thinned line; each keeps up to four points
PADDING = 0.05  # of the values' range, above and below
LOG_FROM = 30.0  # largest value ÷ median from which a chart of positive values is logarithmic
SMOOTH_SHARE = 0.02  # of a line's points that a smoothed value is the mean of


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve to draw.

    Attributes:
      color: 0 to COLORS - 1.
      style: "line", "faint" (behind others, not in the legend) or "dots" (few points, each marked).
    """

    name: str
    series: Series
    color: int = 0
    style: str = "line"


@dataclasses.dataclass(frozen=True)
class Band:
    """A shaded stretch of the x-axis, in tokens; `context` as it is to be written."""

    start: float
    end: float
    name: str
    context: str = ""


@dataclasses.dataclass(frozen=True)
class Mark:
    """Something that happened at one place of the x-axis."""

    at: float
    text: str
    kind: str = "info"  # or "warning"


@dataclasses.dataclass(frozen=True)
class DrawnLine:
    """A curve in SVG units; `dots` is a path of points, `last` the last value as text."""

    name: str
    color: int
    style: str
    path: str
    dots: str
    last: str


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart ready to be drawn: places are percent of the plot, from its left and from its top."""

    title: str
    note: str
    summary: str
    lines: tuple[DrawnLine, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    bands: tuple[tuple[float, float, Band], ...]  # left, width
    marks: tuple[tuple[float, Mark], ...]
    lost: tuple[float, ...]  # where values were no numbers
    hover: str  # JSON for the script, without "<"
    wide: bool
    legend: bool

    @property
    def single(self) -> str:
        """The last value where there is one curve only and no legend is wanted for it."""
        named = [line for line in self.lines if line.style != "faint"]
        return named[0].last if len(named) == 1 and not self.legend else ""


def thin(series: Series, buckets: int = BUCKETS) -> Series:
    """A series of at most about 5 x `buckets` points that looks the same.

    In each of `buckets` equal stretches of tokens the first, the last, the smallest and the largest
    value are kept, and the first one that is no number; so no spike is lost.
    """
    if len(series) <= 4 * buckets:
        return series
    tokens, values = series.tokens, series.values
    span = max(float(tokens[-1] - tokens[0]), 1e-12)
    bucket = np.minimum(((tokens - tokens[0]) / span * buckets).astype(np.int64), buckets - 1)
    starts = np.flatnonzero(np.r_[True, bucket[1:] != bucket[:-1]])
    ends = np.r_[starts[1:], len(values)]
    keep: set[int] = set()
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        part = values[start:end]
        keep |= {start, end - 1}
        finite = np.flatnonzero(np.isfinite(part))
        if finite.size:
            keep |= {
                start + int(finite[np.argmin(part[finite])]),
                start + int(finite[np.argmax(part[finite])]),
            }
        if finite.size < len(part):
            keep.add(start + int(np.flatnonzero(~np.isfinite(part))[0]))
    chosen = np.array(sorted(keep))
    return Series(series.steps[chosen], tokens[chosen], values[chosen])


def smooth(series: Series) -> Series:
    """Centred running mean over 2 % of the finite points, at least five; narrower at both ends."""
    finite = series.finite
    total = len(finite)
    half = max(2, round(total * SMOOTH_SHARE / 2))
    place = np.arange(total)
    reach = np.minimum(np.minimum(place, total - 1 - place), half)
    sums = np.r_[0.0, np.cumsum(finite.values)]
    means = (sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1)
    return Series(finite.steps, finite.tokens, means)


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_range: tuple[float, float] | None = None,
    bands: Sequence[Band] = (),
    marks: Sequence[Mark] = (),
    note: str = "",
    include_zero: bool = False,
    form: Callable[[float], str] = numbers.figure,
    wide: bool = False,
    legend: bool = False,
    x_unit: str = "tokens",
) -> Chart | None:
    """Lays out a chart; None where no line has a value that is a number.

    Args:
      x_range: tokens at the left and the right edge; default: those of the lines.
      include_zero: whether the y-axis begins at zero.
      form: writes a value in the legend.
      wide: whether the chart takes the width of the page.
      legend: whether even a single curve is named in a legend.
      x_unit: what `tokens` of the series are, if something else.
    """
    lines = [line for line in lines if len(line.series)]
    shown = [line.series for line in lines]
    values = np.concatenate([series.finite.values for series in shown]) if shown else np.zeros(0)
    if not values.size:
        return None
    left = min(float(series.tokens[0]) for series in shown)
    right = max(float(series.tokens[-1]) for series in shown)
    left, right = x_range or (left, right)
    if right <= left:
        left, right = left - 0.5, left + 0.5
    scale = _value_scale(values, include_zero)
    drawn = tuple(_draw(line, left, right, scale, form) for line in lines)
    lost = sorted(
        {
            round(_percent(tokens, left, right), 2)
            for series in shown
            for tokens in thin(series).tokens[~np.isfinite(thin(series).values)].tolist()
        }
    )
    return Chart(
        title=title,
        note=note + (" Logarithmic scale." if scale.log else ""),
        summary=_summary(title, lines, form, x_unit),
        lines=drawn,
        x_ticks=_x_ticks(left, right),
        y_ticks=scale.ticks(),
        bands=tuple(_place_bands(bands, left, right)),
        marks=tuple(
            (_percent(mark.at, left, right), mark) for mark in marks if left <= mark.at <= right
        ),
        lost=tuple(place for place in lost if 0 <= place <= 100),
        hover=_hover(lines, left, right, scale, x_unit),
        wide=wide,
        legend=legend,
    )


@dataclasses.dataclass(frozen=True)
class _Scale:
    """Values to places: `low` is at the bottom, `high` at the top."""

    low: float
    high: float
    log: bool

    def percent(self, values: np.ndarray) -> np.ndarray:
        """Percent from the top."""
        values = np.asarray(values, np.float64)
        if self.log:
            low, high = math.log10(self.low), math.log10(self.high)
            values = np.log10(values)
        else:
            low, high = self.low, self.high
        return 100 * (1 - (values / (high - low) - low / (high - low)))

    def ticks(self) -> tuple[tuple[float, str], ...]:
        if self.log:
            first = math.ceil(math.log10(self.low) - 1e-9)
            last = math.floor(math.log10(self.high) + 1e-9)
            every = max(1, (last - first) // 4)
            chosen = [10.0**n for n in range(first, last + 1, every)]
            if len(chosen) >= 2:
                places = self.percent(np.array(chosen)).tolist()
                return tuple(
                    zip(
                        places,
                        [f"{v:g}" if v < 1e3 else numbers.count(v) for v in chosen],
                        strict=True,
                    )
                )
        chosen = numbers.ticks(self.low, self.high, 5)
        step = chosen[1] - chosen[0] if len(chosen) > 1 else self.high - self.low
        if self.log:
            chosen = [value for value in chosen if value > 0]
        places = self.percent(np.array(chosen)).tolist()
        return tuple(zip(places, [numbers.tick_label(v, step) for v in chosen], strict=True))


def _value_scale(values: np.ndarray, include_zero: bool) -> _Scale:
    low, high = float(values.min()), float(values.max())
    if low > 0 and not include_zero and high > LOG_FROM * float(np.median(values)):
        return _Scale(low / 1.15, high * 1.15, log=True)
    if include_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = (high - low) * PADDING
    if not room or not math.isfinite(room) or room < 1e-9 * max(abs(low), abs(high)):
        room = max(abs(low), abs(high)) * PADDING or 1.0
    bottom = low if include_zero and low == 0 else low - room
    top = high if include_zero and high == 0 > low else high + room
    return _Scale(bottom, top, log=False)


def _percent(at: float, left: float, right: float) -> float:
    return 100 * (at - left) / (right - left)


def _draw(
    line: Line, left: float, right: float, scale: _Scale, form: Callable[[float], str]
) -> DrawnLine:
    series = thin(line.series)
    x = (series.tokens - left) / (right - left) * UNITS
    fine = np.isfinite(series.values)
    y = np.zeros(len(series))
    y[fine] = scale.percent(series.values[fine]) * UNITS / 100
    parts, alone, previous = [], [], False
    for i, (px, py) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        if fine[i]:
            following = i + 1 < len(series) and fine[i + 1]
            parts.append(f"{'L' if previous else 'M'}{px:.1f},{py:.1f}")
            if not previous and not following:
                alone.append(f"M{px:.1f},{py:.1f}h0")
        previous = bool(fine[i])
    if line.style == "dots":
        alone = [
            f"M{px:.1f},{py:.1f}h0"
            for px, py, good in zip(x.tolist(), y.tolist(), fine.tolist(), strict=True)
            if good
        ]
    finite = line.series.finite
    last = form(float(finite.values[-1])) if len(finite) else numbers.NONE
    color = line.color % COLORS
    return DrawnLine(line.name, color, line.style, "".join(parts), "".join(alone), last)


def _x_ticks(left: float, right: float) -> tuple[tuple[float, str], ...]:
    places = numbers.ticks(left, right, 6)
    step = places[1] - places[0] if len(places) > 1 else right - left
    return tuple(
        (_percent(value, left, right), numbers.tick_label(value, step)) for value in places
    )


def _place_bands(
    bands: Sequence[Band], left: float, right: float
) -> list[tuple[float, float, Band]]:
    placed = []
    for band in bands:
        start, end = max(band.start, left), min(band.end, right)
        if end > start:
            begin = _percent(start, left, right)
            placed.append((begin, _percent(end, left, right) - begin, band))
    return placed


def _summary(title: str, lines: Sequence[Line], form: Callable[[float], str], x_unit: str) -> str:
    """The chart in words, for those who cannot see it."""
    parts = []
    for line in lines:
        finite = line.series.finite
        if line.style != "faint" and len(finite):
            first, last = float(finite.values[0]), float(finite.values[-1])
            parts.append(f"{line.name} from {form(first)} to {form(last)}")
    return f"{title} against {x_unit}: {'; '.join(parts)}"


def _hover(lines: Sequence[Line], left: float, right: float, scale: _Scale, x_unit: str) -> str:
    data = {
        "unit": x_unit,
        "range": [left, right],
        "scale": [scale.low, scale.high, int(scale.log)],
        "lines": [
            {
                "name": line.name,
                "color": line.color % COLORS,
                "x": [_short(v) for v in thinned.tokens.tolist()],
                "y": [_short(v) for v in thinned.values.tolist()],
            }
            for line, thinned in ((line, thin(line.series)) for line in lines)
        ],
    }
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _short(value: float) -> float | int | None:
    """Six significant digits of a value, or seventeen of a whole number; None where it is none."""
    if not math.isfinite(value):
        return None
    if value == int(value) and abs(value) < 2**53:
        return int(value)
    return float(f"{value:.6g}")

"""Charts show the data: points where they belong, no spike lost, round ticks."""

import itertools
import json
import re

import numpy as np
import pytest

from danube_jax.report import numbers
from danube_jax.report.charts import Band, Line, Mark, line_chart, smooth, thin
from danube_jax.report.metric_rows import Series


def series(values, tokens=None):
    values = np.asarray(values, np.float64)
    steps = np.arange(1, len(values) + 1)
    return Series(steps, steps * 1000.0 if tokens is None else np.asarray(tokens, float), values)


def decode(path, chart):
    """Tokens and values of an SVG path, from the chart's own scale."""
    hover = json.loads(chart.hover)
    (left, right), (low, high, log) = hover["range"], hover["scale"]
    pairs = re.findall(r"[ML]([-\d.]+),([-\d.]+)", path)
    x, y = np.array(pairs, float).T
    share = 1 - y / 1000
    values = low * (high / low) ** share if log else low + share * (high - low)
    return left + x / 1000 * (right - left), values


@pytest.mark.parametrize("seed", range(3))
def test_a_path_is_the_data(seed):
    rng = np.random.default_rng(seed)
    data = series(rng.normal(size=200).cumsum())
    chart = line_chart("walk", [Line("walk", data)])
    tokens, values = decode(chart.lines[0].path, chart)
    # one decimal in a thousand units
    np.testing.assert_allclose(tokens, data.tokens, atol=0.051 / 1000 * np.ptp(data.tokens))
    np.testing.assert_allclose(values, data.values, atol=0.06 / 1000 * 1.1 * np.ptp(data.values))
    hover = json.loads(chart.hover)["lines"][0]
    assert hover["x"] == data.tokens.tolist()
    np.testing.assert_allclose(hover["y"], data.values, rtol=5e-6)


def test_a_chart_of_large_ratios_is_logarithmic():
    data = series([1000.0, 1.0, 1.2, 0.9, 1.1, 50.0])
    chart = line_chart("spiky", [Line("spiky", data)])
    assert "Logarithmic" in chart.note
    _, values = decode(chart.lines[0].path, chart)
    np.testing.assert_allclose(values, data.values, rtol=1e-3)
    ticks = [label for _, label in chart.y_ticks]
    assert ticks == ["1", "10", "100", "1k"]


def test_thinning_keeps_every_extreme_and_both_ends():
    rng = np.random.default_rng(0)
    values = rng.normal(size=50_000)
    values[[777, 30_001]] = 1e3, -1e3
    values[12_345] = np.nan
    data = series(values)
    thinned = thin(data, 300)
    assert len(thinned) <= 5 * 300
    assert np.all(np.diff(thinned.tokens) > 0)
    assert thinned.tokens[0] == data.tokens[0]
    assert thinned.tokens[-1] == data.tokens[-1]
    assert np.isnan(thinned.values).sum() == 1
    edges = np.linspace(data.tokens[0], data.tokens[-1], 301)
    for first, last in itertools.pairwise(edges):
        inside = (data.tokens >= first) & (data.tokens < last)
        kept = (thinned.tokens >= first) & (thinned.tokens < last)
        assert np.nanmax(thinned.values[kept]) == np.nanmax(data.values[inside])
        assert np.nanmin(thinned.values[kept]) == np.nanmin(data.values[inside])


def test_a_short_series_is_not_thinned():
    data = series(np.arange(100.0))
    assert thin(data, 300) is data


def test_smoothing_is_a_centred_mean():
    rng = np.random.default_rng(1)
    values = rng.normal(size=400)
    means = smooth(series(values)).values
    for place in (0, 1, 3, 4, 200, 396, 399):
        reach = min(place, 399 - place, 4)
        assert means[place] == pytest.approx(values[place - reach : place + reach + 1].mean())


def test_values_that_are_no_numbers_break_the_line_and_are_marked():
    data = series([1.0, 2.0, np.nan, 3.0, np.inf, 2.5])
    chart = line_chart("broken", [Line("broken", data)])
    path = chart.lines[0].path
    assert path.count("M") == 3
    assert path.count("L") == 1
    assert chart.lines[0].dots.count("h0") == 2  # 3.0 and 2.5 stand alone
    assert chart.lost == (40.0, 80.0)
    assert json.loads(chart.hover)["lines"][0]["y"] == [1, 2, None, 3, None, 2.5]


def test_nothing_to_draw_is_no_chart():
    assert line_chart("none", []) is None
    assert line_chart("none", [Line("x", series([]))]) is None
    assert line_chart("none", [Line("x", series([np.nan, np.inf]))]) is None


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-30, 3e38])
def test_one_point_and_constant_values_have_a_scale(value):
    for values in ([value], [value] * 5):
        chart = line_chart("flat", [Line("flat", series(values))])
        assert chart.y_ticks
        _, decoded = decode(chart.lines[0].path, chart)
        np.testing.assert_allclose(decoded, value, rtol=2e-3, atol=1e-2)


def test_zero_throughout_has_a_scale_that_begins_at_zero():
    chart = line_chart("none", [Line("none", series([0.0, 0.0]))], include_zero=True)
    _, decoded = decode(chart.lines[0].path, chart)
    np.testing.assert_array_equal(decoded, [0.0, 0.0])
    assert json.loads(chart.hover)["scale"] == [0.0, 1.0, 0]


def test_bands_and_marks_stand_where_their_tokens_are():
    data = series([1.0, 2.0], tokens=[0, 1000])
    bands = [Band(-500, 250, "a"), Band(250, 2000, "b"), Band(3000, 4000, "c")]
    marks = [Mark(500, "middle"), Mark(5000, "beyond")]
    chart = line_chart("x", [Line("x", data)], bands=bands, marks=marks)
    assert [(left, width, band.name) for left, width, band in chart.bands] == [
        (0, 25, "a"),
        (25, 75, "b"),
    ]
    assert [(at, mark.text) for at, mark in chart.marks] == [(50, "middle")]


def test_ticks_are_round_and_inside():
    rng = np.random.default_rng(0)
    for _ in range(500):
        low = float(rng.normal() * 10 ** rng.uniform(-6, 12))
        high = low + float(10 ** rng.uniform(-6, 12)) * (1 + abs(low))
        places = numbers.ticks(low, high, 5)
        assert 1 <= len(places) <= 6
        slack = 1e-6 * (high - low)
        assert all(low - slack <= place <= high + slack for place in places)
        if len(places) > 1:
            step = places[1] - places[0]
            mantissa = step / 10 ** np.floor(np.log10(step) + 1e-9)
            assert min(abs(mantissa - factor) for factor in (1, 2, 2.5, 5)) < 1e-3


def test_numbers_read_well():
    written = {
        numbers.count: {0: "0", 999: "999", 1200128: "1.2M", 1_049_728: "1.05M", 3e12: "3T"},
        numbers.figure: {3.8427693: "3.843", 0.0: "0", 1e-5: "1e-5", 12345.6: "12,346"},
        numbers.scientific: {0.00271: "2.71e-3", 2e-4: "2e-4"},
        numbers.duration: {7.3: "7.3 s", 211: "3m 31s", 3900: "1h 05m", 9e4: "1d 01h"},
        numbers.size: {902684672: "903 MB", 78.3e9: "78.3 GB"},
        numbers.moment: {0: "1970-01-01 00:00:00", True: "", 1e300: ""},
    }
    for form, cases in written.items():
        for value, text in cases.items():
            assert form(value) == text
    assert numbers.tick_label(0.25, 0.25) == "0.25"
    assert numbers.tick_label(0.5, 0.25) == "0.50"
    assert numbers.tick_label(7, 1) == "7"
    assert numbers.tick_label(1_250_000, 250_000) == "1.25M"
    assert numbers.tick_label(2.5, 2.5) == "2.5"

"""Two or more runs on one page."""

import json

import numpy as np
import pytest
from helpers import command
from html_page import Page
from report_folders import default_rows, make_run, run_config, train_row

from danube_jax.report import comparison
from danube_jax.report.collect import collect
from danube_jax.report.page import render_comparison


@pytest.fixture
def runs(tmp_path):
    """A run, and one of half its length with other losses, batch and seed."""
    other = run_config()
    other["training"]["seed"] = 7
    other["optimizer"]["learning_rate"] = 1e-3
    rows = [train_row(step, loss=2.0) for step in range(1, 31)]
    first = make_run(tmp_path / "a")
    second = make_run(tmp_path / "b", config=other, rows=rows)
    return [collect(first), collect(second)]


def page_of(runs):
    html = render_comparison(runs)
    page = Page(html)
    page.assert_alone(html)
    return page


def test_every_run_is_in_every_chart(runs):
    page = page_of(runs)
    charts = [json.loads(data)["lines"] for data in page.data]
    both = [chart for chart in charts if {line["name"] for line in chart} == {"a", "b"}]
    assert len(both) >= 5
    assert all(line["color"] == "ab".index(line["name"]) for chart in both for line in chart)
    anchors = [attributes["href"] for attributes in page.tags("a")]
    assert anchors == ["#loss", "#heldout", "#samples", "#training", "#config"]


def test_only_what_differs_is_listed(runs):
    rows = {row.label: row.cells for row in comparison.config_differences(runs)}
    assert rows["training.seed"] == ("0", "7")
    assert rows["optimizer.learning_rate"] == ("0.0002", "0.001")
    assert not any(key.startswith(("model", "phases", "data")) for key in rows)


def test_losses_are_set_side_by_side_at_the_same_tokens(runs):
    rows = comparison.losses_at_tokens(runs)
    losses = np.array([row["loss"] for row in default_rows() if row["kind"] == "train"])
    assert [row.label for row in rows] == [
        "3.84k tokens",
        "7.68k tokens",
        "11.5k tokens",
        "15.4k tokens",
    ]
    for row, end in zip(rows, (7, 15, 22, 30), strict=True):
        expected = losses[end - 5 : end].mean()
        assert float(row.cells[0]) == pytest.approx(expected, abs=1e-3)
        assert row.cells[1] == "2.000"
        assert row.best == (1,)


def test_losses_are_drawn_against_time(runs):
    chart = json.loads(comparison.time_chart(runs, ["a", "b"]).hover)
    assert chart["unit"] == "minutes"
    # 512 tokens a step at 1,000 a second
    np.testing.assert_allclose(chart["lines"][0]["x"], np.arange(1, 61) * 0.512 / 60, rtol=1e-5)
    assert len(chart["lines"][1]["x"]) == 30


def test_the_best_is_marked_only_where_runs_differ():
    assert comparison.lowest([1.0, 2.0, None]) == (0,)
    assert comparison.lowest([1.0, 1.0]) == ()
    assert comparison.lowest([None, 3.0]) == ()
    assert comparison.lowest([float("nan"), 3.0, 2.0, 2.0]) == (2, 3)


def test_names_tell_the_runs_apart(tmp_path):
    folders = [tmp_path / "x" / "run", tmp_path / "y" / "run"]
    runs = [collect(make_run(folder)) for folder in folders]
    assert comparison.labels(runs) == [str(folder) for folder in folders]
    assert comparison.labels([runs[0], runs[0]]) == [f"1: {folders[0]}", f"2: {folders[0]}"]
    named = collect(make_run(tmp_path / "z", config=run_config() | {"name": "other"}))
    assert comparison.labels([runs[0], named]) == ["tiny", "other"]


def test_nine_runs_and_broken_ones(tmp_path):
    folders = [make_run(tmp_path / f"run{i}") for i in range(7)]
    empty = make_run(tmp_path / "empty", rows=[], samples={})
    broken = make_run(tmp_path / "broken", rows=[train_row(1, loss=float("nan"))])
    (broken / "config.json").unlink()
    page = page_of([collect(folder) for folder in [*folders, empty, broken]])
    assert "empty: metrics.jsonl holds no row yet." in page.text
    assert "broken: config.json is not there" in page.text


def test_text_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    config = run_config() | {"name": evil}
    config["samples"]["prompts"] = [evil]
    runs = [
        collect(make_run(tmp_path / "a", config=config, samples={1: (f"{evil} one",)})),
        collect(make_run(tmp_path / "b", samples={1: (f"{evil} two", "x")})),
    ]
    page = page_of(runs)
    assert len(page.scripts) == 1
    assert evil in page.text


def test_the_command_takes_several_workdirs(runs, tmp_path):
    flags = [f"--workdir={run.path}" for run in runs]
    output = tmp_path / "out" / "two.html"
    result = command(*flags, f"--output={output}", module="tools/report.py")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(output)
    assert output.read_text() == render_comparison([collect(run.path) for run in runs])

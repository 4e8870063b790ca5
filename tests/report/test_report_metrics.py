"""Reading metrics.jsonl in whatever state it is."""

import json

import numpy as np
import pytest
from report_folders import train_row

from danube_jax.report.metric_rows import read_metrics


def write(path, lines):
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return path


def test_series_hold_what_was_logged(tmp_path):
    rows = [train_row(step) for step in range(1, 40)]
    metrics = read_metrics(write(tmp_path / "metrics.jsonl", rows))
    loss = metrics.series("loss")
    np.testing.assert_array_equal(loss.values, [row["loss"] for row in rows])
    np.testing.assert_array_equal(loss.steps, [row["step"] for row in rows])
    np.testing.assert_array_equal(loss.tokens, [row["tokens"] for row in rows])
    assert "mfu" not in metrics.train  # null everywhere: not known
    assert "phase" not in metrics.train
    assert (metrics.rows, metrics.last_step, metrics.problems) == (39, 39, ())


def test_not_a_number_is_kept_and_told_from_not_known(tmp_path):
    values = [1.0, float("nan"), None, float("inf"), 2.0]
    rows = [train_row(step, loss=value) for step, value in enumerate(values, 1)]
    loss = read_metrics(write(tmp_path / "metrics.jsonl", rows)).series("loss")
    np.testing.assert_array_equal(loss.values, [1.0, np.nan, np.inf, 2.0])
    np.testing.assert_array_equal(loss.steps, [1, 2, 4, 5])
    np.testing.assert_array_equal(loss.finite.steps, [1, 5])


@pytest.mark.parametrize(
    ("junk", "named"),
    [
        ('{"kind": "train", "st', "line 3"),
        ("[1, 2]", "line 3"),
        ('{"kind": "train"}', "line 3"),
        ('{"kind": 3, "step": 1}', "line 3"),
        ('{"kind": "train", "step": "one"}', "line 3"),
        ('{"kind": "train", "step": 1e999}', "line 3"),
        ("\x00\x01\ufffd", "line 3"),
        ("[" * 100_000, "line 3"),
    ],
)
def test_damaged_lines_are_named_and_the_rest_is_read(tmp_path, junk, named):
    lines = [train_row(1), train_row(2), junk, train_row(3)]
    metrics = read_metrics(write(tmp_path / "metrics.jsonl", lines))
    np.testing.assert_array_equal(metrics.series("loss").steps, [1, 2, 3])
    assert len(metrics.problems) == 1
    assert named in metrics.problems[0]


def test_a_step_logged_twice_counts_once(tmp_path):
    rows = [train_row(1, loss=1.0), train_row(2, loss=2.0), train_row(2, loss=9.0)]
    rows += [train_row(1, loss=8.0), train_row(3, loss=3.0)]
    loss = read_metrics(write(tmp_path / "metrics.jsonl", rows)).series("loss")
    np.testing.assert_array_equal(loss.steps, [1, 2, 3])
    np.testing.assert_array_equal(loss.values, [8.0, 9.0, 3.0])


def test_no_file_and_an_empty_file_are_said(tmp_path):
    assert "not there" in read_metrics(tmp_path / "metrics.jsonl").problems[0]
    (tmp_path / "metrics.jsonl").touch()
    assert "no row" in read_metrics(tmp_path / "metrics.jsonl").problems[0]


def test_rows_without_tokens_stand_at_their_step(tmp_path):
    rows = [{"kind": "train", "step": step, "loss": 1.0, "flag": True} for step in (5, 7)]
    metrics = read_metrics(write(tmp_path / "metrics.jsonl", rows))
    np.testing.assert_array_equal(metrics.series("loss").tokens, [5, 7])
    assert "flag" not in metrics.train

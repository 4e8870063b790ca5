"""Whatever values stand in a run's files, there is a page."""

import json
import random

import pytest
from html_page import Page
from report_folders import default_rows, event_row, make_run, run_config

from danube_jax.report.collect import collect
from danube_jax.report.page import render, render_comparison

JUNK = (None, True, -1, 0, 3.5, float("inf"), float("nan"), 10**400, 1e308, "x", "", [], [1], {})
JUNK += ({"a": {}}, ["<", None], -(2**63), 2**64)


def spoil(value, rng, share):
    """`value` with a share of its parts replaced by junk."""
    if rng.random() < share:
        return rng.choice(JUNK)
    if isinstance(value, dict):
        return {key: spoil(item, rng, share) for key, item in value.items()}
    if isinstance(value, list):
        return [spoil(item, rng, share) for item in value]
    return value


@pytest.mark.parametrize("seed", range(25))
def test_junk_never_stops_the_page(tmp_path, seed):
    rng = random.Random(seed)
    rows = default_rows(40)
    rows += [event_row("skipped", 5, loss=1.0, grad_norm=2.0, in_a_row=1, in_all=1)]
    rows += [event_row("restored_older", 6, damaged=[7]), event_row("diverged", 8, in_a_row=2)]
    rows += [event_row("init_from", 0, source={"path": "x"}), event_row("stopped", 9)]
    rows += [{"kind": "benchmark", "step": 30, "tokens": 9, "arc/acc": 0.5}]
    spoilt = []
    for row in rows:
        kept = {"kind": row["kind"], "step": row["step"]} if rng.random() < 0.7 else {}
        new = spoil(row, rng, 0.05)
        spoilt.append(new | kept if isinstance(new, dict) else {"junk": new})
    config = spoil(run_config(), rng, 0.02)
    workdir = make_run(tmp_path / "run", rows=spoilt, config=config if seed % 3 else run_config())
    results = {
        "results": {"arc": {"acc,none": 0.5, "acc_stderr,none": 0.1}, "g": {"acc,none": 0.2}},
        "n-shot": {"arc": 5},
        "n-samples": {"arc": {"original": 10, "effective": 5}},
        "group_subtasks": {"g": ["arc"]},
    }
    bench = {"turn_1": 5.0, "average": 4.0, "categories": {"math": {"turn_1": 2.0}}, "ungraded": []}
    (workdir / "evaluation").mkdir()
    for name, content in (("results_30_leaderboard.json", results), ("mt_bench_30.json", bench)):
        (workdir / "evaluation" / name).write_text(json.dumps(spoil(content, rng, 0.1)))
    run = collect(workdir)
    Page(render(run))
    other = collect(make_run(tmp_path / "other"))
    Page(render_comparison([run, other]))

"""The page of one run: valid, self-contained, escaped, complete, and it says what is missing."""

import base64
import hashlib
import json
import re

import numpy as np
import pytest
from helpers import command
from html_page import Page
from report_folders import BATCH, default_rows, event_row, make_run, run_config, train_row

from danube_jax.config import parse_config
from danube_jax.data.phases import PhaseSchedule, SampleOrder, sequences_read
from danube_jax.errors import UserError
from danube_jax.report import page
from danube_jax.report.collect import collect
from danube_jax.report.page import render, write_report

EVIL = (
    "</script></style></pre><script>alert(1)</script>"
    """<img src=x onerror="alert(2)">&lt;b&gt;'"{{7*7}}"""
)


def page_of(workdir):
    """The page of a run's folder, read strictly."""
    html = render(collect(workdir))
    page = Page(html)
    page.assert_alone(html)
    assert len(page.scripts) == 1
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    policy = next(
        meta["content"]
        for meta in page.tags("meta")
        if "content" in meta and "default-src" in meta["content"]
    )
    assert f"script-src 'sha256-{digest}'" in policy
    return page


def test_a_whole_run_has_every_part(tmp_path):
    shown = page_of(make_run(tmp_path / "run"))
    anchors = [attributes["href"] for attributes in shown.tags("a")]
    ids = [f"#{attributes['id']}" for attributes in shown.tags("section") if "id" in attributes]
    assert anchors == ids
    assert ids == ["#loss", "#heldout", "#samples", "#training", "#mix", "#events", "#config"]
    for text in (
        "finished, step 60 of 60",
        "43,210",  # parameters, as recorded
        "Mistral decoder: 2 layers",
        "context 32",
        "30.7k",  # 60 x 512 tokens
        "Started on 8 x test device.",
        "Phase long: context 64.",
        "Finished.",
        "9.8.7",
        "5.500",  # a unigram loss
        "The function is 60.",
    ):
        assert text in shown.text, text
    assert "What is missing" not in shown.text


def test_figures_are_those_of_the_rows(tmp_path):
    run = collect(make_run(tmp_path / "run"))
    rows = [row for row in default_rows() if row["kind"] == "train"]
    mean, used = run.final()
    assert used == 5
    assert mean == pytest.approx(np.mean([row["loss"] for row in rows[-5:]]))
    assert run.training_seconds == pytest.approx(60 * BATCH / 1_000)
    assert run.elapsed_seconds == 60
    assert run.tokens == 60 * BATCH
    assert run.last_heldout() == {"first": 3.0, "second": 4.0}


@pytest.mark.parametrize("step", [0, 7, 24, 25, 41, 60])
def test_the_mix_that_was_read_is_that_of_the_batches(step):
    run = parse_config(run_config())
    schedule = PhaseSchedule.from_config(run)
    order = SampleOrder(schedule, {"first": 40_000, "second": 40_000}, seed=0)
    first = schedule.first_sequence_at_step(step) if step < 60 else schedule.total_sequences
    sources, _ = order.locate(np.arange(first))
    expected = []
    for phase in schedule.phases:
        inside = sources[phase.first_sequence : phase.first_sequence + phase.num_sequences]
        expected.append({name: int((inside == i).sum()) for i, name in enumerate(order.sources)})
    assert sequences_read(schedule, step) == expected


def test_epochs_are_told_where_the_stores_can_be_read(tmp_path):
    workdir = make_run(tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    assert "epochs planned" not in page_of(workdir).text
    for name, tokens in (("first", 10_001), ("second", 20_001)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "store.json").write_text(json.dumps({"tokens": tokens}))
        config["config"]["data"]["sources"][name]["path"] = str(tmp_path / name)
    (workdir / "config.json").write_text(json.dumps(config))
    # Blocks of 64 tokens: 269 windows of 32 (0.7 of 384), so 135, and 58 (0.2 of 288), of 156
    text = page_of(workdir).text
    assert "1.24 epochs planned" in text
    (tmp_path / "first" / "store.json").write_text("{")
    assert "epochs planned" not in page_of(workdir).text


def test_nothing_of_the_folder_becomes_markup(tmp_path):
    config = run_config()
    config["name"] = config["phases"][0]["name"] = EVIL
    config["data"]["sources"][EVIL] = config["data"]["sources"]["first"]
    config["phases"][1]["mixture"] = {EVIL: 1.0}
    config["samples"]["prompts"] = [EVIL]
    rows = [train_row(1, **{EVIL: 1.0}), train_row(2, **{EVIL: 2.0, f"a/{EVIL}": 1.0})]
    rows.append({"kind": "evaluation", "step": 2, "tokens": 9, f"loss/{EVIL}": 3.0})
    rows.append(event_row(EVIL, 2, versions={EVIL: EVIL}, device=EVIL, devices=1))
    rows.append(event_row("phase", 2, phase=EVIL, context=EVIL))
    rows.append(event_row("init_from", 2, source={"path": EVIL}))
    rows.append(event_row("data_changed", 2, changes=[EVIL]))
    workdir = make_run(tmp_path / "run", config=config, rows=rows, samples={2: (EVIL + "rest",)})
    shown = page_of(workdir)  # one script, no image, no handler
    assert shown.text.count(EVIL) > 10
    assert any(EVIL in figure for figure in shown.data) is False
    names = [line["name"] for data in shown.data for line in json.loads(data)["lines"]]
    assert any(EVIL.replace("_", " ") in name for name in names)


def test_every_other_scalar_gets_a_chart(tmp_path):
    rows = []
    for step in range(1, 31):
        more = {
            f"rewards/{name}": step * scale for name, scale in (("chosen", 1), ("rejected", -1))
        }
        more |= {"rewards/accuracies": step / 30, "rewards/margins": 2 * step}
        rows.append(train_row(step, **more, answer_tokens=100 + step % 7, constant=7.0))
    shown = page_of(make_run(tmp_path / "run", rows=rows))
    lines = {line["name"]: line for data in shown.data for line in json.loads(data)["lines"]}
    for name in ("chosen", "rejected", "accuracies", "margins", "answer tokens"):
        assert len(lines[name]["x"]) == 30
    assert "constant 7" in shown.text
    together = [{line["name"] for line in json.loads(data)["lines"]} for data in shown.data]
    assert any({"chosen", "rejected"} <= names for names in together)
    assert not any({"chosen", "accuracies"} <= names for names in together)


def test_a_tuning_run_without_phases(tmp_path):
    config = run_config() | {"phases": [], "objective": "dpo"}
    config["rounds"] = [{"name": "facts", "context_length": 512}]
    rows = [event_row("start", 0, parameters=1_000, trained_parameters=10, last_step=30)]
    for step in range(1, 31):
        more = {"reward_chosen": step / 10, "reward_rejected": -step / 10, "margin": step / 5}
        rows.append(train_row(step, accuracy=step / 30, likelihood_accuracy=0.5 / step, **more))
    rows.append({"kind": "evaluation", "step": 30, "tokens": 9, "loss/x": 0.5, "accuracy/x": 0.75})
    shown = page_of(make_run(tmp_path / "run", config=config, rows=rows))
    for text in (
        "finished, step 30 of 30",
        "context 512",
        "Preference loss a pair",
        "Implicit rewards",
        "Preferred answers, share",
        "Held-out preferred answers, share",
        "10 trained (adapters)",
    ):
        assert text in shown.text, text
    families = [{line["name"] for line in json.loads(data)["lines"]} for data in shown.data]
    assert any({"reward chosen", "reward rejected", "margin"} <= names for names in families)
    assert any({"accuracy", "likelihood accuracy"} <= names for names in families)


def test_losses_that_are_no_numbers_are_shown_and_said(tmp_path):
    rows = [train_row(step, loss=float("nan") if 10 <= step < 13 else 3.0) for step in range(1, 21)]
    rows.append(event_row("skipped", 11, loss=float("nan"), grad_norm=float("inf")))
    rows.append(event_row("diverged", 20, in_a_row=3))
    shown = page_of(make_run(tmp_path / "run", rows=rows))
    assert "diverged, step 20 of 60" in shown.text
    assert "Update skipped: loss NaN, gradient norm ∞." in shown.text
    assert "a value there was not a number" in shown.text
    lost = [a for a in shown.tags("path") if a["class"] == "lost"]
    assert len(lost) == 3


def test_a_run_with_only_broken_losses_still_has_a_page(tmp_path):
    rows = [train_row(step, loss=float("nan"), grad_norm=float("nan")) for step in (1, 2)]
    shown = page_of(make_run(tmp_path / "run", rows=rows))
    assert "not finished, step 2 of 60" in shown.text


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_short_runs(tmp_path, steps):
    rows = [event_row("start", 0)] + [train_row(step) for step in range(1, steps + 1)]
    shown = page_of(make_run(tmp_path / "run", rows=rows, samples={}))
    assert f"not finished, step {steps} of 60" in shown.text
    assert "there are no samples yet" in shown.text


def test_what_is_missing_is_said(tmp_path):
    workdir = make_run(tmp_path / "run")
    path = workdir / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert "line 65 cannot be read" in page_of(workdir).text
    (workdir / "config.json").write_text("{")
    shown = page_of(workdir)
    assert "config.json cannot be read" in shown.text
    assert shown.data  # the curves are there all the same
    (workdir / "config.json").unlink()
    assert "config.json is not there" in page_of(workdir).text


def test_a_config_of_another_version_leaves_the_curves(tmp_path):
    config = run_config() | {"from_the_future": {"a": 1}}
    shown = page_of(make_run(tmp_path / "run", config=config))
    assert "config.from_the_future: unknown key" in shown.text
    assert shown.data


def test_metrics_missing_leaves_the_plan(tmp_path):
    workdir = make_run(tmp_path / "run")
    (workdir / "metrics.jsonl").unlink()
    shown = page_of(workdir)
    assert "metrics.jsonl is not there" in shown.text
    assert "70.00 %" in shown.text


def test_samples_of_other_prompts_are_shown_whole(tmp_path):
    texts = {10: ("one", "two", "three"), 20: ("The function\n\n x", "If the value y")}
    shown = page_of(make_run(tmp_path / "run", samples=texts))
    assert "one\n\n---\n\ntwo\n\n---\n\nthree" in shown.text
    assert "The function\n x" in shown.text  # without the blank line


def test_blank_lines_of_samples_are_left_out(tmp_path):
    config = run_config()
    prompt = config["samples"]["prompts"][0]
    texts = [f"{one} a" for one in config["samples"]["prompts"]]
    texts[0] = f"{prompt} one\n\n \n\ntwo\nthree"
    shown = page_of(make_run(tmp_path / "run", config=config, samples={5: tuple(texts)}))
    assert "one\ntwo\nthree" in shown.text


def test_many_samples_and_events_are_shortened_and_said(tmp_path):
    rows = [event_row("skipped", step, loss=1.0) for step in range(1, 200)]
    texts = {step: (f"The function {step}", f"If the value {step}") for step in range(1, 41)}
    shown = page_of(make_run(tmp_path / "run", rows=rows, samples=texts))
    assert "139 rows in the middle are left out" in shown.text
    assert "34 more in samples/" in shown.text
    assert "The function 1" in shown.text
    assert "The function 40" in shown.text


def test_a_long_run_is_thinned_and_keeps_its_spikes(tmp_path):
    rows = [train_row(step, loss=3.0 + step % 17 / 100) for step in range(1, 30_001)]
    rows[20_000]["loss"], rows[7_777]["loss"] = 99.5, 0.125
    workdir = make_run(tmp_path / "run", rows=rows)
    shown = page_of(workdir)
    drawn = json.loads(shown.data[0])["lines"][0]["y"]
    assert len(drawn) < 2_000
    assert (min(drawn), max(drawn)) == (0.125, 99.5)
    assert write_report(workdir).stat().st_size < 2_000_000


@pytest.mark.parametrize("kind", ["nothing", "empty", "file", "other"])
def test_a_folder_that_is_no_run_is_one_line(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "file":
        path.write_text("text")
    elif kind != "nothing":
        path.mkdir()
    if kind == "other":
        (path / "notes.txt").write_text("text")
    with pytest.raises(UserError, match=re.escape(f"--workdir={path}: ")):
        write_report(path)


def test_a_report_that_fails_warns_and_does_not_raise(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(page, "warn", warnings.append)
    workdir = make_run(tmp_path / "run")
    (workdir / "report.html").mkdir()  # cannot be replaced by a file
    assert page.report_at_end(workdir) == []
    assert len(warnings) == 1
    assert warnings[0].startswith("no report was written: ")


def test_every_round_of_a_tuning_run_gets_its_page(tmp_path):
    first = make_run(tmp_path / "run" / "rounds" / "1-wide")
    (tmp_path / "run" / "rounds" / "2-fine").mkdir()
    assert page.report_at_end(tmp_path / "run") == [first / "report.html"]
    make_run(tmp_path / "run")
    assert len(page.report_at_end(tmp_path / "run")) == 2


def test_the_command_writes_where_it_says(tmp_path):
    workdir = make_run(tmp_path / "run")
    result = command(f"--workdir={workdir}", module="tools/report.py")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(workdir / "report.html")
    assert (workdir / "report.html").read_text() == render(collect(workdir))
    result = command(f"--workdir={tmp_path}", module="tools/report.py")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: --workdir={tmp_path}: ")
    assert result.stderr.count("\n") == 1

"""Scores in lm-eval's format and of MT-Bench, beside the published ones."""

import json
import types

import pytest
from html_page import Page
from report_folders import make_run

from danube_jax.report import sections, standing
from danube_jax.report.collect import collect
from danube_jax.report.page import render


def write(workdir, name, content):
    (workdir / "evaluation").mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (workdir / "evaluation" / name).write_text(text)


def results(**tasks):
    """What lm-eval writes: task → (metric, value, standard error)."""
    return {
        "results": {
            task: {
                "alias": task,
                metric: value,
                metric.replace(",", "_stderr,"): error,
            }
            for task, (metric, value, error) in tasks.items()
        },
        "n-shot": {task: 5 for task in tasks},
        "n-samples": {task: {"original": 1000, "effective": 100} for task in tasks},
        "group_subtasks": {},
    }


def test_the_newest_scores_of_each_preset_are_shown(tmp_path):
    workdir = make_run(tmp_path / "run")
    write(workdir, "results_30_mine.json", results(arc_easy=("acc_norm,none", 0.25, 0.01)))
    content = results(
        arc_easy=("acc_norm,none", 0.3126, 0.0123), gsm=("exact_match,strict-match", 0.5, "N/A")
    )
    content["results"]["arc_easy"] |= {"acc,none": 0.99, "acc_stderr,none": 0.5}
    write(workdir, "results_60_mine.json", content)
    write(
        workdir, "results_60_other.json", results(wikitext=("word_perplexity,none", 83.21, "N/A"))
    )
    rows = standing.task_rows(collect(workdir))
    shown = [(row["task"], row["metric"], row["score"], row["step"]) for row in rows]
    assert shown == [
        ("arc_easy", "acc_norm", "31.26 ± 1.23", "60"),
        ("gsm", "exact_match (strict-match)", "50.00", "60"),
        ("wikitext", "word_perplexity", "83.21", "60"),
    ]
    assert rows[0]["documents"] == "100 of 1,000"
    assert rows[0]["shots"] == "5"
    tiles = {tile.label: tile.value for tile in sections.headline(collect(workdir))}
    assert (tiles["arc_easy"], tiles["gsm"], tiles["wikitext"]) == ("31.3", "50.0", "83.21")


def test_a_group_with_a_score_stands_for_its_tasks(tmp_path):
    workdir = make_run(tmp_path / "run")
    content = results(
        mmlu=("acc,none", 0.25, 0.01),
        mmlu_law=("acc,none", 0.2, 0.1),
        mmlu_art=("acc,none", 0.3, 0.1),
    )
    content["group_subtasks"] = {"mmlu": ["mmlu_law", "mmlu_art"]}
    del content["n-samples"]["mmlu"]
    write(workdir, "results_60_mmlu.json", content)
    (row,) = standing.task_rows(collect(workdir))
    assert (row["task"], row["documents"]) == ("mmlu", "200 of 2,000")


@pytest.mark.parametrize(
    "content",
    ["{", "[1]", {"results": 3}, {"results": {}}, {"results": {"a": {"alias": "a"}}}, "[" * 9999],
)
def test_damaged_files_are_named(tmp_path, content):
    workdir = make_run(tmp_path / "run")
    write(workdir, "results_60_x.json", content)
    write(workdir, "mt_bench_60.json", content)
    run = collect(workdir)
    assert len([p for p in run.problems if "results_60_x.json" in p]) == 1
    assert len([p for p in run.problems if "mt_bench_60.json" in p]) == 1
    Page(render(run))


def test_tasks_run_by_name_stand_beside_the_published_models(tmp_path):
    pytest.importorskip("lm_eval")
    workdir = make_run(tmp_path / "run")
    content = results(piqa=("acc_norm,none", 0.6, 0.1), arc_easy=("acc_norm,none", 0.5, 0.1))
    content["n-shot"] = {"piqa": 0, "arc_easy": 5}  # five examples: no column of any table
    write(workdir, "results_60_arc_easy_piqa.json", content)
    run = collect(workdir)
    ((strip, table),) = standing.published_parts([run])
    assert table.head == ("model", "B", "PIQA")
    assert table.rows[0][2] == "60.00"
    assert table.rows[1] == ("Danube", "1.8", "76.93")  # the best of that column
    assert [row.label for row in strip.rows] == ["PIQA"]
    assert "only the first documents" in render(run)
    # The preset itself goes first, with all of its columns.
    write(workdir, "results_30_danube.json", results(piqa=("acc_norm,none", 0.7, 0.1)))
    ((_, table),) = standing.published_parts([collect(workdir)])
    assert len(table.head) == 2 + 8
    assert table.rows[0][table.head.index("PIQA")] == "70.00"


def test_ours_stands_beside_the_published_models(tmp_path, monkeypatch):
    column = types.SimpleNamespace(task="arc", label="ARC", metric="acc,none", fewshot=25)
    rows = [
        types.SimpleNamespace(model="Danube", size=1.8, scores={"arc": 39.42}, average=39.42),
        types.SimpleNamespace(model="Better", size=None, scores={"arc": 52.9}, average=52.9),
    ]
    preset = types.SimpleNamespace(
        name="board", title="The board", columns=(column,), published=tuple(rows), average=True
    )

    def read_score(content, column):
        values = content["results"][column.task]
        return types.SimpleNamespace(value=values["acc,none"], stderr=values["acc_stderr,none"])

    fake = types.SimpleNamespace(PRESETS={"board": preset}, read_score=read_score)
    monkeypatch.setattr(standing, "presets", fake)
    workdir = make_run(tmp_path / "run")
    write(workdir, "results_60_board.json", results(arc=("acc,none", 0.4, 0.02)))
    run = collect(workdir)
    ((strip, table),) = standing.published_parts([run])
    assert table.head == ("model", "B", "ARC", "average")
    assert table.rows == (
        ("tiny, step 60", "", "40.00", "40.00"),
        ("Better", "", "52.90", "52.90"),
        ("Danube", "1.8", "39.42", "39.42"),
    )
    (row,) = strip.rows
    assert (row.label, row.value) == ("ARC, 25-shot", "40.0")
    assert [dot.at for dot in row.ours] == [40.0]
    assert row.errors == ((38.0, 42.0, 0),)
    assert [(dot.at, dot.text) for dot in row.others] == [
        (39.42, "Danube: 39.42"),
        (52.9, "Better: 52.90"),
    ]
    text = Page(render(run)).text
    assert "The board, average" in text
    assert "Leaderboard40.00" in text.replace("\n", "")
    write(workdir, "results_60_board.json", results(other=("acc,none", 0.4, 0.02)))
    ((_, table),) = standing.published_parts([collect(workdir)])
    assert table.rows[0][2:] == ("–", "–")  # noqa: RUF001


def test_the_published_leaderboard(tmp_path):
    presets = pytest.importorskip("danube_jax.evaluation.presets")
    columns = presets.PRESETS["leaderboard"].columns
    workdir = make_run(tmp_path / "run")
    scores = {column.task: (column.metric, 0.1 * i, 0.01) for i, column in enumerate(columns, 1)}
    write(workdir, "results_60_leaderboard.json", results(**scores))
    run = collect(workdir)
    ((strip, table),) = standing.published_parts([run])
    assert table.rows[0] == (
        "tiny, step 60",
        "",
        "10.00",
        "20.00",
        "30.00",
        "40.00",
        "50.00",
        "60.00",
        "35.00",
    )
    published = {row[0]: row[2:] for row in table.rows[1:]}
    # arXiv 2401.16818v2, table 6
    assert published["Danube2"] == ("43.34", "72.95", "40.20", "38.01", "68.03", "29.80", "48.72")
    assert len(strip.rows) == 6
    assert "48.72" in Page(render(run)).text


def test_mt_bench_is_shown_a_category_and_a_turn(tmp_path):
    workdir = make_run(tmp_path / "run")
    content = {
        "turn_1": 5.5,
        "turn_2": 4.0,
        "average": 4.75,
        "categories": {"math": {"turn_1": 1.0, "turn_2": 10.0}, "none": {"turn_1": None}},
        "ungraded": [{"question_id": 81}, {"question_id": 82}],
    }
    write(workdir, "mt_bench_60.json", content)
    run = collect(workdir)
    strip = standing.mt_bench_strip(run.mt_bench[-1])
    assert [dot.at for dot in strip.rows[0].ours] == [0.0, 100.0]
    text = Page(render(run)).text
    assert "turn 1 5.50, turn 2 4.00, average 4.75. 2 answers could not be graded." in text
    assert "4.75" in text

"""Presets, published tables, and what is made of lm-eval's results."""

import pytest

from danube_jax.errors import UserError
from danube_jax.evaluation import published
from danube_jax.evaluation.presets import PRESETS, Column, read_score
from danube_jax.evaluation.results import comparison, markdown, task_rows
from danube_jax.evaluation.sharing import choose_sizes, common_prefix, find_families, size_grid
from danube_jax.evaluation.tasks import select

RESULTS = {
    "results": {
        "mmlu": {"acc,none": 0.3, "acc_stderr,none": 0.01, "alias": "mmlu"},
        "mmlu_a": {"acc,none": 0.5, "acc_stderr,none": 0.03, "alias": " - a"},
        "mmlu_b": {"acc,none": 0.2, "acc_stderr,none": 0.04, "alias": " - b"},
        "gsm8k": {
            "exact_match,strict-match": 0.1,
            "exact_match_stderr,strict-match": 0.02,
            "exact_match,flexible-extract": 0.4,
            "exact_match_stderr,flexible-extract": "N/A",
        },
        "arc_challenge": {"acc,none": 0.1, "acc_norm,none": 0.4, "acc_norm_stderr,none": 0.01},
        "hellaswag": {"acc,none": 0.1, "acc_norm,none": 0.6, "acc_norm_stderr,none": 0.01},
        "truthfulqa_mc2": {"acc,none": 0.5, "acc_stderr,none": 0.01},
        "winogrande": {"acc,none": 0.6, "acc_stderr,none": 0.01},
    },
    "group_subtasks": {"mmlu": ["mmlu_a", "mmlu_b"]},
    "n-shot": {"gsm8k": 5, "mmlu_a": 5, "mmlu_b": 5},
    "n-samples": {
        "gsm8k": {"original": 9, "effective": 7},
        "mmlu_a": {"effective": 10},
        "mmlu_b": {"effective": 20},
    },
}


def test_published_averages_are_the_tables():
    averages = {row.model: round(row.average, 2) for row in published.LEADERBOARD}
    assert averages["Danube"] == 39.12
    assert averages["Danube2"] == 48.72
    assert averages["Gemma-2B"] == pytest.approx(46.51, abs=0.01)
    assert averages["Phi-1.5"] == 47.69
    assert averages["TinyLlama"] == pytest.approx(36.42, abs=0.011)
    assert averages["Danube-Chat"] == 43.96
    means = [
        sum(turn) / 7 for turn in zip(*published.MT_BENCH[-1].categories.values(), strict=True)
    ]
    assert [round(mean, 2) for mean in means] == [6.41, 4.63]


def test_scores_that_count():
    columns = {column.task: column for column in PRESETS["leaderboard"].columns}
    mmlu = read_score(RESULTS, columns["mmlu"])
    assert mmlu.value == pytest.approx(0.35)  # over subjects, as the leaderboard
    assert mmlu.stderr == pytest.approx(0.025)
    assert read_score(RESULTS, columns["gsm8k"]).value == 0.1
    assert read_score(RESULTS, columns["arc_challenge"]).value == 0.4
    assert read_score(RESULTS, Column("piqa", "PIQA", "acc,none", 0)) is None


def test_the_average_is_the_mean_of_six():
    head, rows = comparison(RESULTS, PRESETS["leaderboard"], "mine")
    ours = dict(zip(head, rows[0], strict=True))
    assert ours["average"] == "42.50 ± 0.63"
    assert ours["GSM8K"] == "10.00 ± 2.00"
    assert rows[1][0] == "StableLM-2-Zephyr"  # the best of the published comes first
    fewer = RESULTS | {"results": {"winogrande": RESULTS["results"]["winogrande"]}}
    head, rows = comparison(fewer, PRESETS["leaderboard"], "mine")
    assert dict(zip(head, rows[0], strict=True))["average"] == "-"


def test_rows_and_markdown():
    rows = {(row.task, row.metric): row for row in task_rows(RESULTS)}
    assert ("mmlu_a", "acc") not in rows  # its group has a score of its own
    group = rows["mmlu", "acc"]
    assert (group.fewshot, group.documents) == (5, 30)
    assert rows["gsm8k", "exact_match (flexible-extract)"].stderr is None
    text = markdown(RESULTS, PRESETS["leaderboard"], "mine", ["a note"])
    assert "| gsm8k | exact_match (strict-match) | 5 | 7 | 10.00 ± 2.00 |" in text
    assert "| **mine** |" in text
    assert text.endswith("- a note\n")


def test_selections():
    assert select(["leaderboard"]).tasks["arc_challenge"] == 25
    alone = select(["piqa", "arc_easy"])
    assert alone.tasks == {"piqa": None, "arc_easy": None}
    assert [column.task for column in alone.preset.columns] == ["arc_easy", "piqa"]
    assert select(["hellaswag"], 10).preset.name == "leaderboard"
    assert select(["hellaswag"], 3).preset is None
    for names, shots, message in (
        ([""], None, "names nothing"),
        (["a", "a"], None, "named twice"),
        (["danube", "a"], None, "stands alone"),
        (["danube"], 3, "numbers of its own"),
    ):
        with pytest.raises(UserError, match=message):
            select(names, shots)


def test_families_share_what_is_common():
    shots = tuple(range(100))
    inputs = [(*shots, i, 7, 7) for i in range(4)] + [(9, *shots, i) for i in (1, 2)] + [(5, 5)]
    families = find_families(inputs, [len(row) - 1 for row in inputs])
    found = {family.members: family.prefix for family in families}
    assert found == {(0, 1, 2, 3): 100, (4, 5): 101, (6,): 0}
    # A prediction that is needed early keeps the prefix short.
    families = find_families(inputs[:2], [40, 102])
    assert families[0].prefix == 40
    assert common_prefix((1, 2, 3), (1, 2, 4)) == 2
    assert common_prefix((), (1,)) == 0


def test_nested_prefixes_are_cut_where_most_is_saved():
    first, second = tuple(range(20)), tuple(range(20, 220))
    inputs = [(*first, *second, i) for i in range(5)] + [(*first, 400 + i) for i in range(2)]
    families = find_families(inputs, [len(row) - 1 for row in inputs])
    assert max(families, key=lambda family: family.prefix).members == (0, 1, 2, 3, 4)
    assert {family.prefix for family in families if len(family.members) == 5} == {220}


def test_sizes_trade_padding_for_programs():
    grid = size_grid(500)
    assert grid[:5] == (16, 32, 48, 64, 80)
    assert grid[-1] == 512
    lengths = [20] * 1_000 + [60] * 10 + [500]
    few = choose_sizes(lengths, grid, 10_000.0)
    many = choose_sizes(lengths, grid, 0.0)
    assert len(set(few.values())) == 2
    assert set(many.values()) == {32, 64, 512}
    assert all(few[length] >= length for length in lengths)

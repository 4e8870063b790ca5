"""Which tasks are run together, with how many examples, and which metric counts."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

from danube_jax.evaluation import published
from danube_jax.evaluation.published import PublishedRow


@dataclasses.dataclass(frozen=True)
class Column:
    """One task of a preset.

    Attributes:
      task: lm-eval's name.
      label: heads its column.
      metric: lm-eval's key, "metric,filter".
      fewshot: examples in the prompt.
      mean_of_parts: the score is the plain mean over the group's tasks (MMLU's 57 subjects), not
        lm-eval's mean over questions.
    """

    task: str
    label: str
    metric: str
    fewshot: int
    mean_of_parts: bool = False


@dataclasses.dataclass(frozen=True)
class Preset:
    """Tasks with a published table beside them; `average` says whether the table has a mean."""

    name: str
    title: str
    columns: tuple[Column, ...]
    published: tuple[PublishedRow, ...]
    average: bool


PRESETS: Mapping[str, Preset] = types.MappingProxyType(
    {
        "leaderboard": Preset(
            "leaderboard",
            "Open LLM Leaderboard v1",
            (
                Column("arc_challenge", "ARC-c", "acc_norm,none", 25),
                Column("hellaswag", "HellaSwag", "acc_norm,none", 10),
                Column("mmlu", "MMLU", "acc,none", 5, mean_of_parts=True),
                Column("truthfulqa_mc2", "TruthfulQA", "acc,none", 0),
                Column("winogrande", "WinoGrande", "acc,none", 5),
                Column("gsm8k", "GSM8K", "exact_match,strict-match", 5),
            ),
            published.LEADERBOARD,
            average=True,
        ),
        "danube": Preset(
            "danube",
            "Zero-shot (TriviaQA 5-shot)",
            (
                Column("arc_easy", "ARC-e", "acc_norm,none", 0),
                Column("arc_challenge", "ARC-c", "acc_norm,none", 0),
                Column("boolq", "BoolQ", "acc,none", 0),
                Column("hellaswag", "HellaSwag", "acc_norm,none", 0),
                Column("openbookqa", "OpenBookQA", "acc_norm,none", 0),
                Column("piqa", "PIQA", "acc_norm,none", 0),
                Column("triviaqa", "TriviaQA", "exact_match,remove_whitespace", 5),
                Column("winogrande", "WinoGrande", "acc,none", 0),
            ),
            published.ZERO_SHOT,
            average=False,
        ),
    }
)


@dataclasses.dataclass(frozen=True)
class Score:
    """A score and its standard error in the units of the metric; None where there is none."""

    value: float
    stderr: float | None


def read_score(results: Mapping[str, Any], column: Column) -> Score | None:
    """A column's score from lm-eval's results, or None where the task was not run.

    Args:
      results: what `lm_eval.simple_evaluate` returns.
      column: the task and its metric.
    """
    scores = results["results"]
    if column.task not in scores:
        return None
    metric, _, filter_name = column.metric.partition(",")
    error_key = f"{metric}_stderr,{filter_name}"
    parts = sorted(
        name
        for name in _leaves(results.get("group_subtasks", {}), column.task)
        if column.metric in scores.get(name, {})
    )
    if column.mean_of_parts and parts:
        values = [scores[name][column.metric] for name in parts]
        errors = [_number(scores[name].get(error_key)) for name in parts]
        stderr = None
        if all(error is not None for error in errors):
            stderr = sum(error**2 for error in errors) ** 0.5 / len(parts)
        return Score(sum(values) / len(values), stderr)
    value = _number(scores[column.task].get(column.metric))
    return None if value is None else Score(value, _number(scores[column.task].get(error_key)))


def _leaves(groups: Mapping[str, list[str]], name: str) -> set[str]:
    children = groups.get(name) or []
    return {leaf for child in children for leaf in _leaves(groups, child)} or {name}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None

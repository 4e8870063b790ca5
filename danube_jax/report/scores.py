"""Scores of a run: what `evaluate` and MT-Bench left in WORKDIR/evaluation.

`results_<step>_<preset>.json` is lm-evaluation-harness's own format; `mt_bench_<step>.json` holds
scores a turn and a category.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# In the order in which one of them stands for its task.
MAIN_METRICS = ("acc_norm", "acc", "exact_match", "f1", "bits_per_byte", "word_perplexity")


@dataclasses.dataclass(frozen=True)
class Score:
    """One task's main metric, as the harness gives it (accuracies between 0 and 1).

    Attributes:
      metric: without lm-eval's filter, which is in `filter` ('none' where there is none).
      stderr, shots, documents: None where the file does not say.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    shots: int | None
    documents: int | None
    higher_is_better: bool

    @property
    def is_share(self) -> bool:
        """Whether the value is a share of right answers, written as a percentage."""
        return self.metric.startswith(("acc", "exact_match", "em", "f1", "mc"))


@dataclasses.dataclass(frozen=True)
class Results:
    """One call of `evaluate`: `step` -1 where the file's name does not say."""

    file: str
    step: int
    preset: str
    scores: tuple[Score, ...]

    @property
    def by_task(self) -> dict[str, Score]:
        """The scores by the name of their task."""
        return {score.task: score for score in self.scores}


@dataclasses.dataclass(frozen=True)
class MTBench:
    """Judged scores from 1 to 10.

    Attributes:
      overall: label → mean score ("turn 1", "turn 2", "average").
      categories: category → label → mean score.
      ungraded: answers whose judgement could not be read.
    """

    file: str
    step: int
    overall: dict[str, float]
    categories: dict[str, dict[str, float]]
    ungraded: int


def read_results(folder: Path, problems: list[str]) -> list[Results]:
    """Every readable results file, by step; others are named in `problems`."""
    found = []
    for path, content in _json_files(folder, "results*.json", problems):
        results = content.get("results")
        if not isinstance(results, Mapping):
            problems.append(f"evaluation/{path.name} holds no results")
            continue
        name = re.fullmatch(r"results_(\d+)_(.+)\.json", path.name)
        step, preset = (int(name[1]), name[2]) if name else (-1, path.stem.removeprefix("results_"))
        scores = tuple(_scores(content))
        if scores:
            found.append(Results(path.name, step, preset, scores))
        else:
            problems.append(f"evaluation/{path.name} holds no score")
    return sorted(found, key=lambda results: (results.step, results.preset))


def _json_files(
    folder: Path, pattern: str, problems: list[str]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(folder.glob(pattern)) if folder.is_dir() else ():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("not an object")
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or error
            problems.append(f"evaluation/{path.name} cannot be read ({reason})")
            continue
        yield path, content


def _scores(content: Mapping[str, Any]) -> Iterator[Score]:
    """The main score of each task that is no part of a group with a score of its own."""
    results = content["results"]
    groups = _mapping(content.get("group_subtasks"))
    inside = {
        task
        for group, tasks in groups.items()
        if isinstance(tasks, list) and _main_metric(_mapping(results.get(group)))
        for task in tasks
        if isinstance(task, str) and task != group
    }
    for task, values in results.items():
        if task in inside or not isinstance(values, Mapping):
            continue
        key = _main_metric(values)
        if key is None:
            continue
        metric, _, filter_name = key.partition(",")
        stderr = values.get(f"{metric}_stderr,{filter_name}")
        shots = _mapping(content.get("n-shot")).get(task)
        documents = _mapping(_mapping(content.get("n-samples")).get(task)).get("effective")
        higher = _mapping(_mapping(content.get("higher_is_better")).get(task)).get(metric)
        yield Score(
            task=task,
            metric=metric,
            filter=filter_name,
            value=float(values[key]),
            stderr=float(stderr) if _is_number(stderr) else None,
            shots=shots if isinstance(shots, int) else None,
            documents=documents if isinstance(documents, int) else None,
            higher_is_better=higher is not False and "perplexity" not in metric,
        )


def _main_metric(values: Mapping[str, Any]) -> str | None:
    """The key "metric,filter" of the score that stands for a task; the first filter counts."""
    keys = [key for key in values if "," in key and "_stderr" not in key]
    keys = [key for key in keys if _is_number(values[key])]
    for metric in MAIN_METRICS:
        for key in keys:
            if key.partition(",")[0] == metric:
                return key
    return keys[0] if keys else None


def read_mt_bench(folder: Path, problems: list[str]) -> list[MTBench]:
    """Every readable MT-Bench file, by step; others are named in `problems`."""
    found = []
    for path, content in _json_files(folder, "mt_bench*.json", problems):
        number = re.fullmatch(r"mt_bench_(\d+)\.json", path.name)
        overall = {
            label: float(content[key])
            for key, label in (("turn_1", "turn 1"), ("turn_2", "turn 2"), ("average", "average"))
            if _is_number(content.get(key))
        }
        categories = {
            str(name): {
                label: float(scores[key])
                for key, label in (("turn_1", "turn 1"), ("turn_2", "turn 2"))
                if _is_number(scores.get(key))
            }
            for name, scores in _mapping(content.get("categories")).items()
            if isinstance(scores, Mapping)
        }
        if not overall and not any(categories.values()):
            problems.append(f"evaluation/{path.name} holds no score")
            continue
        ungraded = content.get("ungraded", 0)
        ungraded = len(ungraded) if isinstance(ungraded, list) else ungraded
        step = int(number[1]) if number else -1
        count = ungraded if isinstance(ungraded, int) else 0
        found.append(MTBench(path.name, step, overall, categories, count))
    return sorted(found, key=lambda item: item.step)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

"""Scores of a run: what `evaluate` and MT-Bench left in WORKDIR/evaluation.

`results_<step>_<preset>.json` is lm-evaluation-harness's own format; `mt_bench_<step>.json` holds
scores a turn and a category.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from danube_jax.report.metric_rows import parse_json

# In the order in which one of them stands for its task.
MAIN_METRICS = ("acc_norm", "acc", "exact_match", "f1", "bits_per_byte", "word_perplexity")


@dataclasses.dataclass(frozen=True)
class Score:
    """One task's main metric, as the harness gives it (accuracies between 0 and 1).

    Attributes:
      metric: without lm-eval's filter, which is in `filter` ('none' where there is none).
      stderr, shots: None where the file does not say; documents: (used, there are) likewise.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    shots: int | None
    documents: tuple[int, int] | None

    @property
    def is_share(self) -> bool:
        """Whether the value is a share of right answers, written as a percentage."""
        return self.metric.startswith(("acc", "exact_match", "em", "f1", "mc"))


@dataclasses.dataclass(frozen=True)
class Results:
    """One call of `evaluate`: `step` -1 where the file's name does not say; `content` its JSON."""

    file: str
    step: int
    preset: str
    scores: tuple[Score, ...]
    content: Mapping[str, Any] = dataclasses.field(repr=False)

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
        if not isinstance(content.get("results"), Mapping):
            problems.append(f"evaluation/{path.name} holds no results")
            continue
        name = re.fullmatch(r"results_(\d{1,18})_(.+)\.json", path.name)
        step, preset = (int(name[1]), name[2]) if name else (-1, path.stem.removeprefix("results_"))
        scores = tuple(_scores(content))
        if scores:
            found.append(Results(path.name, step, preset, scores, content))
        else:
            problems.append(f"evaluation/{path.name} holds no score")
    return sorted(found, key=lambda results: (results.step, results.preset))


def _json_files(
    folder: Path, pattern: str, problems: list[str]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(folder.glob(pattern)) if folder.is_dir() else ():
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("not an object")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            problems.append(f"evaluation/{path.name} cannot be read ({reason})")
            continue
        yield path, content


def _scores(content: Mapping[str, Any]) -> Iterator[Score]:
    """The main score of each task that is no part of a group with a score of its own."""
    results = content["results"]
    inside = {
        task
        for group, tasks in _mapping(content.get("group_subtasks")).items()
        if isinstance(tasks, list) and _main_metric(_mapping(results.get(group)))
        for task in tasks
        if isinstance(task, str) and task != group
    }
    for task, values in results.items():
        key = _main_metric(_mapping(values))
        if task in inside or key is None:
            continue
        metric, _, filter_name = key.partition(",")
        stderr = values.get(f"{metric}_stderr,{filter_name}")
        shots = _mapping(content.get("n-shot")).get(task)
        yield Score(
            task=task,
            metric=metric,
            filter=filter_name,
            value=float(values[key]),
            stderr=float(stderr) if is_number(stderr) else None,
            shots=shots if isinstance(shots, int) else None,
            documents=_documents(content, task),
        )


def _documents(content: Mapping[str, Any], task: str) -> tuple[int, int] | None:
    """Documents used, and documents there are, of a task or of a group's tasks together."""
    counts = _mapping(content.get("n-samples"))
    parts = [task] if task in counts else _mapping(content.get("group_subtasks")).get(task)
    names = [part for part in parts if isinstance(part, str)] if isinstance(parts, list) else []
    found = [_mapping(counts.get(name)) for name in names]
    pairs = [(count.get("effective"), count.get("original")) for count in found]
    if not pairs or not all(isinstance(n, int) for pair in pairs for n in pair):
        return None
    return sum(used for used, _ in pairs), sum(there for _, there in pairs)


def _main_metric(values: Mapping[str, Any]) -> str | None:
    """The key "metric,filter" of the score that stands for a task; the first filter counts."""
    keys = [key for key in values if "," in key and "_stderr" not in key]
    keys = [key for key in keys if is_number(values[key])]
    for metric in MAIN_METRICS:
        for key in keys:
            if key.partition(",")[0] == metric:
                return key
    return keys[0] if keys else None


def read_mt_bench(folder: Path, problems: list[str]) -> list[MTBench]:
    """Every readable MT-Bench file, by step; others are named in `problems`."""
    found = []
    for path, content in _json_files(folder, "mt_bench*.json", problems):
        number = re.fullmatch(r"mt_bench_(\d{1,18})\.json", path.name)
        overall = {
            label: float(content[key])
            for key, label in (("turn_1", "turn 1"), ("turn_2", "turn 2"), ("average", "average"))
            if is_number(content.get(key))
        }
        categories = {
            str(name): {
                label: float(scores[key])
                for key, label in (("turn_1", "turn 1"), ("turn_2", "turn 2"))
                if is_number(scores.get(key))
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


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

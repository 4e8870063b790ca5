"""Results as JSON in lm-eval's format, as tables in the terminal, and as Markdown."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

import danube_jax
from danube_jax import files
from danube_jax.evaluation.presets import Preset, Score, read_score

OURS = "this model"


@dataclasses.dataclass(frozen=True)
class TaskRow:
    """One metric of one task or group; value and error in the metric's own units."""

    task: str
    metric: str
    fewshot: int | None
    documents: int | None
    value: float
    stderr: float | None
    is_share: bool

    def text(self) -> str:
        """The value in percent where it is a share, with its standard error."""
        return format_score(Score(self.value, self.stderr), self.is_share)


def format_score(score: Score | None, is_share: bool = True) -> str:
    """`43.34 ± 1.41` in percent, or the number itself; `-` where there is none."""
    if score is None:
        return "-"
    scale = 100 if is_share else 1
    text = f"{scale * score.value:.2f}"
    return text if score.stderr is None else f"{text} ± {scale * score.stderr:.2f}"


def task_rows(results: Mapping[str, Any]) -> list[TaskRow]:
    """A row a metric of every task; of groups with a score of their own, the group only."""
    groups = results.get("group_subtasks", {})
    inside = {
        name
        for group, names in groups.items()
        if any("," in key for key in results["results"].get(group, {}))
        for name in names
    }
    rows = []
    for task, values in results["results"].items():
        if task in inside:
            continue
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            label = metric if filter_name == "none" else f"{metric} ({filter_name})"
            rows.append(
                TaskRow(
                    task,
                    label,
                    _shots(results, task),
                    _documents(results, task),
                    float(value),
                    float(stderr) if isinstance(stderr, int | float) else None,
                    metric.startswith(("acc", "exact_match", "f1", "em")),
                )
            )
    return rows


def _shots(results: Mapping[str, Any], task: str) -> int | None:
    shots = results.get("n-shot", {})
    if task not in shots:
        parts = results.get("group_subtasks", {}).get(task, [])
        numbers = {shots[part] for part in parts if part in shots}
        return numbers.pop() if len(numbers) == 1 else None
    return shots[task]


def _documents(results: Mapping[str, Any], task: str) -> int | None:
    samples = results.get("n-samples", {})
    if task in samples:
        return samples[task]["effective"]
    parts = results.get("group_subtasks", {}).get(task, [])
    counts = [_documents(results, part) for part in parts]
    return None if None in counts or not counts else sum(counts)


def task_table(results: Mapping[str, Any]) -> Table:
    """The terminal's table of all metrics."""
    table = Table("task", "metric", "shots", "documents", "score")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in task_rows(results):
        table.add_row(*_cells(row))
    return table


def _cells(row: TaskRow) -> list[str]:
    shots = "" if row.fewshot is None else str(row.fewshot)
    documents = "" if row.documents is None else f"{row.documents:,}"
    return [row.task, row.metric, shots, documents, row.text()]


def comparison(
    results: Mapping[str, Any], preset: Preset, name: str = OURS
) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table beside the published models: ours first, then the best ones.

    The average is the arithmetic mean of the scores, as the leaderboard computes it, and is given
    where all of them are there.
    """
    columns = preset.columns
    head = ["model", "B", *(column.label for column in columns)]
    scores = [read_score(results, column) for column in columns]
    ours = [name, "", *map(format_score, scores)]
    if preset.average:
        head.append("average")
        ours.append(format_score(_mean(scores)))
    rows = [ours]
    tasks = [column.task for column in columns]
    for row in sorted(preset.published, key=lambda r: -sum(r.scores[task] for task in tasks)):
        size = "" if row.size is None else f"{row.size:g}"
        cells = [row.model, size, *(f"{row.scores[task]:.2f}" for task in tasks)]
        rows.append(cells + ([f"{row.average:.2f}"] if preset.average else []))
    return head, rows


def _mean(scores: Sequence[Score | None]) -> Score | None:
    if any(score is None for score in scores):
        return None
    errors = [score.stderr for score in scores]
    stderr = None
    if None not in errors:
        stderr = sum(error**2 for error in errors) ** 0.5 / len(errors)
    return Score(sum(score.value for score in scores) / len(scores), stderr)


def comparison_table(results: Mapping[str, Any], preset: Preset, name: str = OURS) -> Table:
    """The terminal's table beside the published models."""
    head, rows = comparison(results, preset, name)
    table = Table(*head, title=f"{preset.title}, percent; published: arXiv 2401.16818")
    for column in table.columns[1:]:
        column.justify = "right"
    for i, row in enumerate(rows):
        table.add_row(*row, style="bold" if i == 0 else None, end_section=i == 0)
    return table


def markdown(
    results: Mapping[str, Any], preset: Preset | None, name: str, notes: Sequence[str]
) -> str:
    """A section for a model card."""
    rows = [_cells(row) for row in task_rows(results)]
    parts = ["## Evaluation", "", f"Measured with danube_jax {danube_jax.__version__} and "]
    parts[-1] += f"lm-evaluation-harness {results.get('lm_eval_version', '')}; ± is the standard "
    parts[-1] += "error."
    parts += ["", *_markdown_table(["task", "metric", "shots", "documents", "score"], rows)]
    if preset is not None:
        head, rows = comparison(results, preset, f"**{name}**")
        parts += ["", f"{preset.title} (published scores: arXiv 2401.16818):", ""]
        parts += _markdown_table(head, rows)
    if notes:
        parts += ["", *(f"- {note}" for note in notes)]
    return "\n".join(parts) + "\n"


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def write_results(
    folder: Path, stem: str, results: Mapping[str, Any], text: str, *, samples: bool
) -> list[Path]:
    """Writes `STEM.json` (lm-eval's format), `STEM.md`, and a file of samples a task if wanted."""
    from lm_eval.utils import handle_non_serializable

    def dump(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, indent=indent, default=handle_non_serializable, ensure_ascii=False)

    written = [folder / f"{stem}.json", folder / f"{stem}.md"]
    kept = {key: value for key, value in results.items() if key != "samples"}
    files.write_bytes(written[0], (dump(kept, 2) + "\n").encode())
    files.write_bytes(written[1], text.encode())
    for task, rows in (results.get("samples") or {}).items() if samples else ():
        path = folder / f"samples_{stem.removeprefix('results_')}_{task}.jsonl"
        files.write_bytes(path, "".join(dump(row) + "\n" for row in rows).encode())
        written.append(path)
    return written

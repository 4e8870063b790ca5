"""Where a model stands: its scores beside the published ones, as tables and as strips."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from danube_jax.report import numbers
from danube_jax.report.collect import RunFolder
from danube_jax.report.scores import MTBench, Results, Score

try:
    from danube_jax.evaluation import presets, published
except ImportError:  # scores are then shown alone
    presets = published = None

NAMED = {"Danube": 1, "Danube2": 3, "Danube-Chat": 4}  # published models with a colour of their own


@dataclasses.dataclass(frozen=True)
class Dot:
    """A score on a strip: percent of its width, and what it is in words.

    `color` is None for a model that is one of many.
    """

    at: float
    text: str
    color: int | None = None


@dataclasses.dataclass(frozen=True)
class StripRow:
    """One task: `ours` a dot a run (or a turn), `low` and `high` the ends of its error bar."""

    label: str
    value: str
    ours: tuple[Dot, ...]
    errors: tuple[tuple[float, float, int], ...]  # from, to, colour
    others: tuple[Dot, ...]


@dataclasses.dataclass(frozen=True)
class Strip:
    """Rows on one scale; `legend` is (colour or None, text)."""

    title: str
    note: str
    rows: tuple[StripRow, ...]
    ticks: tuple[tuple[float, str], ...]
    legend: tuple[tuple[int | None, str], ...]


@dataclasses.dataclass(frozen=True)
class PublishedTable:
    """Models against tasks; the first `ours` rows are measured, the others published."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    ours: int


def latest(results: Sequence[Results]) -> list[Results]:
    """The newest results of each preset, in the order of their presets' names."""
    newest = {item.preset: item for item in results}
    return [newest[preset] for preset in sorted(newest)]


def preset_names() -> set[str]:
    """Presets that have a published table."""
    return {preset.name for preset in presets.PRESETS.values()} if presets else set()


def task_rows(run: RunFolder) -> list[dict[str, str]]:
    """Every task's score of the newest results of each preset."""
    rows = []
    for results in latest(run.results):
        for score in results.scores:
            rows.append(
                {
                    "task": score.task,
                    "metric": score.metric
                    + ("" if score.filter == "none" else f" ({score.filter})"),
                    "shots": numbers.NONE if score.shots is None else str(score.shots),
                    "documents": _documents(score),
                    "score": written(score),
                    "step": f"{results.step:,}" if results.step >= 0 else "",
                    "preset": results.preset,
                }
            )
    return rows


def written(score: Score | None) -> str:
    """A score in percent where it is a share, with its standard error."""
    if score is None:
        return numbers.NONE
    if not score.is_share:
        return numbers.figure(score.value)
    error = "" if score.stderr is None else f" ± {100 * score.stderr:.2f}"
    return f"{100 * score.value:.2f}{error}"


def _documents(score: Score) -> str:
    if score.documents is None:
        return numbers.NONE
    used, there = score.documents
    return f"{used:,}" if used == there else f"{used:,} of {there:,}"


def published_parts(runs: Sequence[RunFolder]) -> list[tuple[Strip, PublishedTable]]:
    """For each preset with a published table that some run has results of: strip and table.

    Tasks that were run by name, with the preset's number of examples, count where the preset
    itself was not run.
    """
    parts = []
    for preset in presets.PRESETS.values() if presets else ():
        measured, wanted = [], set()
        for color, run in enumerate(runs):
            results, tasks = _comparable(run, preset)
            if results is not None:
                scores = [
                    _read(results, column) if column.task in tasks else None
                    for column in preset.columns
                ]
                measured.append((_name(run, results, len(runs) > 1), color, scores))
                wanted |= tasks
        if measured:
            kept = [i for i, column in enumerate(preset.columns) if column.task in wanted]
            if len(kept) < len(preset.columns):
                columns = tuple(preset.columns[i] for i in kept)
                preset = dataclasses.replace(preset, columns=columns, average=False)
                measured = [(*head, [scores[i] for i in kept]) for *head, scores in measured]
            named = NAMED if len(runs) == 1 else {}  # colours are the runs' own otherwise
            parts.append((_strip(preset, measured, named), _table(preset, measured)))
    return parts


def is_partial(run: RunFolder) -> bool:
    """Whether newest results are of a part of some task's documents."""
    counts = [score.documents for item in latest(run.results) for score in item.scores]
    return any(count is not None and count[0] < count[1] for count in counts)


def _comparable(run: RunFolder, preset: Any) -> tuple[Results | None, set[str]]:
    """The newest results that stand beside a preset's table, and which of its tasks they hold."""
    whole = [results for results in run.results if results.preset == preset.name]
    if whole:
        return whole[-1], {column.task for column in preset.columns}
    for results in reversed(run.results):
        there = results.by_task
        tasks = {
            column.task
            for column in preset.columns
            if column.task in there and there[column.task].shots == column.fewshot
        }
        if tasks and results.preset not in preset_names():
            return results, tasks
    return None, set()


def _name(run: RunFolder, results: Results, several: bool) -> str:
    step = f", step {results.step:,}" if results.step >= 0 else ""
    return f"{run.path.resolve().name if several else run.name}{step}"


def _read(results: Results, column: Any) -> tuple[float, float | None] | None:
    """A column's score and standard error in percent; None where the file has none."""
    try:
        score = presets.read_score(results.content, column)
    except (KeyError, TypeError, AttributeError, ValueError):  # a file of another shape
        return None
    if score is None:
        return None
    return 100 * score.value, None if score.stderr is None else 100 * score.stderr


def _table(preset: Any, measured: Sequence[tuple]) -> PublishedTable:
    columns = preset.columns
    head = ["model", "B", *(column.label for column in columns)]
    head += ["average"] if preset.average else []
    rows = []
    for name, _, scores in measured:
        cells = [name, ""]
        cells += [f"{score[0]:.2f}" if score else numbers.NONE for score in scores]
        if preset.average:
            whole = all(scores)
            mean = sum(score[0] for score in scores) / len(scores) if whole else None
            cells.append(f"{mean:.2f}" if whole else numbers.NONE)
        rows.append(tuple(cells))
    tasks = [column.task for column in columns]
    for row in sorted(preset.published, key=lambda row: -sum(row.scores[t] for t in tasks)):
        size = "" if row.size is None else f"{row.size:g}"
        cells = [row.model, size, *(f"{row.scores[column.task]:.2f}" for column in columns)]
        rows.append(tuple(cells + ([f"{row.average:.2f}"] if preset.average else [])))
    return PublishedTable(preset.title, tuple(head), tuple(rows), len(measured))


def _strip(preset: Any, measured: Sequence[tuple], named: dict[str, int]) -> Strip:
    rows = []
    for index, column in enumerate(preset.columns):
        ours, errors, texts = [], [], []
        for name, color, scores in measured:
            if scores[index] is None:
                continue
            value, error = scores[index]
            ours.append(Dot(value, f"{name}: {value:.2f}", color))
            texts.append(f"{value:.1f}")
            if error is not None:
                errors.append((max(0, value - error), min(100, value + error), color))
        others = tuple(
            Dot(
                row.scores[column.task],
                f"{row.model}: {row.scores[column.task]:.2f}",
                named.get(row.model),
            )
            for row in preset.published
        )
        label = f"{column.label}, {column.fewshot}-shot" if column.fewshot else column.label
        rows.append(
            StripRow(label, " / ".join(texts) or numbers.NONE, tuple(ours), tuple(errors), others)
        )
    there = {row.model for row in preset.published}
    return Strip(
        title=preset.title,
        note="Percent right. A bar is a standard error either way; published models are ticks.",
        rows=tuple(rows),
        ticks=tuple((at, f"{at}") for at in (0, 25, 50, 75, 100)),
        legend=(
            *((color, name) for name, color, _ in measured),
            *((color, name) for name, color in named.items() if name in there),
            (None, "other published models" if named else "published models"),
        ),
    )


def mt_bench_strip(item: MTBench) -> Strip:
    """Scores a category and a turn, beside the published chat models where they are known."""
    rows = []
    for name, turns in item.categories.items():
        ours = tuple(
            Dot(_place(value), f"{label}: {value:.2f}", index)
            for index, (label, value) in enumerate(turns.items())
        )
        others = tuple(
            Dot(_place(value), f"{row.model}, turn {turn}: {value:.2f}")
            for row in (published.MT_BENCH if published else ())
            for turn, value in enumerate(row.categories.get(name, ()), 1)
        )
        text = " / ".join(f"{value:.1f}" for value in turns.values())
        rows.append(StripRow(name, text, ours, (), others))
    ungraded = f" {item.ungraded} answers could not be graded." if item.ungraded else ""
    overall = ", ".join(f"{label} {value:.2f}" for label, value in item.overall.items())
    return Strip(
        title=f"MT-Bench{f', step {item.step:,}' if item.step >= 0 else ''}",
        note=f"Judged from 1 to 10: {overall}.{ungraded}",
        rows=tuple(rows),
        ticks=tuple((_place(score), str(score)) for score in (1, 4, 7, 10)),
        legend=((0, "turn 1"), (1, "turn 2"), (None, "published chat models, both turns"))
        if published
        else ((0, "turn 1"), (1, "turn 2")),
    )


def _place(score: float) -> float:
    """A score from 1 to 10 as percent of the strip."""
    return min(100.0, max(0.0, (score - 1) / 9 * 100))

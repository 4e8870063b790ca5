"""MT-Bench from a loaded model to the files that it leaves."""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

import danube_jax
from danube_jax import files
from danube_jax.console import info, warn
from danube_jax.data.tokenizer import Tokenizer
from danube_jax.errors import UserError
from danube_jax.evaluation.judge import Judge
from danube_jax.evaluation.mt_bench import (
    Grade,
    Journal,
    MTBench,
    answer_questions,
    grade_answers,
    summarize,
)
from danube_jax.evaluation.published import MT_BENCH, MT_BENCH_OVERALL
from danube_jax.evaluation.radar import radar_svg
from danube_jax.files import sha256_json
from danube_jax.inference.generate import Generator
from danube_jax.inference.sampling import SamplingConfig


@dataclasses.dataclass(frozen=True)
class ChatModel:
    """What answers: a generator with its tokenizer (and chat template), and how it draws.

    Attributes:
      name: shown in tables.
      fingerprint: changes with the weights.
    """

    name: str
    fingerprint: str
    generator: Generator
    tokenizer: Tokenizer
    context: int
    sampling: SamplingConfig
    batch: int


def run_mt_bench(
    bench: MTBench,
    model: ChatModel,
    judge: Judge,
    folder: Path,
    step: int | None,
    temperature: float | None = None,
) -> dict[str, Any]:
    """Answers, grades, and writes `mt_bench_STEP.json`, `.md` and `.svg` into `folder`.

    Answers and judgements are kept as they come; a run that was stopped goes on.

    Raises:
      UserError: the judge gave no score to anything.
    """
    stem = "mt_bench" if step is None else f"mt_bench_{step}"
    asked = [dataclasses.astuple(question) for question in bench.questions]
    key = {
        "model": model.fingerprint,
        "questions": sha256_json(asked),
        "template": model.tokenizer.chat_template,
        "sampling": dataclasses.asdict(model.sampling),
        "temperature": temperature,
    }
    answers = _answers(bench, model, folder / f"{stem}_answers.jsonl", key, temperature)
    config = judge.config
    key |= {"judge": config.model, "prompts": repr(sorted(bench.prompts.items()))}
    grades = _grades(bench, answers, judge, folder / f"{stem}_judgments.jsonl", key)
    summary = summarize(grades)
    if not summary["graded"]:
        reason = summary["ungraded"][0]["reason"] if summary["ungraded"] else "no questions"
        raise UserError(
            f"no answer could be graded: {reason}; check --judge_url and --judge_model, then run "
            "the same command again (answers are kept)"
        )
    summary |= {
        "model": model.name,
        "step": step,
        "judge": {"url": config.url, "model": config.model},
        "danube_jax": danube_jax.__version__,
        "questions": len(bench.questions),
        "temperature": "by category" if temperature is None else temperature,
        "repetition_penalty": model.sampling.repetition_penalty,
    }
    _write(folder, stem, summary, model.name)
    return summary


def _answers(
    bench: MTBench, model: ChatModel, path: Path, key: Mapping[str, Any], temperature: float | None
) -> dict[int, tuple[str, ...]]:
    journal = Journal(path, key)
    known = {row["question_id"]: tuple(row["choices"][0]["turns"]) for row in journal.rows}
    if known:
        info(f"{len(known)} of {len(bench.questions)} questions were answered before")

    def keep(question: Any, turns: tuple[str, ...]) -> None:
        known[question.id] = turns
        row = {"question_id": question.id, "model_id": model.name}
        journal.add(row | {"choices": [{"index": 0, "turns": list(turns)}]})

    tokens, seconds = 0, 0.0

    def generate(prompts: list[list[int]], sampling: SamplingConfig) -> list[str]:
        nonlocal tokens, seconds
        start = time.perf_counter()
        completions = model.generator.generate(prompts, sampling)
        seconds += time.perf_counter() - start
        tokens += sum(len(completion.tokens) for (completion,) in completions)
        return [completion.text for (completion,) in completions]

    answer_questions(
        bench.questions,
        generate,
        model.tokenizer,
        context=model.context,
        sampling=model.sampling,
        batch=model.batch,
        on_answers=keep,
        temperature=temperature,
        known=frozenset(known),
    )
    if seconds:
        info(f"{tokens:,} tokens answered in {seconds:.1f} s: {tokens / seconds:,.1f} tokens/s")
    return known


def _grades(
    bench: MTBench,
    answers: Mapping[int, tuple[str, ...]],
    judge: Judge,
    path: Path,
    key: Mapping[str, Any],
) -> list[Grade]:
    journal = Journal(path, key | {"answers": sorted(answers.items())})
    names = [field.name for field in dataclasses.fields(Grade)]
    grades = [Grade(**{name: row[name] for name in names}) for row in journal.rows]

    def keep(grade: Grade) -> None:
        grades.append(grade)
        if grade.score is not None:  # the others are asked for again by the next run
            journal.add(dataclasses.asdict(grade))

    grade_answers(bench, answers, judge, [(g.question, g.turn) for g in grades], keep)
    for grade in grades:
        if grade.score is None:
            warn(f"question {grade.question}, turn {grade.turn} has no score: {grade.text}")
    return grades


def _write(folder: Path, stem: str, summary: Mapping[str, Any], name: str) -> None:
    files.write_bytes(
        folder / f"{stem}.json", (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode()
    )
    files.write_bytes(folder / f"{stem}.svg", radar(summary, name).encode())
    files.write_bytes(folder / f"{stem}.md", markdown(summary, name, f"{stem}.svg").encode())
    for suffix in (".json", ".md", ".svg"):
        info(f"wrote {folder / (stem + suffix)}")


def radar(summary: Mapping[str, Any], name: str) -> str:
    """Categories' averages, ours beside the published ones (which have no coding)."""
    scores = {category: values["average"] for category, values in summary["categories"].items()}
    others = [
        (row.model, {category: sum(pair) / 2 for category, pair in row.categories.items()})
        for row in reversed(MT_BENCH)
    ]
    return radar_svg([(name, scores), *others], list(scores), title=f"MT-Bench of {name}")


def rows(summary: Mapping[str, Any], name: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: turn 1 / turn 2 a category, ours first."""
    categories = list(summary["categories"])
    head = ["model", *categories, "turn 1 / 2", "average", "without coding"]

    def pair(values: Mapping[str, Any] | None) -> str:
        if values is None:
            return "-"
        return " / ".join(_text(values[key]) for key in ("turn_1", "turn_2"))

    ours = [name, *(pair(summary["categories"][category]) for category in categories)]
    ours += [pair(summary), _text(summary["average"]), _text(summary["average_without_coding"])]
    out = [ours]
    for model, (first, second, average) in MT_BENCH_OVERALL.items():
        cells = [model, *("-" for _ in categories), f"{first:.2f} / {second:.2f}"]
        out.append([*cells, f"{average:.2f}", "-"])
    for row in reversed(MT_BENCH):
        means = [sum(turn) / len(turn) for turn in zip(*row.categories.values(), strict=True)]
        scores = {
            c: dict(zip(("turn_1", "turn_2"), p, strict=True)) for c, p in row.categories.items()
        }
        cells = [row.model, *(pair(scores.get(category)) for category in categories)]
        out.append([*cells, f"{means[0]:.2f} / {means[1]:.2f}", "-", f"{sum(means) / 2:.2f}"])
    return head, out


def _text(score: float | None) -> str:
    return "-" if score is None else f"{score:.2f}"


def table(summary: Mapping[str, Any], name: str) -> Table:
    """The terminal's table beside the published models."""
    head, body = rows(summary, name)
    out = Table(
        *head,
        title="MT-Bench, 1 to 10; published: arXiv 2401.16818, table 3 (without coding), section 7",
    )
    for i, row in enumerate(body):
        out.add_row(*row, style="bold" if i == 0 else None, end_section=i == 0)
    return out


def markdown(summary: Mapping[str, Any], name: str, picture: str) -> str:
    """A section for a model card."""
    head, body = rows(summary, f"**{name}**")
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]
    note = f"{summary['graded']} turns graded by {summary['judge']['model']}"
    if summary["ungraded"]:
        note += f"; {len(summary['ungraded'])} could not be graded and are left out"
    parts = [
        "## MT-Bench",
        "",
        f"{note}. Published scores: arXiv 2401.16818, table 3 and section 7.",
        "",
    ]
    return "\n".join([*parts, *lines, "", f"![scores a category]({picture})"]) + "\n"

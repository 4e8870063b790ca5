"""What a run shows in the terminal: its table at the start, a progress bar, figures, samples."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import progress
from rich.markup import escape
from rich.table import Table

from danube_jax.config import RunConfig
from danube_jax.console import console, info
from danube_jax.data.phases import Phase, PhaseSchedule
from danube_jax.models.decoder import param_count


def announce(run: RunConfig, workdir: Path, schedule: PhaseSchedule, notes: Sequence[str]) -> None:
    """Says what is about to be trained, and where it goes."""
    table = Table(title=f"{run.name}: {param_count(run.model):,} parameters", title_justify="left")
    for column in ("phase", "steps", "tokens", "context", "mixture"):
        table.add_column(column, justify="left" if column in ("phase", "mixture") else "right")
    for phase in schedule.phases:
        total = sum(weight for _, weight in phase.mixture)
        mixture = ", ".join(f"{name} {weight / total:.1%}" for name, weight in phase.mixture)
        table.add_row(
            phase.name,
            f"{phase.first_step:,}-{phase.first_step + phase.steps:,}",
            human_count(phase.tokens),
            f"{phase.context:,}",
            mixture,
        )
    console.print(table)
    for note in notes:
        info(note)
    info(f"everything goes to {workdir}/ (tensorboard --logdir {workdir}/tensorboard)")


class TrainingDisplay:
    """A progress bar on a terminal; one line a logged step elsewhere."""

    def __init__(self, schedule: PhaseSchedule, last_step: int):
        self._schedule, self._last_step = schedule, last_step
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[status]}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("<"),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("start", total=last_step, status="")
        self._first: tuple[int, float] | None = None
        self._loss, self._speed = "", ""

    def __enter__(self) -> "TrainingDisplay":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def enter_phase(self, phase: Phase) -> None:
        """Tells of a new phase, whose step is compiled next."""
        number = phase.index + 1
        label = f"{phase.name} {number}/{len(self._schedule.phases)}"
        self._bar.update(
            self._task, description=label, completed=phase.first_step, status="compiling"
        )
        info(
            f"phase {label}: context {phase.context:,}, "
            f"{phase.sequences} sequences a step; compiling"
        )

    def update(self, step: int, loss: float) -> None:
        """Moves the bar."""
        if self._first is None:
            self._first = (step, time.perf_counter())
        self._loss = f"loss {loss:.3f}"
        self._bar.update(self._task, completed=step, status=f"{self._loss} {self._speed}")

    def log(self, row: dict[str, Any]) -> None:
        """Shows a logged step."""
        if row["tokens_per_second"] is not None:
            mfu = f"MFU {row['mfu']:.1%}" if row["mfu"] else ""
            work = mfu or f"{row['tflops_per_second_per_device'] * 1e3:.1f} GFLOP/s"
            self._speed = f"{human_count(row['tokens_per_second'])} tokens/s {work}"
        if console.is_terminal:
            return
        info(
            f"step {row['step']}/{self._last_step}  {row['phase']}  context {row['context']}  "
            f"loss {row['loss']:.4f}  grad_norm {row['grad_norm']:.3f}  "
            f"lr {row['learning_rate']:.2e}  {self._speed}  {self._time_left(row['step'])}"
        )

    def _time_left(self, step: int) -> str:
        if self._first is None or step <= self._first[0]:
            return ""
        seconds = (time.perf_counter() - self._first[1]) / (step - self._first[0])
        return f"{human_time(seconds * (self._last_step - step))} left"

    def log_evaluation(self, row: dict[str, Any]) -> None:
        """Shows held-out losses."""
        parts = []
        for key, value in row.items():
            figure, _, name = key.partition("/")
            if figure != "loss":
                continue
            if f"bits_per_byte/{name}" in row:
                more = f"{row[f'bits_per_byte/{name}']:.3f} bits/byte"
            else:
                more = (
                    f"accuracy {row[f'accuracy/{name}']:.1%}, margin {row[f'margin/{name}']:.3f}, "
                    f"likelier {row[f'likelihood_accuracy/{name}']:.1%}"
                )
            parts.append(f"{name} {value:.3f} ({more})")
        info(f"held out at step {row['step']}, context {row['context']}: {', '.join(parts)}")

    def log_samples(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Shows samples, the prompt in bold."""
        console.print(f"samples at step {step}:")
        for prompt, text in zip(prompts, texts, strict=True):
            rest = " ".join(text.removeprefix(prompt).split(" "))
            console.print(f"  [bold]{escape(prompt)}[/bold]{escape(rest)}".replace("\n", "\n  "))


def summarize(
    evaluations: Sequence[dict[str, Any]], unigram: dict[str, float], workdir: Path
) -> None:
    """The end of a run: held-out losses a source beside a unigram model's, and where things are."""
    if evaluations:
        last = evaluations[-1]
        table = Table(title=f"held out, step {last['step']}", title_justify="left")
        for column in ("source", "loss", "perplexity", "bits/byte", "unigram loss"):
            table.add_column(column, justify="left" if column == "source" else "right")
        for name, baseline in unigram.items():
            loss = last[f"loss/{name}"]
            table.add_row(
                name,
                f"{loss:.3f}",
                f"{math.exp(min(loss, 50.0)):.1f}",
                f"{last[f'bits_per_byte/{name}']:.3f}",
                f"{baseline:.3f}",
            )
        console.print(table)
    _show_places(workdir)


# Figures of a tuning run's evaluations, and how they are shown.
_TUNING_FIGURES = {
    "loss": ("loss", "{:.3f}"),
    "bits_per_byte": ("bits/byte", "{:.3f}"),
    "accuracy": ("preference accuracy", "{:.1%}"),
    "margin": ("margin", "{:.3f}"),
    "likelihood_accuracy": ("chosen likelier", "{:.1%}"),
}


def summarize_tuning(
    evaluations: Sequence[dict[str, Any]], sources: Sequence[str], workdir: Path
) -> None:
    """The end of a round: its first and last evaluation, and where things are."""
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        shown = [f for f in _TUNING_FIGURES if any(f"{f}/{name}" in last for name in sources)]
        table = Table(title=f"held out, step {last['step']}", title_justify="left")
        for column in ("source", "step", *(_TUNING_FIGURES[figure][0] for figure in shown)):
            table.add_column(column, justify="left" if column == "source" else "right")
        for name in sources:
            for row in (first, last) if first is not last else (last,):
                values = [_TUNING_FIGURES[f][1].format(row[f"{f}/{name}"]) for f in shown]
                table.add_row(name, f"{row['step']:,}", *values)
        console.print(table)
    _show_places(workdir)


def _show_places(workdir: Path) -> None:
    for name in ("checkpoints", "metrics.jsonl", "samples", "tensorboard"):
        if (workdir / name).exists():
            info(f"{name:14} {workdir / name}")


def human_count(value: float) -> str:
    """12345678 as 12.3M."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}" if value < 1e3 * limit else f"{value:.3g}"
    return f"{value:.0f}"


def human_time(seconds: float) -> str:
    """Seconds as 1d 02h, 3h 04m or 5m 06s."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}h"
    return f"{hour}h {minute:02}m" if hour else f"{minute}m {second:02}s"

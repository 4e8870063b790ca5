"""What the user reads in the terminal: plain lines, warnings, and progress."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich import progress as rich_progress
from rich.console import Console
from rich.markup import escape

from danube_jax.errors import printable

console = Console(file=sys.stderr, soft_wrap=True, highlight=False)

PLAIN_PROGRESS_SECONDS = 10.0


def info(message: str) -> None:
    """Prints one line."""
    console.print(escape(printable(message)))


def warn(message: str) -> None:
    """Prints one warning line: a choice that was made for the user."""
    console.print(f"[yellow]warning:[/yellow] {escape(printable(message))}")


@contextlib.contextmanager
def progress(description: str, total: float, unit: str = "items") -> Iterator[Callable]:
    """Shows progress on stderr: a bar on a terminal, a line every ten seconds elsewhere.

    Args:
      description: what is being done, in a few words.
      total: amount of work in `unit`.
      unit: name of what is counted; "MB" divides amounts by 1e6.

    Yields:
      ``advance(amount)``, to be called as work is done.
    """
    scale = 1e6 if unit == "MB" else 1.0
    if not console.is_terminal:
        yield _PlainProgress(description, total, unit, scale).advance
        return
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.TaskProgressColumn(),
        rich_progress.TextColumn("{task.fields[rate]}"),
        rich_progress.TimeRemainingColumn(),
    )
    started = time.monotonic()
    with rich_progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total, rate="")

        def advance(amount: float) -> None:
            bar.advance(task, amount)
            rate = bar.tasks[0].completed / scale / max(1e-9, time.monotonic() - started)
            bar.update(task, rate=f"{rate:,.1f} {unit}/s")

        yield advance


class _PlainProgress:
    def __init__(self, description: str, total: float, unit: str, scale: float):
        self._description, self._total, self._unit, self._scale = description, total, unit, scale
        self._done = 0.0
        self._started = self._shown = time.monotonic()

    def advance(self, amount: float) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._shown < PLAIN_PROGRESS_SECONDS:
            return
        self._shown = now
        rate = self._done / (now - self._started)
        left = (self._total - self._done) / max(rate, 1e-9)
        percent = 100 * self._done / max(self._total, 1e-9)
        forecast = f", {left:,.0f} s left" if percent >= 1 else ""  # no guess from next to nothing
        info(
            f"{self._description}: {percent:.0f} %, {rate / self._scale:,.1f} {self._unit}/s"
            f"{forecast}"
        )

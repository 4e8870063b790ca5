"""What the user reads in the terminal: plain lines, warnings, and progress bars."""

import sys

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(file=sys.stderr, soft_wrap=True, highlight=False)


def info(message: str) -> None:
    """Prints one line."""
    console.print(escape(message))


def warn(message: str) -> None:
    """Prints one warning line: a choice that was made for the user."""
    console.print(f"[yellow]warning:[/yellow] {escape(message)}")


def progress(*columns: ProgressColumn, unit_counts: bool = True) -> Progress:
    """A progress bar with elapsed and remaining time and the caller's columns at its end.

    It draws only on a terminal; elsewhere the caller prints its own lines.
    """
    counts = (MofNCompleteColumn(),) if unit_counts else ()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        *counts,
        *columns,
        TimeElapsedColumn(),
        TextColumn("<"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )

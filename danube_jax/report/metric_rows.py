"""metrics.jsonl as series of numbers: read line by line, whatever state the file is in."""

import dataclasses
import json
import math
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

MAX_DIGITS = 25  # of a whole number; longer ones become floats, which may be infinite
_PLACE = ("step", "tokens")  # say where a row stands; every other number is a curve


@dataclasses.dataclass(frozen=True)
class Series:
    """One scalar over a run.

    Attributes:
      steps: int64 [N], rising.
      tokens: float64 [N], tokens read by then; the steps where the rows do not say.
      values: float64 [N]; may hold NaN and infinities, as logged.
    """

    steps: np.ndarray
    tokens: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    @property
    def finite(self) -> "Series":
        """The points whose value is a number."""
        keep = np.isfinite(self.values)
        return Series(self.steps[keep], self.tokens[keep], self.values[keep])


EMPTY = Series(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What metrics.jsonl holds.

    Attributes:
      train, evaluation, benchmark: key → series, of the rows of that kind; keys in the order in
        which they appear. Where a step was logged twice, its later row counts.
      events: rows of kind "event" as they are, oldest first.
      rows: rows that were read.
      problems: what could not be read, one sentence each.
    """

    train: dict[str, Series] = dataclasses.field(default_factory=dict)
    evaluation: dict[str, Series] = dataclasses.field(default_factory=dict)
    benchmark: dict[str, Series] = dataclasses.field(default_factory=dict)
    events: tuple[dict[str, Any], ...] = ()
    rows: int = 0
    problems: tuple[str, ...] = ()

    def series(self, key: str) -> Series:
        """A curve of the training rows; empty where there is none."""
        return self.train.get(key, EMPTY)

    @property
    def last_step(self) -> int:
        """The last step that was logged or evaluated; else the last event's; 0 where none is."""
        curves = [*self.train.values(), *self.evaluation.values()]
        steps = [int(series.steps[-1]) for series in curves if len(series)]
        return max(steps or [event["step"] for event in self.events[-1:]], default=0)


class _Columns:
    """Collects the numbers of one kind of rows, eight bytes each."""

    def __init__(self) -> None:
        self._columns: dict[str, tuple[array, array, array]] = {}

    def add(self, row: dict[str, Any]) -> None:
        step = row["step"]
        tokens = row.get("tokens")
        known = _is_number(tokens) and math.isfinite(tokens)
        place = float(tokens) if known else float(step)
        for key, value in row.items():
            if key in _PLACE or not _is_number(value):
                continue
            column = self._columns.setdefault(key, (array("q"), array("d"), array("d")))
            for part, item in zip(column, (step, place, float(value)), strict=True):
                part.append(item)

    def series(self) -> dict[str, Series]:
        out = {}
        for key, column in self._columns.items():
            steps, tokens, values = (np.array(part) for part in column)
            # The last row of a step: the first one in the file read backwards.
            _, first = np.unique(steps[::-1], return_index=True)
            keep = len(steps) - 1 - first
            out[key] = Series(steps[keep], tokens[keep], values[keep])
        return out


def parse_json(text: str) -> Any:
    """JSON in which every number can become a float.

    Raises:
      ValueError: it is not JSON, or nested too deep.
    """
    try:
        return json.loads(text, parse_int=_whole)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)


def read_metrics(path: Path) -> Metrics:
    """Reads metrics.jsonl; what is damaged or cut off is skipped and named in `problems`."""
    if not path.exists():
        return Metrics(problems=(f"{path.name} is not there, so there are no curves",))
    kinds = {kind: _Columns() for kind in ("train", "evaluation", "benchmark")}
    events: list[dict[str, Any]] = []
    bad: list[int] = []
    rows = 0
    try:
        for number, row in _lines(path):
            if row is None:
                bad.append(number)
                continue
            rows += 1
            if row["kind"] == "event":
                events.append(row)
            elif row["kind"] in kinds:
                kinds[row["kind"]].add(row)
    except OSError as error:
        reason = error.strerror or error
        return Metrics(problems=(f"{path.name} cannot be read: {reason}",))
    problems = []
    if bad:
        where = f"line {bad[0]}" if len(bad) == 1 else f"{len(bad)} lines, the first line {bad[0]}"
        problems.append(f"{path.name}: {where} cannot be read and is left out")
    if not rows:
        problems.append(f"{path.name} holds no row yet")
    events.sort(key=lambda event: event.get("time", 0) if _is_number(event.get("time")) else 0)
    return Metrics(
        **{kind: columns.series() for kind, columns in kinds.items()},
        events=tuple(events),
        rows=rows,
        problems=tuple(problems),
    )


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(line number, row) of every line; None for what is no row."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
                fine = isinstance(row, dict) and isinstance(row["kind"], str)
                fine = fine and isinstance(row["step"], int) and abs(row["step"]) < 2**63
            except (ValueError, KeyError):
                fine = False
            yield number, row if fine else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

"""Seeded damage to files, and what commands may make of it.

A command that reads a damaged file may end with status 2 and one line that names the file, or come
to the same result as without the damage. It may come to another result only where the file, as it
is, says something else and nothing in its format could tell: a `Kind` says when that is so.
"""

import collections
import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fork_commands import TRACEBACK, Finished

Result = tuple[Finished, Any]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file and the command that reads it.

    Attributes:
      path: the file that is damaged.
      run: runs the command; returns how it ended, and its result in a form to be compared.
      means_other: (intact, damaged) → whether the damaged bytes are a file that says something
        else, so that another result is right; it may look at the result, too.
      names: what the error line must name one of; by default the file.
      output: must not exist after a refusal.
    """

    path: Path
    run: Callable[[], Result]
    means_other: Callable[[bytes, bytes], bool]
    names: tuple[str, ...] = ()
    output: Path | None = None


def damages(data: bytes, name: str, count: int, first: int = 0) -> Iterator[tuple[str, bytes]]:
    """(what was done, the damaged bytes): flipped bits and truncations, by turns of 3 to 1."""
    for number in range(first, first + count):
        chance = random.Random(f"{name} {number}")
        if number % 4 == 3:
            size = chance.randrange(len(data))
            yield f"{name} {number}: cut to {size} of {len(data)} bytes", data[:size]
            continue
        at, bit = chance.randrange(len(data)), chance.randrange(8)
        flipped = bytearray(data)
        flipped[at] ^= 1 << bit
        yield f"{name} {number}: bit {bit} of byte {at} of {len(data)}", bytes(flipped)


def check(kind: Kind, name: str, count: int, first: int = 0) -> collections.Counter:
    """Damages the file `count` times; returns how often the command did what.

    Raises:
      AssertionError: a traceback, a hang, a wrong result in silence, or an unclear refusal.
    """
    intact = kind.path.read_bytes()
    _, expected = _finished(kind, "intact")
    outcomes: collections.Counter = collections.Counter()
    for what, damaged in damages(intact, name, count, first):
        kind.path.write_bytes(damaged)
        try:
            outcomes[_outcome(kind, what, intact, damaged, expected)] += 1
            assert kind.path.read_bytes() == damaged, f"{what}: the file was overwritten"
        finally:
            kind.path.write_bytes(intact)
    return outcomes


def _finished(kind: Kind, what: str) -> Result:
    finished, result = kind.run()
    shown = f"{what}\n{finished.arguments}\nstatus {finished.status}\n{finished.err[-3000:]}"
    assert finished.status is not None, f"a hang: {shown}"
    assert TRACEBACK not in finished.err + finished.out, f"a traceback: {shown}"
    assert finished.status in (0, 2), f"another status: {shown}"
    if what == "intact":
        assert finished.status == 0, shown
    return finished, result


def _outcome(kind: Kind, what: str, intact: bytes, damaged: bytes, expected: Any) -> str:
    finished, result = _finished(kind, what)
    if finished.status == 2:
        assert len(finished.errors) == 1, f"{what}: {finished.err}"
        names = kind.names or (kind.path.name,)
        assert any(name in finished.errors[0] for name in names), f"{what}: {finished.errors}"
        assert kind.output is None or not kind.output.exists(), f"{what}: half-written"
        return "refused"
    if result == expected:
        return "the same result"
    assert kind.means_other(intact, damaged), (
        f"wrong in silence: {what}\n{expected}\n{result}\n{finished.err[-2000:]}"
    )
    return "another file"


def other_json(*free: str) -> Callable[[bytes, bytes], bool]:
    """Valid JSON with other values under some of the keys `free`, wherever they stand, only.

    Without keys: any other value of the same shape, or text.
    """

    def judge(intact: bytes, damaged: bytes) -> bool:
        try:
            before, after = (json.loads(data) for data in (intact, damaged))
        except ValueError:
            return False
        changed = set(_changed(before, after))
        return bool(changed) and (not free or changed <= set(free))

    return judge


def other_lines(intact: bytes, damaged: bytes) -> bool:
    """Lines that are all JSON of their own; fewer ones where the cut was between two."""
    try:
        rows = [json.loads(line) for line in damaged.split(b"\n") if line.strip()]
    except ValueError:
        return False
    return all(isinstance(row, dict) for row in rows)


def _changed(before: Any, after: Any, key: str = "") -> Iterator[str]:
    """Keys whose values differ; '' where keys do."""
    if isinstance(before, dict) and isinstance(after, dict):
        if before.keys() != after.keys():
            yield ""
            return
        for name, value in before.items():
            yield from _changed(value, after[name], name)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for old, new in zip(before, after, strict=True):
            yield from _changed(old, new, key)
    elif before != after or type(before) is not type(after):
        yield key

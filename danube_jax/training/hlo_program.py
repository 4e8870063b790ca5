"""Reads the text of an optimised HLO program: its computations, instructions and loops."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator

Arrays = tuple[tuple[str, tuple[int, ...]], ...]

_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CALLEES = re.compile(
    r"\b(?:body|condition|calls|to_apply|\w+_computations?)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_SCOPE = re.compile(r'op_name="([^"]*)"')
_BITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: unique in its computation.
      opcode: e.g. 'fusion', 'all-gather-start'; of a custom call, its target.
      results: (dtype, shape) of each array that it makes.
      operands: (dtype, shape) of each array that it takes, in order.
      inputs: names of the instructions that it takes.
      is_root: whether its result is that of its computation.
      text: the whole line.
    """

    name: str
    opcode: str
    results: Arrays
    operands: Arrays
    inputs: tuple[str, ...]
    is_root: bool
    text: str

    @property
    def scope(self) -> str:
        """Where in the traced function it comes from: JAX's name stack; '' where unknown."""
        match = _SCOPE.search(self.text)
        return match[1] if match else ""

    def attribute(self, name: str) -> str | None:
        """The computation that an attribute such as 'calls' or 'body' names, or None."""
        match = re.search(rf"\b{name}=%([\w.\-]+)", self.text)
        return match[1] if match else None

    def computations(self) -> list[str]:
        """All computations that it refers to."""
        return [name for names in _CALLEES.findall(self.text) for name in _NAME.findall(names)]


class Program:
    """The optimised HLO of a compiled program.

    Attributes:
      entry_name: the computation that runs.
    """

    def __init__(self, text: str):
        """Reads `text`, what `Compiled.as_text` returns.

        Raises:
          ValueError: it holds no entry computation.
        """
        self._lines: dict[str, list[str]] = {}
        self._parsed: dict[str, list[Instruction]] = {}
        entry = name = None
        for line in text.splitlines():
            if name is None:
                if header := _COMPUTATION.match(line):
                    name = header[2]
                    entry = name if header[1] else entry
                    self._lines[name] = []
            elif line.startswith("}"):
                name = None
            else:
                self._lines[name].append(line)
        if entry is None:
            raise ValueError("no ENTRY computation in this HLO text")
        self.entry_name = entry

    def computation(self, name: str) -> list[Instruction]:
        """The instructions of a computation, in the order in which they are issued."""
        if name not in self._parsed:
            self._parsed[name] = list(_parse(self._lines[name]))
        return self._parsed[name]

    @functools.cached_property
    def loops(self) -> list[Instruction]:
        """Instructions inside of loops, with those of what these call."""
        return self._all(self._in_loops)

    @functools.cached_property
    def entry(self) -> list[Instruction]:
        """Instructions outside of loops, with those inside fusions and calls made there."""
        return self._all(self._reachable([self.entry_name]) - self._in_loops)

    @functools.cached_property
    def _in_loops(self) -> set[str]:
        bodies = [
            body
            for name in self._reachable([self.entry_name])
            for body in re.findall(r" while\(.*?body=%([\w.\-]+)", "\n".join(self._lines[name]))
        ]
        return self._reachable(bodies)

    def _reachable(self, names: Iterable[str]) -> set[str]:
        found, pending = set(), list(names)
        while pending:
            name = pending.pop()
            if name not in found and name in self._lines:
                found.add(name)
                for callees in _CALLEES.findall("\n".join(self._lines[name])):
                    pending += _NAME.findall(callees)
        return found

    def _all(self, computations: set[str]) -> list[Instruction]:
        return [x for name in sorted(computations) for x in self.computation(name)]


def _parse(lines: Iterable[str]) -> Iterator[Instruction]:
    arrays: dict[str, Arrays] = {}
    for line in lines:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        root, name, result, opcode, rest = match.groups()
        if opcode == "custom-call":
            opcode = _TARGET.search(line)[1]
        arrays[name] = _arrays(result)
        inputs = tuple(_NAME.findall(rest[: _closing_parenthesis(rest)]))
        operands = tuple(array for x in inputs for array in arrays.get(x, ()))
        yield Instruction(name, opcode, arrays[name], operands, inputs, root is not None, line)


def _closing_parenthesis(text: str) -> int:
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i
    return len(text)


def _arrays(text: str) -> Arrays:
    return tuple(
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(text)
    )


def trip_count(loop: Instruction) -> int | None:
    """How often a `while` instruction runs its body, or None where the compiler does not know."""
    match = _TRIP_COUNT.search(loop.text)
    return int(match[1]) if match else None


def elements(arrays: Arrays) -> int:
    """Number of elements in (dtype, shape) pairs."""
    return sum(math.prod(shape) for _, shape in arrays)


def num_bytes(arrays: Arrays) -> int:
    """Bytes of (dtype, shape) pairs."""
    return sum(math.prod(shape) * _itemsize(dtype) for dtype, shape in arrays)


def _itemsize(dtype: str) -> int:
    bits = 8 if dtype == "pred" else int(_BITS.search(dtype)[0])
    return max(1, bits // 8)


_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective",
    "ragged-all-to-all",
)


def collective_kind(opcode: str) -> str | None:
    """'all-gather' of 'all-gather-start', ...; None of what communicates with nobody.

    Of an asynchronous collective, the start counts and its end does not.
    """
    if opcode.endswith(("-done", "-update")):
        return None
    return next((kind for kind in _COLLECTIVES if opcode.startswith(kind)), None)


def collectives(instructions: Iterable[Instruction], kind: str = "") -> list[Instruction]:
    """The collectives of a kind ('all-gather', ...; '' means all), an asynchronous one once."""
    return [
        x
        for x in instructions
        if (collective_kind(x.opcode) or "").startswith(kind or _COLLECTIVES)
    ]

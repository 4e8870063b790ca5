"""What is computed once: equal inputs, and prefixes that several inputs begin with.

The options of a multiple-choice question share the question; the questions of an MMLU subject
share its few-shot examples. A *family* is a set of inputs whose common prefix enters the model
once; each input then goes on from there. Everything here is a pure function of token ids.
"""

import dataclasses
import itertools
from collections.abc import Sequence

MIN_PREFIX = 16  # tokens; below, a second dispatch costs more than it saves
MIN_SAVING = 0.15  # of a family's tokens, for the same reason

Tokens = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Family:
    """Inputs that are computed together.

    Attributes:
      members: indices of the inputs.
      prefix: tokens that all of them begin with and that enter once; 0: nothing is shared.
    """

    members: tuple[int, ...]
    prefix: int


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of leading tokens in which `a` and `b` agree."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices compare in C, so halving beats a loop over tokens
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def find_families(inputs: Sequence[Tokens], first_scored: Sequence[int]) -> list[Family]:
    """Partitions inputs into families that save the most tokens.

    Args:
      inputs: what enters the model, no two the same.
      first_scored: for each input the first position whose prediction is needed; prefixes end
        before it, so that no prediction is lost.

    Returns:
      Families in the lexical order of their inputs; those of one member share nothing.
    """
    order = sorted(range(len(inputs)), key=inputs.__getitem__)
    shared = [
        min(common_prefix(inputs[a], inputs[b]), first_scored[a], first_scored[b])
        for a, b in itertools.pairwise(order)
    ]
    families: list[Family] = []
    stack = [(0, len(order))]
    while stack:
        begin, end = stack.pop()
        runs = _cut(shared, begin, end)
        if len(runs) > 1:
            stack += reversed(runs)  # so that the first is taken next
        else:
            members = tuple(order[begin:end])
            prefix = min(shared[begin : end - 1], default=0)
            families += _worth_sharing(members, prefix, inputs)
    return families


def _cut(shared: Sequence[int], begin: int, end: int) -> list[tuple[int, int]]:
    """Cuts a run of sorted inputs wherever its common prefix is shortest, if the parts save more.

    What the parts save is counted as if none of them were cut again.
    """
    lowest = min(shared[begin : end - 1], default=0)
    cuts = [i + 1 for i in range(begin, end - 1) if shared[i] == lowest]
    runs = list(zip([begin, *cuts], [*cuts, end], strict=True))
    apart = sum((b - a - 1) * min(shared[a : b - 1], default=0) for a, b in runs)
    together = (end - begin - 1) * lowest
    return runs if apart > together or lowest < MIN_PREFIX else [(begin, end)]


def _worth_sharing(members: Tokens, prefix: int, inputs: Sequence[Tokens]) -> list[Family]:
    total = sum(len(inputs[i]) for i in members)
    saved = (len(members) - 1) * prefix
    if prefix >= MIN_PREFIX and saved >= MIN_SAVING * total:
        return [Family(members, prefix)]
    return [Family((i,), 0) for i in members]


def choose_sizes(
    lengths: Sequence[int], grid: Sequence[int], program_cost: float
) -> dict[int, int]:
    """Few padded sizes for many lengths.

    Args:
      lengths: one or more lengths, each at most the grid's last.
      grid: allowed sizes, ascending.
      program_cost: what a size of its own costs (compiling its program), in padded tokens.

    Returns:
      For each length that occurs the size that it is padded to; of all choices from the grid, the
      one with the least padding and program cost together.
    """
    counts: dict[int, int] = {}
    for length in lengths:
        size = next(size for size in grid if size >= length)
        counts[size] = counts.get(size, 0) + 1
    sizes = sorted(counts)
    # best[i]: least cost of the first i sizes; each group is padded to its largest.
    best: list[tuple[float, int]] = [(0.0, 0)]
    for i in range(1, len(sizes) + 1):
        options = []
        rows = 0
        for j in range(i, 0, -1):
            rows += counts[sizes[j - 1]]
            options.append((best[j - 1][0] + rows * sizes[i - 1] + program_cost, j - 1))
        best.append(min(options))
    bounds, i = [], len(sizes)
    while i:
        bounds.append(sizes[i - 1])
        i = best[i][1]
    bounds.reverse()
    return {length: next(b for b in bounds if b >= length) for length in set(lengths)}


def size_grid(longest: int) -> tuple[int, ...]:
    """Padded sizes: 16 apart up to 64, then four a doubling, up to `longest` or just above."""
    grid = [16, 32, 48, 64]
    while grid[-1] < longest:
        power = 1 << (grid[-1].bit_length() - 1)
        grid.append(grid[-1] + power // 4)
    enough = next(i for i, size in enumerate(grid) if size >= longest)
    return tuple(grid[: enough + 1])

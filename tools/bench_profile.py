"""Records a trace of a train step and sums up its kernels by class.

jax.profiler writes the trace, which XProf and TensorBoard open, and reads it back; what a kernel is
follows from the instruction of the compiled program that it ran for, or, where the trace does not
say which, from its name.
"""

import collections
import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from danube_jax.console import info

# Where a static account of the program names the class of a kernel, its finer names come first.
FP8_MATMUL, MATMUL, ATTENTION = "FP8 matmul", "matmul", "attention"
ELEMENTWISE, COPY, COLLECTIVE, OTHER = "elementwise", "copy", "collective", "other"

_CONTROL_FLOW = ("while", "call", "conditional")  # their time is that of what they run
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*)\(")
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLS = re.compile(r"\bcalls=%?([\w.\-]+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_BY_NAME = (  # of kernels, the first that is found
    (ATTENTION, r"fmha|flash|sdpa|attention"),
    (COLLECTIVE, r"nccl|all[-_]?gather|all[-_]?reduce|reduce[-_]?scatter"),
    (FP8_MATMUL, r"e4m3|e5m2|nvjet_[qr]"),
    (MATMUL, r"nvjet|gemm|xmma|cutlass|cublas|\bdot\b"),
    (COPY, r"memcpy|memset|\bcopy"),
    (ELEMENTWISE, r"fusion|reduce|transpose|elementwise|convert|scatter|gather|select"),
)


@dataclasses.dataclass(frozen=True)
class KernelClass:
    """Kernels of one kind in a step: seconds in all, and how often any of them ran."""

    name: str
    seconds: float
    launches: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """What a trace says of a step.

    Attributes:
      classes: of kernels, the longest first.
      largest: (kernel, class, seconds a step, runs a step) of those that take longest.
      seconds: of a step, by the clock of the host; the profiler's own work included.
      busy_seconds: of these, with at least one kernel running on the first device.
    """

    classes: tuple[KernelClass, ...]
    largest: tuple[tuple[str, str, float, float], ...]
    seconds: float
    busy_seconds: float


@dataclasses.dataclass(frozen=True)
class KernelEvent:
    """One run of a kernel, and the instruction that it ran for ('' where the trace has none).

    `start` and `seconds` are seconds.
    """

    name: str
    instruction: str
    start: float
    seconds: float


def profile(step: Callable[[], Any], hlo: str, folder: Path, steps: int = 2) -> dict[str, Any]:
    """Traces a warm train step into `folder`, and sums up its kernels.

    Args:
      step: one call is one train step.
      hlo: text of the compiled program that it runs.
      folder: where the trace goes; made where it is missing.
      steps: calls that are traced; the figures are means.

    Returns:
      A `Profile` as a dict, with `trace`, the folder, and `estimate`: seconds a step by class, of
      the program's static account, or None where there is none.
    """
    classes, estimate = instruction_classes(hlo), None
    if account := static_account(hlo):
        named, estimate = account
        classes |= named
    with jax.profiler.trace(str(folder)):
        start = time.perf_counter()
        for _ in range(steps):
            jax.block_until_ready(step())
        seconds = time.perf_counter() - start
    result = sum_up(kernel_events(newest_trace(folder)), classes, seconds, steps)
    return dataclasses.asdict(result) | {"trace": str(folder), "estimate": estimate}


def static_account(hlo: str) -> tuple[dict[str, str], dict[str, float]] | None:
    """What a GPU program's text says: class by instruction, and seconds a step by class.

    None, with a line that says why, for a program of another device.
    """
    if jax.default_backend() != "gpu":
        info(f"no static estimate: it is of GPU programs, and this one is for a {_platform()}")
        return None
    try:
        from danube_jax.training.hlo_account import Account, Rates
    except ImportError:
        info("no static estimate: this version has no danube_jax/training/hlo_account.py")
        return None
    account = Account(hlo)
    kinds = {kernel.instruction.name: kernel.kind for kernel in account.kernels}
    return kinds, {total.kind: total.seconds for total in account.totals(Rates())}


def _platform() -> str:
    return jax.default_backend().upper()


def sum_up(
    events: Iterable[KernelEvent], classes: Mapping[str, str | None], seconds: float, steps: int
) -> Profile:
    """The profile of what ran in `steps` steps, which took `seconds` in all.

    An event whose instruction has the class None is left out; one whose instruction is not known
    goes by its name.
    """
    total: collections.Counter = collections.Counter()
    launches: collections.Counter = collections.Counter()
    kernels: dict[str, list[float]] = collections.defaultdict(list)
    kind_of: dict[str, str] = {}
    intervals = []
    for event in events:
        known = event.instruction in classes
        kind = classes[event.instruction] if known else class_of_name(event.name)
        if kind is None:
            continue
        total[kind] += event.seconds
        launches[kind] += 1
        kernels[event.name].append(event.seconds)
        kind_of[event.name] = kind
        intervals.append((event.start, event.start + event.seconds))
    largest = sorted(kernels, key=lambda name: -sum(kernels[name]))[:10]
    return Profile(
        classes=tuple(
            KernelClass(name, total[name] / steps, launches[name] / steps)
            for name in sorted(total, key=lambda name: -total[name])
        ),
        largest=tuple(
            (name, kind_of[name], sum(kernels[name]) / steps, len(kernels[name]) / steps)
            for name in largest
        ),
        seconds=seconds / steps,
        busy_seconds=_covered(intervals) / steps,
    )


def _covered(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


def newest_trace(folder: Path) -> ProfileData:
    """The newest trace in a folder that jax.profiler wrote to."""
    files = folder.glob("plugins/profile/*/*.xplane.pb")
    return ProfileData.from_file(str(max(files, key=lambda path: path.stat().st_mtime)))


def kernel_events(trace: ProfileData) -> Iterator[KernelEvent]:
    """What ran on the first GPU, or on the CPU where there is none, in no order."""
    planes = {plane.name: plane for plane in trace.planes}
    gpus = sorted(name for name in planes if name.startswith("/device:GPU:"))
    for line in planes[gpus[0] if gpus else "/host:CPU"].lines:
        if gpus and not line.name.startswith("Stream"):
            continue  # sums over the streams, which a viewer may have added
        for event in line.events:
            stats = dict(event.stats)
            if not gpus and "hlo_op" not in stats:
                continue  # the host's own work
            instruction = str(stats.get("hlo_op", ""))
            yield KernelEvent(
                event.name, instruction, event.start_ns / 1e9, event.duration_ns / 1e9
            )


def instruction_classes(hlo: str) -> dict[str, str | None]:
    """Class of every instruction of a program; None where its time is that of what it runs."""
    bodies: dict[str, list[tuple[str, str, str]]] = {}
    current: list[tuple[str, str, str]] = []
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            current = bodies.setdefault(header[1], [])
        elif match := _INSTRUCTION.match(line):
            current.append((match[1], match[2], line))
    classes: dict[str, str | None] = {}
    for body in bodies.values():
        for name, opcode, line in body:
            called = _CALLS.search(line)
            classes[name] = _class_of(opcode, line, bodies.get(called[1], ()) if called else ())
    return classes


def _class_of(opcode: str, line: str, inside: Iterable[tuple[str, str, str]]) -> str | None:
    """Class of an instruction; `inside` holds those of the fusion that it calls."""
    if opcode in _CONTROL_FLOW:
        return None
    if opcode == "custom-call":
        target = match[1] if (match := _TARGET.search(line)) else ""
        if "matmul$f8" in target:
            return FP8_MATMUL
        if "fmha" in target:
            return ATTENTION
        return MATMUL if "matmul" in target or "gemm" in target else class_of_name(target)
    operation = opcode.removesuffix("-start").removesuffix("-done")
    if operation in ("all-gather", "all-reduce", "reduce-scatter", "collective-permute"):
        return COLLECTIVE
    if opcode == "dot" or any(other == "dot" for _, other, _ in inside):
        return FP8_MATMUL if any("f8e4m3fn[" in text for *_, text in inside) else MATMUL
    if operation == "copy":
        return COPY
    return ELEMENTWISE


def class_of_name(kernel: str) -> str:
    """Class of a kernel whose instruction the trace does not name."""
    found = (kind for kind, words in _BY_NAME if re.search(words, kernel, re.IGNORECASE))
    return next(found, OTHER)


def print_profile(profile: Mapping[str, Any]) -> None:
    """The table for people, of what `profile` returns."""
    classes, estimate = profile["classes"], profile["estimate"] or {}
    total = sum(kind["seconds"] for kind in classes)
    known = {kind["name"] for kind in classes}
    classes = [*classes, *({"name": n, "seconds": 0, "launches": 0} for n in {*estimate} - known)]
    print(f"  {'kernels of a step':<28}{'ms':>10}{'share':>8}{'launches':>10}{'estimate ms':>13}")
    for kind in classes:
        share = kind["seconds"] / total if total else 0.0
        print(
            f"  {kind['name']:<28}{1e3 * kind['seconds']:>10.2f}{share:>8.1%}"
            f"{kind['launches']:>10,.0f}{_milliseconds(estimate.get(kind['name'])):>13}"
        )
    launches = sum(kind["launches"] for kind in classes)
    static = _milliseconds(sum(estimate.values()) if estimate else None)
    print(f"  {'all':<28}{1e3 * total:>10.2f}{1:>8.1%}{launches:>10,.0f}{static:>13}")
    idle = profile["seconds"] - profile["busy_seconds"]
    print(
        f"  {1e3 * profile['seconds']:.2f} ms a step under the profiler, {1e3 * idle:.2f} of them "
        f"with no kernel running; the trace is in {profile['trace']}"
    )
    for name, kind, seconds, runs in profile["largest"]:
        print(f"  {1e3 * seconds:>10.2f} ms {runs:>7,.0f} x  {kind}: {name[:80]}")


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f}"

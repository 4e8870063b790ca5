"""A static account of a compiled training step: its kernels, their bytes and FLOPs, their time.

The account walks the optimised HLO of a GPU program from its entry, loops as often as they run. A
matmul's FLOPs are those of its shapes, attention's those of the scores that its mask lets through
(the backward pass at 2.5 times the forward one: it makes the scores again). A kernel's bytes are
what it has to read and write: arguments once, of what it slices or gathers the part that it
takes, and of what it updates in place the part that it replaces.

Time is a roofline: a kernel takes as long as its FLOPs at the rate of its kind or its bytes at the
bandwidth of memory, whichever is longer, and never less than a kernel's overhead. The rates are
assumptions (`Rates`), the same for every kernel of a kind; nothing overlaps.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence

from danube_jax.training.hlo_program import (
    Instruction,
    Program,
    collective_kind,
    num_bytes,
    trip_count,
)

FP8_MATMUL, BF16_MATMUL, F32_MATMUL = "FP8 matmul", "bfloat16 matmul", "float32 matmul"
ATTENTION_FORWARD, ATTENTION_BACKWARD = "attention forward", "attention backward"
QUANTIZE, ELEMENTWISE, UPDATE = "FP8 quantisation", "elementwise", "weights and optimizer"
COPY, SMALL, COLLECTIVE, OTHER = "copy", "small", "collective", "other"
KINDS = (
    FP8_MATMUL,
    BF16_MATMUL,
    F32_MATMUL,
    ATTENTION_FORWARD,
    ATTENTION_BACKWARD,
    QUANTIZE,
    ELEMENTWISE,
    UPDATE,
    COPY,
    SMALL,
    COLLECTIVE,
    OTHER,
)
MATMULS = (FP8_MATMUL, BF16_MATMUL, F32_MATMUL)

SMALL_BYTES = 1 << 20  # a kernel that moves less takes as long as its launch
BACKWARD_ATTENTION = 2.5  # FLOPs of attention's backward pass over those of the forward one
BACKWARD_PASS = "transpose("  # JAX's name stacks of a backward pass hold it
FORWARD_PASS = "jvp("

_MATMUL_TARGET = "__cublas$"
_FP8_TARGET = "$f8"
_ATTENTION_TARGET = "__cudnn$fmha"
_FREE = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "after-all",
    "iota",
    "partition-id",
    "replica-id",
    "opt-barrier",
}


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a device is assumed to reach; every rate can be replaced.

    Attributes:
      fp8_tflops, bf16_tflops, f32_tflops: of large matmuls, 1e12 FLOP/s.
      attention_forward_tflops, attention_backward_tflops: of cuDNN's attention, counting only
        scores that the mask lets through.
      memory_gbps: of kernels that read and write memory, 1e9 bytes/s.
      link_gbps: of a device to the others of its host, one way.
      network_gbps: of a device to other hosts, one way.
      kernel_us: what the shortest kernel takes, launch included.
    """

    fp8_tflops: float = 1_250.0
    bf16_tflops: float = 700.0
    f32_tflops: float = 50.0
    attention_forward_tflops: float = 330.0
    attention_backward_tflops: float = 260.0
    memory_gbps: float = 2_400.0
    link_gbps: float = 350.0
    network_gbps: float = 40.0
    kernel_us: float = 2.0


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of the program, all its runs in a step alike.

    Attributes:
      kind: one of `KINDS`.
      times: how often a step runs it.
      loops: names of the `while` instructions around it, the outermost first.
      flops, bytes_read, bytes_written: of one run; of a collective, what a device sends is read.
      devices: how many take part, of a collective.
      instruction: where it stands in the program.
    """

    kind: str
    times: int
    loops: tuple[str, ...]
    flops: float
    bytes_read: float
    bytes_written: float
    devices: int
    instruction: Instruction

    @property
    def bytes(self) -> float:
        """Bytes that one run reads and writes."""
        return self.bytes_read + self.bytes_written

    @property
    def adds_in_place(self) -> bool:
        """Whether it is a matmul that adds to what is there, in the same memory."""
        text = self.instruction.text.replace(" ", "")
        return '"beta":1' in text and "output_to_operand_aliasing" in text

    def seconds(self, rates: Rates, devices_per_host: int = 8) -> float:
        """Time of one run by the roofline."""
        if self.kind == COLLECTIVE:
            hosts = self.devices > devices_per_host
            # A ring over hosts leaves each by as many network cards as it has devices.
            across = devices_per_host * rates.network_gbps if hosts else math.inf
            return max(self.bytes_read / min(rates.link_gbps, across) / 1e9, rates.kernel_us / 1e6)
        tflops = {
            FP8_MATMUL: rates.fp8_tflops,
            BF16_MATMUL: rates.bf16_tflops,
            F32_MATMUL: rates.f32_tflops,
            ATTENTION_FORWARD: rates.attention_forward_tflops,
            ATTENTION_BACKWARD: rates.attention_backward_tflops,
        }
        computing = self.flops / tflops[self.kind] / 1e12 if self.kind in tflops else 0.0
        moving = self.bytes / rates.memory_gbps / 1e9
        return max(computing, moving, rates.kernel_us / 1e6)


@dataclasses.dataclass(frozen=True)
class Total:
    """Sums over kernels of a kind, of a whole step.

    Attributes:
      kernels: places in the program; runs: of all of them in a step.
      seconds: by the roofline.
    """

    kind: str
    kernels: int
    runs: int
    flops: float
    bytes: float
    seconds: float


class Account:
    """The kernels of a compiled step.

    Attributes:
      kernels: in the order in which they are issued, those of loops once.
      micro_loop: name of the loop over micro-batches, None where there is none.
    """

    def __init__(self, program: Program | str):
        self.program = Program(program) if isinstance(program, str) else program
        self.kernels = tuple(_walk(self.program, self.program.entry_name, 1, ()))
        attends = [k.loops[0] for k in self.kernels if k.kind == ATTENTION_FORWARD and k.loops]
        self.micro_loop = attends[0] if attends else None

    def micro_step(self) -> list[Kernel]:
        """Kernels that run once a micro-batch (all but the first, where that one stands apart)."""
        return [k for k in self.kernels if k.loops and k.loops[0] == self.micro_loop]

    def once(self) -> list[Kernel]:
        """Kernels outside of the loop over micro-batches."""
        return [k for k in self.kernels if not k.loops or k.loops[0] != self.micro_loop]

    def micro_batches(self) -> int:
        """How often the loop over micro-batches runs; 0 where there is none."""
        return min((k.times for k in self.micro_step()), default=0)

    def seconds(self, rates: Rates, devices_per_host: int = 8) -> float:
        """Time of a step by the roofline."""
        return sum(k.times * k.seconds(rates, devices_per_host) for k in self.kernels)

    def exposed_seconds(self, rates: Rates, devices_per_host: int = 8) -> float:
        """Time of collectives less that of what the program runs while they are under way.

        Only asynchronous ones have any; how well the two really share a device is not known here.
        """
        schedule = self.program.computation(self.program.entry_name)
        place = {instruction.name: i for i, instruction in enumerate(schedule)}
        ends = {x.inputs[0]: place[x.name] for x in schedule if x.opcode.endswith("-done")}
        work = [0.0] * len(schedule)
        for kernel in self.kernels:
            if kernel.kind != COLLECTIVE:
                outermost = kernel.loops[0] if kernel.loops else kernel.instruction.name
                if outermost in place:  # what a call holds counts as nothing
                    seconds = kernel.times * kernel.seconds(rates, devices_per_host)
                    work[place[outermost]] += seconds
        exposed = 0.0
        for kernel in self.kernels:
            if kernel.kind == COLLECTIVE:
                start = place.get(kernel.instruction.name, 0)
                beside = sum(work[start : ends.get(kernel.instruction.name, start)])
                seconds = kernel.times * kernel.seconds(rates, devices_per_host)
                exposed += max(0.0, seconds - beside)
        return exposed

    def totals(
        self,
        rates: Rates,
        kernels: Iterable[Kernel] | None = None,
        devices_per_host: int = 8,
    ) -> list[Total]:
        """Sums a kind, in the order of `KINDS`, of some kernels or of all; kinds without any left
        out."""
        chosen = list(self.kernels if kernels is None else kernels)
        sums = []
        for kind in KINDS:
            of_kind = [k for k in chosen if k.kind == kind]
            if of_kind:
                sums.append(
                    Total(
                        kind=kind,
                        kernels=len(of_kind),
                        runs=sum(k.times for k in of_kind),
                        flops=sum(k.times * k.flops for k in of_kind),
                        bytes=sum(k.times * k.bytes for k in of_kind),
                        seconds=sum(k.times * k.seconds(rates, devices_per_host) for k in of_kind),
                    )
                )
        return sums


def count(kernels: Iterable[Kernel], *kinds: str) -> int:
    """How many of the kernels are of these kinds."""
    return sum(kernel.kind in kinds for kernel in kernels)


def weight_gradients(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Matmuls that give float32: in a training step those are the gradients of weights."""
    return [k for k in kernels if k.kind in MATMULS and k.instruction.results[0][0] == "f32"]


def _walk(
    program: Program, computation: str, times: int, loops: tuple[str, ...]
) -> Iterator[Kernel]:
    for instruction in program.computation(computation):
        opcode = instruction.opcode
        if opcode == "while":
            runs = times * (trip_count(instruction) or 1)
            inner = (*loops, instruction.name)
            yield from _walk(program, instruction.attribute("condition"), runs, inner)
            yield from _walk(program, instruction.attribute("body"), runs, inner)
        elif opcode == "conditional":
            for name in instruction.computations():
                yield from _walk(program, name, times, loops)
        elif opcode == "call" or (opcode == "async-start" and instruction.attribute("calls")):
            name = instruction.attribute("to_apply") or instruction.attribute("calls")
            yield from _walk(program, name, times, loops)
        elif opcode not in _FREE and not opcode.endswith(("-done", "-update")):
            yield _kernel(program, instruction, times, loops)


def _kernel(
    program: Program, instruction: Instruction, times: int, loops: tuple[str, ...]
) -> Kernel:
    opcode, flops, devices = instruction.opcode, 0.0, 1
    read, written = num_bytes(instruction.operands), num_bytes(instruction.results)
    if opcode.startswith(_MATMUL_TARGET):
        kind = _matmul_kind(instruction)
        flops = _matmul_flops(instruction)
        written = num_bytes(instruction.results[:1])  # the others are workspace
    elif opcode.startswith(_ATTENTION_TARGET):
        backward = "Backward" in opcode
        kind = ATTENTION_BACKWARD if backward else ATTENTION_FORWARD
        flops = _attention_flops(instruction) * (BACKWARD_ATTENTION if backward else 1.0)
    elif collective := collective_kind(opcode):
        kind, devices = COLLECTIVE, _group_size(instruction)
        others = devices - 1
        # What a device sends in a ring: shards of the whole to gather, of its own to scatter.
        shares = {"all-gather": others, "all-reduce": 2 * others / devices}
        read, written = read * shares.get(collective, others / devices), 0
    elif opcode.startswith("fusion"):
        kind, flops, read, written = _fusion(program, instruction)
    else:
        kind = COPY if opcode.startswith("copy") else OTHER
    if kind in (QUANTIZE, ELEMENTWISE, COPY, OTHER) and read + written < SMALL_BYTES:
        kind = SMALL
    return Kernel(kind, times, loops, flops, read, written, devices, instruction)


def _matmul_kind(instruction: Instruction) -> str:
    if instruction.opcode.endswith(_FP8_TARGET):
        return FP8_MATMUL
    return _kind_of_operand(instruction.operands[0][0])


def _kind_of_operand(dtype: str) -> str:
    if dtype.startswith("f8"):
        return FP8_MATMUL
    return BF16_MATMUL if dtype in ("bf16", "f16") else F32_MATMUL


def _matmul_flops(instruction: Instruction) -> float:
    contracted = re.search(r'lhs_contracting_dimensions"?[:=][\[{]([",\d ]*)', instruction.text)
    shape = instruction.operands[0][1]
    depth = math.prod(shape[int(dim)] for dim in re.findall(r"\d+", contracted[1]))
    return 2.0 * math.prod(instruction.results[0][1]) * depth


def _attention_flops(instruction: Instruction) -> float:
    """FLOPs of the forward pass: 4 * head size for each score that the mask lets through."""
    text = instruction.text.replace(" ", "")
    dimensions = re.search(r'"dimensions":\[([",\d]*)\]', text)
    batch, heads, length, keys = (int(x) for x in re.findall(r"\d+", dimensions[1]))
    head_size = instruction.operands[0][1][-1]
    window = int((re.search(r'"sliding_window_length":(\d+)', text) or (0, 0))[1])
    seen = float(keys)
    if '"mask_type":"CAUSAL"' in text:
        window = min(window or keys, keys)
        seen = window - window**2 / (2 * length)
    return 4.0 * batch * heads * length * seen * head_size


def _group_size(instruction: Instruction) -> int:
    """How many devices take part in a collective."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", instruction.text)
    if listed:
        return listed[1].count(",") + 1
    tiled = re.search(r"replica_groups=\[\d+,(\d+)\]", instruction.text)
    return int(tiled[1]) if tiled else 1


def _fusion(program: Program, fusion: Instruction) -> tuple[str, float, float, float]:
    """Kind, FLOPs, bytes read and bytes written of a fusion."""
    inner = program.computation(fusion.attribute("calls"))
    users: dict[str, list[Instruction]] = {}
    for instruction in inner:
        for name in instruction.inputs:
            users.setdefault(name, []).append(instruction)
    by_name = {instruction.name: instruction for instruction in inner}
    read = sum(_bytes_read(x, users) for x in inner if x.opcode == "parameter")
    written = sum(_bytes_written(x, by_name) for x in _roots(inner, by_name))

    dots = [x for x in inner if x.opcode == "dot"]
    if dots:
        return (
            _kind_of_operand(dots[0].operands[0][0]),
            sum(map(_matmul_flops, dots)),
            read,
            written,
        )
    if any(dtype.startswith("f8") for dtype, _ in fusion.results):
        return QUANTIZE, 0.0, read, written
    scopes = [fusion.scope, *(x.scope for x in inner)]
    in_pass = any(FORWARD_PASS in scope for scope in scopes)
    return ELEMENTWISE if in_pass else UPDATE, 0.0, read, written


def _bytes_read(value: Instruction, users: dict[str, list[Instruction]]) -> float:
    """Bytes of a fusion's argument that its users take."""
    whole, parts = num_bytes(value.results), 0.0
    for user in users.get(value.name, ()):
        if user.opcode in ("bitcast", "get-tuple-element"):
            parts += _bytes_read(user, users)
        elif user.opcode in ("dynamic-slice", "slice", "gather") and user.inputs[0] == value.name:
            parts += num_bytes(user.results)
        elif user.opcode == "dynamic-update-slice" and user.inputs[0] == value.name:
            continue  # replaced in place
        elif user.opcode == "scatter" and user.inputs[0] == value.name:
            parts += num_bytes(user.operands[-1:])  # adds to what is there
        else:
            return whole
    return min(parts, whole)


def _roots(inner: Sequence[Instruction], by_name: dict[str, Instruction]) -> list[Instruction]:
    root = next(x for x in inner if x.is_root)
    return [by_name[name] for name in root.inputs] if root.opcode == "tuple" else [root]


def _bytes_written(root: Instruction, by_name: dict[str, Instruction]) -> float:
    if root.opcode == "bitcast":
        return _bytes_written(by_name[root.inputs[0]], by_name)
    if root.opcode == "dynamic-update-slice":
        return num_bytes(by_name[root.inputs[1]].results)
    if root.opcode == "scatter":
        return num_bytes(root.operands[-1:])
    return 0.0 if root.opcode == "parameter" else num_bytes(root.results)

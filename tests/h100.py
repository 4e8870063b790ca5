"""Compiles for NVIDIA H100s on a machine that has none, and reads the program that comes out.

XLA's GPU compiler needs a description of the device, not the device. The result is the optimised
program and its memory plan; it cannot run. Matmul algorithms are not autotuned, and the workspace
of cuDNN's kernels, which cuDNN itself would report, counts as empty.
"""

import dataclasses
import importlib.util
import math
import re

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

CUDNN_VERSION = 92_800
# An H100 SXM5 80 GB. XLA leaves out calls of cuBLAS and cuDNN that these versions do not have.
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 28 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# Without autotuning XLA would take Triton's matmuls, untuned, instead of cuBLAS's.
COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def unavailable() -> str | None:
    """Why this machine cannot compile for H100, or None where it can."""
    for module in ("jax_cuda13_plugin", "jax_plugins.xla_cuda13"):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # the parent package is missing
            found = None
        if found is None:
            return f"compiling for H100 needs `pip install -e '.[cuda]'`: no module {module}"
    return None


def make_mesh(devices: int, axis: str) -> Mesh:
    """A mesh of H100s that are not there, all on one host."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET, topology=f"1x1x{devices}"
    )
    return Mesh(np.array(topology.devices), (axis,))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a compiled program.

    opcode: e.g. 'fusion', 'all-gather-start'; of a custom call, its target.
    results, operands: (dtype, shape) of each array.
    text: the whole line.
    """

    opcode: str
    results: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[tuple[str, tuple[int, ...]], ...]
    text: str


_ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)")
_CALLEES = re.compile(
    r"\b(?:body|condition|calls|to_apply|\w+_computations?)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)"
)
_NAME = re.compile(r"%([\w.\-]+)")


class Program:
    """The optimised HLO of a compiled program.

    entry: instructions outside of loops (and those inside fusions and calls made there).
    loops: instructions inside loops, with what these call.
    """

    def __init__(self, text: str):
        self._lines: dict[str, list[str]] = {}
        entry = name = None
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                name = header[2]
                entry = name if header[1] else entry
                self._lines[name] = []
            elif line.startswith("}"):
                name = None
            elif name is not None:
                self._lines[name].append(line)
        if entry is None:
            raise ValueError("no ENTRY computation in this HLO text")
        program = "\n".join(line for lines in self._lines.values() for line in lines)
        bodies = re.findall(r" while\(.*?body=%([\w.\-]+)", program)
        in_loops = self._reachable(bodies)
        self.loops = self._instructions(in_loops)
        self.entry = self._instructions(self._reachable([entry]) - in_loops)

    def _reachable(self, names: list[str]) -> set[str]:
        found, pending = set(), list(names)
        while pending:
            name = pending.pop()
            if name not in found and name in self._lines:
                found.add(name)
                for callees in _CALLEES.findall("\n".join(self._lines[name])):
                    pending += _NAME.findall(callees)
        return found

    def _instructions(self, computations: set[str]) -> list[Instruction]:
        instructions = []
        for computation in sorted(computations):
            arrays: dict[str, tuple] = {}
            for line in self._lines[computation]:
                match = _INSTRUCTION.match(line)
                if match is None:
                    continue
                name, result, opcode, operands = match.groups()
                if opcode == "custom-call":
                    opcode = re.search(r'custom_call_target="([^"]*)"', line)[1]
                arrays[name] = _arrays(result)
                inputs = [arrays.get(x, ()) for x in _NAME.findall(operands)]
                instructions.append(Instruction(opcode, arrays[name], sum(inputs, ()), line))
        return instructions


def _arrays(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(text)
    )


def collectives(instructions: list[Instruction], kind: str = "") -> list[Instruction]:
    """The collectives of a kind ('all-gather', ...; '' means all), an asynchronous one once."""
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective", "ragged")
    return [
        x
        for x in instructions
        if x.opcode.startswith(kind or kinds) and not x.opcode.endswith(("-done", "-update"))
    ]


def elements(arrays) -> int:
    """Number of elements in (dtype, shape) pairs."""
    return sum(math.prod(shape) for _, shape in arrays)

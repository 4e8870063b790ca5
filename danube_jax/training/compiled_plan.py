"""What a run's steps will take on H100s, read from the steps compiled for them.

One step is compiled for each context length of the run; time comes from the static roofline of
`hlo_account.py`, memory from the compiler.
"""

import dataclasses
from collections.abc import Callable

from danube_jax.config import RunConfig
from danube_jax.data.phases import Phase, PhaseSchedule
from danube_jax.training import aot, hlo_account
from danube_jax.training.aot import CompiledStep, StepMemory
from danube_jax.training.hlo_account import Account, Rates, Total


@dataclasses.dataclass(frozen=True)
class MicroStepCounts:
    """Calls in the program of one micro-batch, each counted as often as it runs.

    Attributes:
      fp8_matmuls, bfloat16_matmuls, float32_matmuls: of the blocks and of the head.
      attention_forward, attention_backward: fused attention.
      collectives: between devices; a step's own come once, outside of the micro-batches.
      kernels: in all.
    """

    fp8_matmuls: int
    bfloat16_matmuls: int
    float32_matmuls: int
    attention_forward: int
    attention_backward: int
    collectives: int
    kernels: int


@dataclasses.dataclass(frozen=True)
class CompiledPhase:
    """The step of all phases that have one context length and batch.

    Attributes:
      phases: their names.
      context_length: tokens of a sequence.
      microbatch_tokens: of one device; micro_batches: of a step.
      counts: of one micro-batch.
      memory: bytes of one device; memory_limit: what of its memory can be used.
      largest_microbatch_tokens: the largest micro-batch of a device that divides the step's batch
        and fits, by a line through two compiled sizes; None where none does.
      kernels: sums a kind, of a whole step.
      step_seconds: by the roofline, nothing overlapping; collective_seconds: those of communication
        in it; exposed_collective_seconds: of these, what no computation is scheduled beside.
      tokens_per_second: of all devices.
    """

    phases: tuple[str, ...]
    context_length: int
    microbatch_tokens: int
    micro_batches: int
    counts: MicroStepCounts
    memory: StepMemory
    memory_limit: int
    largest_microbatch_tokens: int | None
    kernels: tuple[Total, ...]
    step_seconds: float
    collective_seconds: float
    exposed_collective_seconds: float
    tokens_per_second: float

    @property
    def fits(self) -> bool:
        """Whether the step fits the device."""
        return self.memory.needed <= self.memory_limit


def plan_compiled(
    run: RunConfig,
    *,
    devices: int,
    rates: Rates,
    memory_limit: int,
    progress: Callable[[str], None],
) -> tuple[CompiledPhase, ...]:
    """Compiles and accounts for the step of every context length of a pretraining run.

    Args:
      run: a validated config.
      devices: H100s in all.
      rates: what they are assumed to reach.
      memory_limit: bytes that one of them has to use.
      progress: called with a line before each compilation.

    Raises:
      UserError: batch, micro-batch and devices do not divide.
    """
    groups: dict[tuple[int, int], list[Phase]] = {}
    for phase in PhaseSchedule.from_config(run).phases:
        groups.setdefault((phase.context, phase.batch_tokens), []).append(phase)
    plans, bytes_per_token = [], 0.0
    for i, phases in enumerate(groups.values()):
        where = f"context {phases[0].context:,} ({i + 1} of {len(groups)})"
        progress(f"compiling the step of {where} for {devices} x H100 ...")
        step = aot.compile_phase(run, phases[0], devices)
        if not bytes_per_token:
            progress("compiling it at another micro-batch size, to see how memory grows ...")
            bytes_per_token = _bytes_per_token(run, phases[0], devices, step)
        plans.append(_plan(phases, step, devices, rates, memory_limit, bytes_per_token))
    return tuple(plans)


def largest_microbatch(phase: Phase, devices: int, room: float) -> int | None:
    """Tokens of a device's largest micro-batch that fits and divides the step's batch, or None.

    `room` is how many tokens fit.
    """
    rows = phase.sequences // devices
    fitting = [n for n in range(1, rows + 1) if rows % n == 0 and n * phase.context <= room]
    return max(fitting) * phase.context if fitting else None


def micro_step_counts(account: Account, micro_batches: int) -> MicroStepCounts:
    """Counts of a micro-batch from the account of its step."""
    kernels, runs = account.micro_step(), account.micro_batches()
    if not kernels:  # too few micro-batches for a loop: all of them, and the update, in one piece
        forward = hlo_account.FORWARD_PASS
        kernels, runs = account.once(), micro_batches
        kernels = [k for k in kernels if k.devices == 1 or forward in k.instruction.scope]

    def count(*kinds: str) -> int:
        return sum(k.times for k in kernels if k.kind in kinds) // runs

    return MicroStepCounts(
        fp8_matmuls=count(hlo_account.FP8_MATMUL),
        bfloat16_matmuls=count(hlo_account.BF16_MATMUL),
        float32_matmuls=count(hlo_account.F32_MATMUL),
        attention_forward=count(hlo_account.ATTENTION_FORWARD),
        attention_backward=count(hlo_account.ATTENTION_BACKWARD),
        collectives=count(hlo_account.COLLECTIVE),
        kernels=count(*hlo_account.KINDS),
    )


def _bytes_per_token(run: RunConfig, phase: Phase, devices: int, step: CompiledStep) -> float:
    """How much more memory a device needs for one more token in its micro-batch."""
    tokens = step.tokens // 2
    if tokens < (run.training.loss_chunk_tokens or tokens):
        tokens = 2 * step.tokens  # fewer tokens than a chunk of the loss would count its logits in
    elif tokens % phase.context:  # one sequence of half the length takes the same memory
        phase = dataclasses.replace(phase, context=tokens)
    other = aot.compile_phase(run, phase, devices, microbatch_tokens=tokens)
    return (step.memory.needed - other.memory.needed) / (step.tokens - other.tokens)


def _plan(
    phases: list[Phase],
    step: CompiledStep,
    devices: int,
    rates: Rates,
    memory_limit: int,
    bytes_per_token: float,
) -> CompiledPhase:
    account, phase = step.account, phases[0]
    seconds = account.seconds(rates, aot.DEVICES_PER_HOST)
    totals = account.totals(rates, devices_per_host=aot.DEVICES_PER_HOST)
    communication = [t.seconds for t in totals if t.kind == hlo_account.COLLECTIVE]
    room = step.tokens + (memory_limit - step.memory.needed) / bytes_per_token
    return CompiledPhase(
        phases=tuple(phase.name for phase in phases),
        context_length=phase.context,
        microbatch_tokens=step.tokens,
        micro_batches=step.micro_batches,
        counts=micro_step_counts(account, step.micro_batches),
        memory=step.memory,
        memory_limit=memory_limit,
        largest_microbatch_tokens=largest_microbatch(phase, devices, room),
        kernels=tuple(totals),
        step_seconds=seconds,
        collective_seconds=sum(communication),
        exposed_collective_seconds=account.exposed_seconds(rates, aot.DEVICES_PER_HOST),
        tokens_per_second=phase.batch_tokens / seconds,
    )

"""What a run will take: parameters, FLOPs, memory, steps, epochs a source, time, warnings.

Nothing is allocated and no accelerator is needed.

Example:
  python tools/plan.py --config=configs/danube2.py --devices=8 --target=h100
  python tools/plan.py --config=configs/danube.py --config.precision.linear=fp8 --json=plan.json

For H100s the training step of each context length is compiled (about a minute each; extra 'aot';
--nocompile leaves it out). The plan then holds what the compiler says: matmuls in FP8 and bfloat16,
attention calls, memory, kernels by kind with FLOPs and bytes. Time follows from these by a static
roofline at assumed rates, which are printed and have flags of their own. It is an estimate.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from danube_jax import command_line, files
from danube_jax.config import RunConfig
from danube_jax.console import info
from danube_jax.errors import UserError
from danube_jax.training.hlo_account import Rates

PLAIN_WIDTH = 160  # columns where the output is no terminal
RATE_HELP = {
    "fp8_tflops": "FP8 matmuls, TFLOP/s",
    "bf16_tflops": "bfloat16 matmuls, TFLOP/s",
    "f32_tflops": "float32 matmuls, TFLOP/s",
    "attention_forward_tflops": "attention, forward, TFLOP/s of unmasked scores",
    "attention_backward_tflops": "attention, backward, TFLOP/s of unmasked scores",
    "memory_gbps": "device memory, GB/s",
    "link_gbps": "to the other devices of a host, GB/s",
    "network_gbps": "of a device to other hosts, GB/s",
    "kernel_us": "microseconds of the shortest kernel",
}

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file in configs/; override values with --config.key=value."
)
_DEVICES = flags.DEFINE_integer("devices", 8, "Accelerators in all.", lower_bound=1)
_TARGET = flags.DEFINE_string("target", "h100", "h100, h200, a100, a100_40gb or rtx4090.")
_RATE = flags.DEFINE_float(
    "tokens_per_second",
    None,
    "Assumed rate over all devices; default: the Danube report's FLOP/s a GPU (412 TFLOP/s).",
)
_JSON = flags.DEFINE_string("json", None, "Also write the plan to this file.")
_COMPILE = flags.DEFINE_bool("compile", True, "Compile the training step, for h100.")
_RATES = {
    field.name: flags.DEFINE_float(
        field.name, field.default, f"Assumed of an H100: {RATE_HELP[field.name]}.", lower_bound=1e-6
    )
    for field in dataclasses.fields(Rates)
}


def available_tokens(run: RunConfig) -> dict[str, int | None]:
    """Tokens in each source's training store; None where there is no store yet."""
    from danube_jax.data.token_store import TokenStore

    found: dict[str, int | None] = {}
    for name, source in run.data.sources.items():
        found[name] = None
        if source.path and Path(source.path).exists():
            found[name] = TokenStore.open(Path(source.path)).num_tokens
    return found


def compile_plan(run: RunConfig, plan, rates: Rates) -> tuple[tuple, str | None]:
    """The compiled steps of a run; or none, and a line that says why."""
    from danube_jax.training import aot
    from danube_jax.training.compiled_plan import plan_compiled

    refusal = aot.unavailable()
    if refusal is None:
        try:
            arguments = {"devices": plan.devices, "memory_limit": plan.memory_limit}
            return plan_compiled(run, rates=rates, progress=info, **arguments), None
        except UserError as error:  # the plan's warnings say the same where batches do not divide
            refusal = str(error)
    return (), f"counts and estimates of the compiled step are left out: {refusal}"


def with_compiled(plan, compiled: Sequence, *, keep_rates: bool):
    """The plan with the time and the warnings that follow from the compiled steps."""
    by_phase = {name: step for step in compiled for name in step.phases}
    problems = [text for text in plan.warnings if not text.startswith("will not fit")]
    for step in compiled:
        if not step.fits:
            largest = step.largest_microbatch_tokens
            advice = f"the largest that fits is {largest:,}" if largest else "none fits"
            problems.append(
                f"will not fit at context {step.context_length:,}: micro-batches of "
                f"{step.microbatch_tokens:,} tokens need {step.memory.needed / 1e9:.1f} GB of "
                f"{step.memory_limit / 1e9:.1f} GB; {advice} (training.microbatch_tokens)"
            )
    plan = dataclasses.replace(plan, warnings=tuple(problems))
    if keep_rates:
        return plan
    rates = {name: step.tokens_per_second for name, step in by_phase.items()}
    phases = tuple(
        dataclasses.replace(
            phase,
            tokens_per_second=rates[phase.name],
            days=phase.tokens / rates[phase.name] / 86_400,
        )
        for phase in plan.phases
    )
    return dataclasses.replace(plan, phases=phases, rate_source="the static roofline's rate")


def show(plan, console: Console, *, compiled: bool) -> None:
    """Prints a `Plan` as tables; its estimate of memory only where nothing was compiled."""
    total = sum(plan.parameters.values())
    parameters = Table(title=f"{plan.name}: {total:,} parameters", title_justify="left")
    parameters.add_column("part")
    parameters.add_column("parameters", justify="right")
    parameters.add_column("share", justify="right")
    for part, count in plan.parameters.items():
        parameters.add_row(part, f"{count:,}", f"{count / total:.2%}")
    console.print(parameters)

    phases = Table(title="phases", title_justify="left")
    columns = "phase,tokens,steps,context,sequences/step,micro-batches,GFLOP/token,"
    columns += "first LR,last LR,tokens/s,days"
    for column in columns.split(","):
        phases.add_column(column, justify="left" if column == "phase" else "right")
    for phase in plan.phases:
        phases.add_row(
            phase.name,
            f"{phase.tokens:,}",
            f"{phase.steps:,}",
            f"{phase.context_length:,}",
            f"{phase.sequences_per_step:,}",
            str(phase.micro_batches or "-"),
            f"{phase.flops_per_token / 1e9:.3f}",
            f"{phase.first_learning_rate:.3e}",
            f"{phase.last_learning_rate:.3e}",
            f"{phase.tokens_per_second:,.0f}",
            f"{phase.days:.2f}",
        )
    console.print(phases)

    sources = Table(title="sources", title_justify="left")
    for column in ("source", "tokens read", "tokens there", "epochs", "max epochs"):
        sources.add_column(column, justify="left" if column == "source" else "right")
    for source in plan.sources:
        known = source.tokens_available is not None
        sources.add_row(
            source.name,
            f"{source.tokens_read:,}",
            f"{source.tokens_available:,}" if known else "no store yet",
            f"{source.epochs:.3f}" if known else "-",
            f"{source.max_epochs:g}",
        )
    console.print(sources)

    memory = Table(title=f"memory a device ({plan.devices} x {plan.target})", title_justify="left")
    memory.add_column("part")
    memory.add_column("GB", justify="right")
    for part, size in plan.memory.items():
        memory.add_row(part, f"{size / 1e9:.3f}")
    memory.add_row("in all", f"{sum(plan.memory.values()) / 1e9:.3f}")
    memory.add_row("to use", f"{plan.memory_limit / 1e9:.3f}")
    if not compiled:
        console.print(memory)

    tokens = sum(phase.tokens for phase in plan.phases)
    console.print(f"tokens in all: {tokens:,}; FLOPs in all: {plan.flops:.3e}")
    console.print(f"a checkpoint: {plan.checkpoint_bytes / 1e9:.2f} GB")
    console.print(
        f"training on {plan.devices} x {plan.target}: {plan.days:.2f} days at {plan.rate_source}"
    )
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/yellow] {warning}")


def show_compiled(phases: Sequence, rates: Rates, console: Console) -> None:
    """Prints what the compiled steps say, as tables."""
    for phase in phases:
        step = phase.step_seconds
        kernels = Table(
            title=f"kernels of a step at context {phase.context_length:,}, "
            f"{phase.micro_batches} x {phase.microbatch_tokens:,} tokens a device "
            f"({', '.join(phase.phases)})",
            title_justify="left",
        )
        for column in ("kind", "kernels", "runs", "TFLOP", "GB", "ms (estimate)", "share"):
            kernels.add_column(column, justify="left" if column == "kind" else "right")
        for total in phase.kernels:
            kernels.add_row(
                total.kind,
                f"{total.kernels:,}",
                f"{total.runs:,}",
                f"{total.flops / 1e12:,.1f}",
                f"{total.bytes / 1e9:,.1f}",
                f"{total.seconds * 1e3:,.1f}",
                f"{total.seconds / step:.1%}",
            )
        console.print(kernels)

    summary = Table(title="compiled for H100, one device", title_justify="left")
    summary.add_column("context")
    for phase in phases:
        summary.add_column(f"{phase.context_length:,}", justify="right")
    gigabytes = lambda size: f"{size / 1e9:.3f}"  # noqa: E731
    rows = {
        "FP8 matmuls a micro-batch": lambda p: str(p.counts.fp8_matmuls),
        "bfloat16 matmuls a micro-batch": lambda p: str(p.counts.bfloat16_matmuls),
        "float32 matmuls a micro-batch": lambda p: str(p.counts.float32_matmuls),
        "attention calls, forward + backward": lambda p: (
            f"{p.counts.attention_forward} + {p.counts.attention_backward}"
        ),
        "kernels a micro-batch": lambda p: f"{p.counts.kernels:,}",
        "collectives a micro-batch": lambda p: str(p.counts.collectives),
        "GB: state of the run": lambda p: gigabytes(p.memory.state),
        "GB: batch": lambda p: gigabytes(p.memory.batch),
        "GB: temporary": lambda p: gigabytes(p.memory.temporary),
        "GB: peak of these": lambda p: gigabytes(p.memory.peak),
        "GB: attention workspace": lambda p: gigabytes(p.memory.attention_workspace),
        "GB: to use": lambda p: gigabytes(p.memory_limit),
        "largest micro-batch that fits": lambda p: (
            f"{p.largest_microbatch_tokens:,}" if p.largest_microbatch_tokens else "none"
        ),
        "ms a step (estimate)": lambda p: f"{p.step_seconds * 1e3:,.0f}",
        "of it collectives": lambda p: f"{p.collective_seconds / p.step_seconds:.2%}",
        "collectives beside no computation": lambda p: (
            f"{p.exposed_collective_seconds / p.step_seconds:.2%}"
        ),
        "tokens/s in all (estimate)": lambda p: f"{p.tokens_per_second:,.0f}",
    }
    for name, value in rows.items():
        summary.add_row(name, *(value(phase) for phase in phases))
    console.print(summary)
    assumed = ", ".join(f"--{name}={value:g}" for name, value in dataclasses.asdict(rates).items())
    console.print(f"the estimate assumes {assumed}; nothing overlaps; not measured")


def main(argv: Sequence[str]) -> int:
    """Parses flags, plans, prints; returns the exit status."""
    command_line.parse_flags(argv, __doc__, required=("config",))
    run = command_line.read_config(_CONFIG)
    if run.objective != "pretrain":
        raise UserError(
            f"config.objective: {run.objective!r} cannot be planned, since its steps follow from "
            "its rows: training says them before it begins; expected pretrain"
        )
    if _RATE.value is not None and _RATE.value <= 0:
        raise UserError(f"--tokens_per_second={_RATE.value}: expected a positive number")

    from danube_jax.training.init_from import resolve_model
    from danube_jax.training.plan import make_plan

    run = resolve_model(run)
    available = available_tokens(run)
    rates = Rates(**{name: flag.value for name, flag in _RATES.items()})
    arguments = {"devices": _DEVICES.value, "target": _TARGET.value, "available": available}
    plan = make_plan(run, tokens_per_second=_RATE.value, **arguments)
    compiled, note = (), None
    if _TARGET.value == "h100" and _COMPILE.value:
        compiled, note = compile_plan(run, plan, rates)
    if compiled:
        plan = with_compiled(plan, compiled, keep_rates=_RATE.value is not None)
    console = Console(highlight=False, soft_wrap=True)
    console = console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)
    show(plan, console, compiled=bool(compiled))
    if compiled:
        show_compiled(compiled, rates, console)
    if note:
        console.print(note, markup=False)
    if _JSON.value:
        content = dataclasses.asdict(plan) | {"days": plan.days}
        if compiled:
            content["compiled"] = [
                dataclasses.asdict(phase) | {"fits": phase.fits} for phase in compiled
            ]
            content["rates"] = dataclasses.asdict(rates)
        files.write_json(_JSON.value, content)
    return 0


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # it plans for GPUs and must not look for any
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # nor say that it finds none
    command_line.run(main)

"""What a run will take: parameters, FLOPs, memory, steps, epochs a source, time, warnings.

Nothing is allocated and no accelerator is needed.

Example:
  python tools/plan.py --config=configs/danube2.py --devices=8 --target=h100
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
from danube_jax.errors import UserError

PLAIN_WIDTH = 160  # columns where the output is no terminal

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


def available_tokens(run: RunConfig) -> dict[str, int | None]:
    """Tokens in each source's training store; None where there is no store yet."""
    from danube_jax.data.token_store import TokenStore

    found: dict[str, int | None] = {}
    for name, source in run.data.sources.items():
        found[name] = None
        if source.path and Path(source.path).exists():
            found[name] = TokenStore.open(Path(source.path)).num_tokens
    return found


def show(plan, console: Console) -> None:
    """Prints a `Plan` as tables."""
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
    console.print(memory)

    tokens = sum(phase.tokens for phase in plan.phases)
    console.print(f"tokens in all: {tokens:,}; FLOPs in all: {plan.flops:.3e}")
    console.print(f"a checkpoint: {plan.checkpoint_bytes / 1e9:.2f} GB")
    console.print(f"training on {plan.devices} x {plan.target}: {plan.days:.2f} days")
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/yellow] {warning}")


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
    plan = make_plan(
        run,
        devices=_DEVICES.value,
        target=_TARGET.value,
        available=available_tokens(run),
        tokens_per_second=_RATE.value,
    )
    console = Console(highlight=False, soft_wrap=True)
    show(plan, console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH))
    if _JSON.value:
        content = dataclasses.asdict(plan) | {"days": plan.days}
        files.write_json(_JSON.value, content)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    command_line.run(main)

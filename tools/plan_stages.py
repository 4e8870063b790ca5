"""Plans training stages over prepared stores: epochs a source a stage, warnings, phases.

Example:
  python tools/plan_stages.py --config=configs/data/danube2.py --corpus=corpus --write=phases.py

The config's `stages` are the wish and `plan` the caps on repetition; --corpus is the output folder
of tools/prepare_data.py. Without it, --available names tokens a source, to plan before there is
any text: --available=web=2e12,instruct=1e10. A training config takes the result by
`set_data(config)` from the written file.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from danube_jax import command_line, files
from danube_jax.console import warn
from danube_jax.data.corpus import planner
from danube_jax.data.corpus.config import parse_corpus_config
from danube_jax.data.token_store import TokenStore, is_finished
from danube_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file in configs/data/.")
_CORPUS = flags.DEFINE_string("corpus", None, "Folder of a preparation; default: config.output.")
_AVAILABLE = flags.DEFINE_list("available", [], "Tokens a source instead of stores: web=2e12,...")
_REBALANCE = flags.DEFINE_bool(
    "rebalance", False, "Keep the caps by handing shares on to other sources."
)
_WRITE = flags.DEFINE_string("write", None, "Write sources and phases as Python to this file.")


def find_stores(folder: Path) -> dict[str, dict[str, str]]:
    """Source → part → folder of the finished stores of a preparation."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted((folder / "stores").glob("*/*")):
        if is_finished(path):
            found.setdefault(path.parent.name, {})[path.name] = str(path)
    found = {name: parts for name, parts in found.items() if "train" in parts}
    if not found:
        raise UserError(
            f"{folder}: no finished token stores; run tools/prepare_data.py, or give --available"
        )
    return found


def parse_available(rows: Sequence[str]) -> dict[str, int]:
    """Tokens a source, of words like web=2e12."""
    out = {}
    for row in rows:
        name, _, number = row.partition("=")
        try:
            out[name] = int(float(number))
        except ValueError:
            raise UserError(
                f"--available: {row!r}; expected SOURCE=TOKENS, such as web=2e12"
            ) from None
        if out[name] <= 0:
            raise UserError(f"--available: {row!r}; expected a positive number of tokens")
    return out


def show(plan: planner.StagePlan, tokens: dict[str, int], caps) -> None:
    """Prints shares and epochs."""
    table = Table(title="share of each stage, and epochs in it", title_justify="left")
    table.add_column("source")
    table.add_column("tokens there are", justify="right")
    for stage in plan.stages:
        table.add_column(
            f"{stage.name}\n{stage.tokens:,} tokens\ncontext {stage.context_length:,}",
            justify="right",
        )
    table.add_column("epochs in all", justify="right")
    table.add_column("cap", justify="right")
    for name, epochs in plan.total_epochs().items():
        cells = [
            f"{stage.mixture[name]:.1%}  {stage.epochs[name]:.2f}" if name in stage.mixture else ""
            for stage in plan.stages
        ]
        cap = planner.cap_of(caps, name)
        table.add_row(name, f"{tokens[name]:,}", *cells, f"{epochs:.2f}", f"{cap:g}")
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)
    for line in plan.warnings:
        warn(line)


def main(argv: Sequence[str]) -> int:
    """Plans, prints and writes; returns the exit status."""
    command_line.parse_flags(argv, __doc__, required=("config",))
    corpus = parse_corpus_config(command_line.config_dict(_CONFIG))
    if _AVAILABLE.value:
        if _WRITE.value:
            raise UserError("--write needs stores; give --corpus instead of --available")
        tokens, stores = parse_available(_AVAILABLE.value), {}
    else:
        stores = find_stores(Path(_CORPUS.value or corpus.output))
        tokens = {name: TokenStore.open(parts["train"]).tokens for name, parts in stores.items()}
    plan = planner.plan_stages(corpus.stages, tokens, corpus.plan, rebalance=_REBALANCE.value)
    show(plan, tokens, corpus.plan)
    if _WRITE.value:
        files.write_bytes(_WRITE.value, planner.as_python(plan, stores, corpus.plan).encode())
        print(f"wrote {_WRITE.value}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
